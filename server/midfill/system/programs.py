"""Find programs in PATH, ignoring relative folders.

The system may find a bare program name in the current folder: Windows searches it first, and so does every
system whose PATH has an entry such as "." or "". The current folder is often a repository that is not
trusted, so programs are started by the absolute paths that `find_program` returns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath

# Extensions of programs on Windows if PATHEXT is not set.
_EXTENSIONS = ".COM;.EXE;.BAT;.CMD"


def find_program(
    name: str, environment: Mapping[str, str] | None = None, *, windows: bool = sys.platform == "win32"
) -> str | None:
    """Return the absolute path of a program, or None if no absolute folder of PATH has it.

    An absolute `name` is checked itself; a relative one with a folder in it is never found.

    Args:
        name: a program's name, on Windows with or without its extension.
        environment: variables with PATH, and on Windows PATHEXT; `os.environ` by default.
        windows: whether to use the rules of Windows.
    """
    variables = os.environ if environment is None else environment
    pure = PureWindowsPath if windows else PurePosixPath
    path = pure(name)
    if not name or "\0" in name:
        return None
    if path.is_absolute():
        candidates = [path]
    elif path.name != name:
        # A path with a folder, or with a drive, where it would be relative to that drive's current folder.
        return None
    else:
        separator = ";" if windows else ":"
        folders = [pure(_unquoted(entry)) for entry in variables.get("PATH", "").split(separator)]
        candidates = [folder / name for folder in folders if folder.is_absolute()]
    extensions = [""]
    if windows:
        known = [one for one in (variables.get("PATHEXT") or _EXTENSIONS).split(";") if one]
        # Windows runs only files with one of these extensions.
        extensions = [""] if path.suffix.lower() in map(str.lower, known) else known
    for candidate in candidates:
        for extension in extensions:
            file = f"{candidate}{extension}"
            if os.path.isfile(file) and (windows or os.access(file, os.X_OK)):  # noqa: PTH113 - maybe no path of this system
                return file
    return None


def _unquoted(entry: str) -> str:
    """Return an entry of PATH without the quotes that Windows allows around it."""
    return entry[1:-1] if len(entry) > 1 and entry[0] == entry[-1] == '"' else entry
