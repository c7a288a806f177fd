"""Small git repositories, commit by commit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

START_S = 1_700_000_000


@dataclass
class Planted:
    """A repository; the clock goes on by an hour with each commit."""

    root: Path
    clock_s: int = START_S
    branches: list[str] = field(default_factory=list)

    @staticmethod
    def new(root: Path) -> Planted:
        root.mkdir(parents=True, exist_ok=True)
        planted = Planted(root)
        planted.git("init", "-q", "-b", "main")
        return planted

    def git(self, *arguments: str, author: str = "Ada") -> str:
        date = f"{self.clock_s} +0000"
        env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        env |= {
            "GIT_AUTHOR_NAME": author,
            "GIT_AUTHOR_EMAIL": f"{author.lower()}@example.org",
            "GIT_COMMITTER_NAME": author,
            "GIT_COMMITTER_EMAIL": f"{author.lower()}@example.org",
            "GIT_AUTHOR_DATE": date,
            "GIT_COMMITTER_DATE": date,
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.strip()

    def commit(self, files: dict[str, str | bytes | None], *, author: str = "Ada") -> str:
        """Write files (None deletes one) and commit them; returns the hash."""
        for name, text in files.items():
            path = self.root / name
            if text is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.clock_s += 3600
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a change", author=author)
        return self.git("rev-parse", "HEAD")


def stage(number: int, *, word: str = "stage") -> str:
    """A function in the style of one project."""
    return (
        f"def run_{word}_{number}(pipeline, retries={number % 7}):\n"
        f'    """Run {word} {number} of the pipeline."""\n'
        f"    result = pipeline.{word}({number}).retry(retries)\n"
        f"    if not result.passed:\n"
        f"        raise PipelineError('{word} {number} has failed', result)\n"
        f"    return result.unwrap()\n\n\n"
    )


def grow(planted: Planted, commits: int, *, per_commit: int = 2, first: int = 0, word: str = "stage") -> None:
    """A file that gets functions of the same style with every commit."""
    text = "class PipelineError(Exception):\n    pass\n\n\n"
    number = first
    planted.commit({"README.md": "A pipeline.\n", f"{word}s.py": text})
    for _ in range(commits):
        for _ in range(per_commit):
            text += stage(number, word=word)
            number += 1
        planted.commit({f"{word}s.py": text})
