"""Repositories that were made to run programs, to lead out of themselves, or to never end."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

from planted_history import Planted, grow

CONFIG = """\
[core]
\trepositoryformatversion = 1
\tbare = {bare}
[extensions]
\tpartialClone = origin
[remote "origin"]
\turl = {url}
\tpromisor = true
\tuploadpack = "touch {marker}; git-upload-pack"
{more}
"""

ALLOWED = (
    '[protocol "file"]\n\tallow = always\n[protocol "ext"]\n\tallow = always\n[protocol]\n\tallow = always\n'
)


def program(folder: Path, marker: Path) -> Path:
    """A program that leaves a mark wherever it is run."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def lacking(folder: Path, marker: Path, *, allowed: bool = True, remote: str = "file", bare: bool = False):
    """A partial clone that lacks the tree of its last commit but one, and says who has it."""
    whole = Planted.new(folder / "whole")
    grow(whole, 6)
    target = folder / "lacking"
    shutil.copytree(whole.root / ".git" if bare else whole.root, target)
    git_folder = target if bare else target / ".git"
    tree = whole.git("rev-parse", "HEAD~1^{tree}")
    (git_folder / "objects" / tree[:2] / tree[2:]).unlink()
    url = str(whole.root) if remote == "file" else f'"ext::sh -c touch% {marker}"'
    text = CONFIG.format(url=url, marker=marker, more=ALLOWED if allowed else "", bare=str(bare).lower())
    (git_folder / "config").write_text(text)
    return target


def as_git_would(folder: Path, *arguments: str) -> None:
    """Run git without any care."""
    subprocess.run(["git", "-C", folder, *arguments], check=False, capture_output=True)


def tree_by_hand(planted: Planted, entries: list[tuple[str, bytes, str]]) -> str:
    """A commit with a tree of these modes, names and hashes, whatever they are."""
    raw = b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(id_) for mode, name, id_ in entries)
    command = ["git", "-C", planted.root, "hash-object", "-t", "tree", "-w", "--stdin", "--literally"]
    done = subprocess.run(command, input=raw, check=True, capture_output=True)
    return planted.git("commit-tree", done.stdout.decode().strip(), "-m", "by hand")
