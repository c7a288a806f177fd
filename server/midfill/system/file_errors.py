"""Say why a file cannot be read or written, and what to do: the end of an error message. Any thread."""

from __future__ import annotations

import errno

_NO_ACCESS = frozenset({errno.EACCES, errno.EPERM})
_NO_FOLDER = "a part of the path is not a folder. Check the path"


def why_unreadable(error: Exception) -> str:
    """Return why a file cannot be read and the remedy, without the last full stop.

    Args:
        error: an `OSError`, or another error of a reader whose text says what is wrong with the content.
    """
    if isinstance(error, OSError):
        if error.errno == errno.ENOENT:
            return "there is no such file. Check the path"
        if error.errno == errno.EISDIR:
            return "it is a folder. Give a file"
        if error.errno == errno.ENOTDIR:
            return _NO_FOLDER
        if error.errno in _NO_ACCESS:
            return "access is denied. Check its permissions"
    return _plain(error)


def why_unwritable(error: Exception) -> str:
    """Return why a file cannot be written and the remedy, without the last full stop."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOENT:
            return "its folder does not exist. Create the folder, or choose another path"
        if error.errno == errno.EISDIR:
            return "it is a folder. Give a file"
        if error.errno == errno.ENOTDIR:
            return _NO_FOLDER
        if error.errno in _NO_ACCESS:
            return "access is denied. Check the permissions, or choose another path"
        if error.errno == errno.EROFS:
            return "the file system is read-only. Choose another path"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return "the disk is full. Free some space, or choose another path"
    return _plain(error)


def _plain(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).rstrip(".")
