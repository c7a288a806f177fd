"""A repository's history: commits, trees, and what each commit has added. Asks git, and lets it run nothing.

A cloned repository's configuration can name programs: an external diff, a text conversion, a file system
monitor, hooks, a remote helper for missing objects. Every command here leaves those out, reads objects only
and never the working tree. Knows files as bytes and texts, nothing of models. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from midfill.errors import MidfillError

_MAX_BLOB_BYTES = 400_000
_SAFE = (
    "--no-optional-locks",
    "--no-pager",
    "--no-replace-objects",
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.attributesFile=/dev/null"),
    *("-c", "diff.external="),
    *("-c", "log.showSignature=false"),
    # Objects that a partial clone lacks would be fetched, by a program that the repository names.
    *("-c", "protocol.allow=never"),
)
_PATCH = ("--no-ext-diff", "--no-textconv", "--no-color", "--unified=0", "--diff-algorithm=histogram")
_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)
_BOT = re.compile(
    r"\[bot\]|\b(?:dependabot|renovate|pre-commit-ci|github-actions|greenkeeper|weblate|snyk)\b|-bot@",
    re.IGNORECASE,
)
_REGULAR = frozenset({"100644", "100755"})


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, without its message.

    Attributes:
        id: its hash.
        parents: theirs.
        time_s: when it was committed, in seconds since 1970.
        author: name and address.
    """

    id: str
    parents: tuple[str, ...]
    time_s: int
    author: str

    @property
    def is_bot(self) -> bool:
        """Whether a program made it, by its author's name."""
        return _BOT.search(self.author) is not None


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit did to a file.

    Attributes:
        path: after the commit.
        old, new: hashes of the contents; `old` is "" for a new file, `new` for one that was deleted.
        moved: the file had another path before.
    """

    path: str
    old: str
    new: str
    moved: bool


@dataclass(frozen=True, slots=True)
class Hunk:
    """Lines that a commit put into a file, in the place of others; either may be none.

    Attributes:
        first, end: lines of the new text, from 0, half open.
        removed_first, removed_end: likewise of the old text.
    """

    first: int
    end: int
    removed_first: int
    removed_end: int


class Repository:
    """The repository that a folder belongs to.

    Raises `MidfillError` if there is no git, no repository, or one that git does not trust.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise MidfillError(f"{folder} is not a folder. Give the folder of a git repository.")
        self.root = Path(os.fsdecode(self._run("rev-parse", "--show-toplevel").rstrip(b"\n")))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def commits(self, limit: int) -> list[Commit]:
        """The newest commits that HEAD has behind it, the oldest first; no commit stands before its parents.

        Raises `MidfillError` if there are none.
        """
        out = self._run(
            *("log", "-z", "--date-order", f"-n{limit}", "--format=%H%x1f%P%x1f%ct%x1f%an <%ae>", "HEAD"),
            failing=f"{self.root} has no commits yet, so there is nothing to learn from.",
        )
        found = []
        for record in out.decode("utf-8", "replace").split("\0"):
            if record:
                id_, parents, time_s, author = record.split("\x1f")
                found.append(Commit(id_, tuple(parents.split()), int(time_s), author))
        found.reverse()
        return found

    def tree(self, commit: str) -> dict[str, str]:
        """The regular files of a commit, no links and submodules: path to the hash of the content."""
        files = {}
        for record in self._run("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0"):
            meta, _, path = record.partition(b"\t")
            if path:
                mode, _, blob = meta.decode().split()
                if mode in _REGULAR:
                    files[os.fsdecode(path)] = blob
        return files

    def changes(self, commits: Iterable[Commit]) -> Iterator[tuple[Commit, list[Change]]]:
        """What each commit, none of them a merge, did to regular files."""
        for commit in commits:
            out = self._run("diff-tree", "-r", "-M", "-z", "--raw", "--no-commit-id", "--root", commit.id)
            yield commit, list(_changes(out.split(b"\0")))

    def hunks(self, change: Change) -> list[Hunk]:
        """The places where a file was changed; a new file is one."""
        if not change.old:
            text = self.texts([change.new])[change.new]
            return [] if text is None else [Hunk(0, text.count("\n") + 1, 0, 0)]
        if change.old == change.new:
            return []
        out = self._run("diff", *_PATCH, change.old, change.new)
        found = []
        for match in _HUNK.finditer(out):
            old_start, old_count, start, count = (1 if one is None else int(one) for one in match.groups())
            # The line of an empty range is the one before it.
            first, old_first = start - (count > 0), old_start - (old_count > 0)
            found.append(Hunk(first, first + count, old_first, old_first + old_count))
        return found

    def texts(self, blobs: Iterable[str]) -> dict[str, str | None]:
        """The contents of these hashes; None for one that is large, binary or not in UTF-8."""
        wanted = sorted(set(blobs))
        asked = "\n".join(wanted).encode()
        sizes = self._run("cat-file", "--batch-check=%(objectname) %(objectsize)", given=asked).split(b"\n")
        small = [line.split()[0] for line in sizes if line and int(line.split()[1]) <= _MAX_BLOB_BYTES]
        out = self._run("cat-file", "--batch=%(objectname) %(objectsize)", given=b"\n".join(small))
        found: dict[str, str | None] = dict.fromkeys(wanted)
        at = 0
        while at < len(out):
            end = out.index(b"\n", at)
            blob, size = out[at:end].decode().split()
            data = out[end + 1 : end + 1 + int(size)]
            at = end + int(size) + 2
            if b"\0" not in data:
                with contextlib.suppress(UnicodeDecodeError):
                    found[blob] = data.decode("utf-8-sig")
        return found

    def _run(self, *arguments: str, failing: str = "", given: bytes = b"") -> bytes:
        command = ["git", *_SAFE, "-C", str(self._folder), *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - git, with what it may not do spelled out above
                command, capture_output=True, check=False, input=given, env=_environment()
            )
        except OSError as error:
            raise MidfillError(f"git cannot be started ({error.strerror}). Install git.") from error
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.decode("utf-8", "replace").strip()
        if "dubious ownership" in said:
            raise MidfillError(
                f"git does not trust {self._folder}, because another user owns it. If you do: "
                f"git config --global --add safe.directory {self._folder}"
            )
        if "not a git repository" in said:
            raise MidfillError(
                f"{self._folder} is in no git repository. Adapters are learnt from a repository's history: "
                "open one, or name it by --repo."
            )
        if failing:
            raise MidfillError(failing)
        raise MidfillError(f"git {arguments[0]} failed in {self._folder}: {said.partition(chr(10))[0]}")


def _changes(fields: list[bytes]) -> Iterator[Change]:
    """The records of `git diff-tree -z --raw`."""
    at = 0
    while at < len(fields) and fields[at]:
        old_mode, mode, old, new, status = fields[at].decode().lstrip(":").split()
        renamed = status[0] in "RC"
        path = os.fsdecode(fields[at + 1 + renamed])
        at += 2 + renamed
        if (mode if new.strip("0") else old_mode) in _REGULAR:
            yield Change(path, old if old.strip("0") else "", new if new.strip("0") else "", renamed)


def _environment() -> Mapping[str, str]:
    """The user's, without what points git at another repository or program."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {"GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
