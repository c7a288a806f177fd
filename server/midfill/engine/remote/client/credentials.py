"""Find the API key of a server: in the environment, in the system's keyring, or from a command.

The setting names the source, never the key. Only the user's own settings file may set it: see `settings`. The
key is in no log and in no message.
"""

from __future__ import annotations

import os
import shlex
import subprocess

from midfill.errors import SettingsError
from midfill.system import text_files
from midfill.system.programs import find_program

_COMMAND_S = 20.0


def find_key(where: str) -> str | None:
    """Return the key, or None if the source has none.

    Args:
        where: "env:NAME"; "keyring:SERVICE" or "keyring:SERVICE/USER"; "command:PROGRAM ARGUMENTS", whose
            first line of output is the key. May block for as long as that command takes.

    Raises:
        SettingsError: unknown kind of source, the command fails, or its result cannot be a key.
    """
    kind, _, place = where.partition(":")
    if kind not in _KINDS or not place:
        raise SettingsError(
            f"`engine_key` is {where!r}; it must be env:NAME, keyring:SERVICE/USER or command:PROGRAM."
        )
    key = _KINDS[kind](place)
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError(
            f"`engine_key` ({kind}) does not yield a valid key: it contains blanks or non-ASCII characters."
        )
    return key or None


def _from_environment(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _from_keyring(place: str) -> str | None:
    try:
        import keyring
    except ImportError:
        raise SettingsError(
            "`engine_key` uses the keyring, which needs a package: pip install keyring"
        ) from None
    service, _, user = place.partition("/")
    try:
        found: str | None = keyring.get_password(service, user or "midfill")
    except Exception as error:  # backends raise anything
        raise SettingsError(
            f"The keyring cannot be read ({type(error).__name__}). Is it unlocked?"
        ) from error
    return found


def _from_command(line: str) -> str | None:
    try:
        name, *arguments = shlex.split(line)
        program = find_program(name)
        if program is None:
            raise SettingsError(
                "The command of `engine_key` was not found: it is neither an absolute path nor on the PATH."
            )
        done = subprocess.run(
            [program, *arguments],
            # Not the current folder: it may be a repository, whose files the program might load.
            cwd=os.path.dirname(program),  # noqa: PTH120
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise SettingsError(
            f"The command of `engine_key` failed with exit status {error.returncode}."
        ) from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"The command of `engine_key` took longer than {_COMMAND_S:.0f} s.") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"The command of `engine_key` cannot be run ({type(error).__name__}).") from None
    try:
        lines = text_files.decode(done.stdout).splitlines()
    except UnicodeError:
        raise SettingsError("The output of the command of `engine_key` is not UTF-8.") from None
    return lines[0].strip() if lines else None


_KINDS = {"env": _from_environment, "keyring": _from_keyring, "command": _from_command}
