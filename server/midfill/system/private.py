"""Folders and files that are their owner's alone: what was learnt from private code, and who uses what.

On Windows the user's profile folder does that, and modes mean nothing. Any thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path, *, tighten: bool = True) -> Path:
    """Make a folder, and those above it that are missing, for its owner alone. Returns it.

    Args:
        path: the folder.
        tighten: take it from others if it is there already, as older versions have made it; not for a folder
            that the user has named, who may want to share it.

    Raises:
        OSError: it cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        try:
            if folder == path or not folder.exists():
                folder.mkdir(mode=0o700)
        except FileExistsError:
            if not folder.is_dir():
                raise
    if tighten:
        private(path)
    return path


def private(path: Path) -> None:
    """Take a file or a folder from everybody but its owner, if it is ours."""
    if os.name != "posix":
        return
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & _OTHERS:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def open_private(path: str, flags: int) -> int:
    """Open a file for its owner alone: the `opener` of `open`."""
    descriptor = os.open(path, flags, 0o600)
    if os.name == "posix" and os.fstat(descriptor).st_mode & _OTHERS:
        os.fchmod(descriptor, 0o600)
    return descriptor


def create_private(path: Path) -> IO[bytes]:
    """Open an empty file for its owner alone, to be written. Raises `OSError`."""
    return open(path, "wb", opener=open_private)
