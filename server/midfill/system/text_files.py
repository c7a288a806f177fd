"""Read text files as any editor may have saved them, and replace files atomically.

Notepad and PowerShell begin a file with a byte order mark, and some of their versions write UTF-16. UTF-8's
mark is removed; any other encoding is refused with an explanation. Any thread.
"""

from __future__ import annotations

import codecs
import os
import shutil
import tempfile
from pathlib import Path

BOM = "\ufeff"
"""U+FEFF, the first character of a text that was decoded with its mark."""

# Longer marks first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_REMEDY = "Save it as UTF-8."


def decode(data: bytes) -> str:
    """Return the text of a file, without a byte order mark.

    Raises `UnicodeError` whose message says how the file is encoded and what to do.
    """
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            raise UnicodeError(f"it is in {name}. {_REMEDY}")
    if b"\0" in data:
        raise UnicodeError(f"it has null bytes, as UTF-16 does. {_REMEDY}")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnicodeError(f"line {line} is not in UTF-8. {_REMEDY}") from error


def read(path: Path) -> str:
    """Return the text of a file. Raises `OSError`, and `UnicodeError` as `decode` does."""
    return decode(path.read_bytes())


def replace(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file atomically: readers, and a crash, find the old text or the new one, never a part.

    The text is written as it is, line ends and byte order mark included. A symbolic link stays a link, and
    the file that it leads to is replaced.

    Args:
        path: the file. Unless it is private, a new file's folders are made, and an existing file keeps its
            mode and is not replaced if it is read-only.
        text: its new content.
        private: make the file readable and writable for its owner only, whatever its mode was.

    Raises:
        OSError: it cannot be written; the file is unchanged then.
    """
    if private and path.exists() and not (path.is_file() or path.is_dir()):
        # A pipe or a device, such as /dev/stdout, cannot be replaced.
        path.write_text(text, encoding="utf-8", newline="")
        return
    target = path.resolve()
    if not private:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is read-only", str(path))
        target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if private:
            partial.chmod(0o600)
        elif target.exists():
            shutil.copymode(target, partial)
        else:
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
