"""Where a program is: a search of PATH that leaves relative folders out.

A bare name that is handed to the system may be found in the current folder: Windows looks there first, and so
does every system where PATH has an entry such as "." or "". The current folder is often a repository that
somebody else has written, so programs are started by the absolute paths that `find_program` returns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath

# Of Windows, where PATHEXT is not set.
_EXTENSIONS = ".COM;.EXE;.BAT;.CMD"


def find_program(
    name: str, environment: Mapping[str, str] | None = None, *, windows: bool = sys.platform == "win32"
) -> str | None:
    """Return the absolute path of a program; None if there is none in an absolute folder of PATH.

    An absolute `name` is looked for there only; a relative one with a folder in it is never found.

    Args:
        name: a program's name, on Windows with or without its extension.
        environment: has PATH, and on Windows PATHEXT; `os.environ` by default.
        windows: whether names and paths are those of Windows.
    """
    variables = os.environ if environment is None else environment
    pure = PureWindowsPath if windows else PurePosixPath
    path = pure(name)
    if not name or "\0" in name:
        return None
    if path.is_absolute():
        candidates = [path]
    elif path.name != name:
        # With a folder in it, or with a drive, whose current folder would count.
        return None
    else:
        separator = ";" if windows else ":"
        folders = [pure(_unquoted(entry)) for entry in variables.get("PATH", "").split(separator)]
        candidates = [folder / name for folder in folders if folder.is_absolute()]
    extensions = [""]
    if windows:
        known = [one for one in (variables.get("PATHEXT") or _EXTENSIONS).split(";") if one]
        # Without one of these Windows does not run a file.
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
