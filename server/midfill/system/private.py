"""Folders and files with access for their owner only, for data that comes from private code or shows usage.

On Windows the user's profile folder is private, and modes have no effect. Any thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path, *, tighten: bool = True) -> Path:
    """Make a folder and its missing parents with access for the owner only; return it.

    Args:
        path: the folder.
        tighten: remove the access of others if the folder exists already, since older versions made it
            accessible; not for a folder that the user has named, and may want to share.

    Raises:
        OSError: the folder cannot be made.
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
    """Remove the access of others to a file or a folder, if this user owns it."""
    if os.name != "posix":
        return
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & _OTHERS:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def open_private(path: str, flags: int) -> int:
    """Open a file with access for its owner only: an `opener` for `open`."""
    descriptor = os.open(path, flags, 0o600)
    if os.name == "posix" and os.fstat(descriptor).st_mode & _OTHERS:
        os.fchmod(descriptor, 0o600)
    return descriptor


def create_private(path: Path) -> IO[bytes]:
    """Open an empty file for writing, with access for its owner only. Raises `OSError`."""
    return open(path, "wb", opener=open_private)
