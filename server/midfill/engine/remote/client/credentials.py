"""Where the key of a served engine comes from: the environment, the system's keyring, or a command.

The setting names the place, never the key. Only the user's own settings file may: see `settings`. The key is
in no log and no message.
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
    """The key, or None if there is none at the place.

    Args:
        where: "env:NAME"; "keyring:SERVICE" or "keyring:SERVICE/USER"; "command:PROGRAM ARGUMENTS", whose
            first line of output it is. May block for as long as that command takes.

    Raises:
        SettingsError: no such kind of place, the command fails, or what it gives cannot be a key.
    """
    kind, _, place = where.partition(":")
    if kind not in _KINDS or not place:
        raise SettingsError(
            f"`engine_key` is {where!r}, not env:NAME, keyring:SERVICE/USER or command:PROGRAM."
        )
    key = _KINDS[kind](place)
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError(
            f"What `engine_key` ({kind}) gives is no key: it has blanks or other characters in it."
        )
    return key or None


def _from_environment(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _from_keyring(place: str) -> str | None:
    try:
        import keyring  # noqa: PLC0415 - an extra
    except ImportError:
        raise SettingsError(
            "`engine_key` names the keyring, which needs a package: pip install keyring"
        ) from None
    service, _, user = place.partition("/")
    try:
        found: str | None = keyring.get_password(service, user or "midfill")
    except Exception as error:  # backends raise anything
        raise SettingsError(
            f"The keyring cannot be read ({type(error).__name__}); is it unlocked?"
        ) from error
    return found


def _from_command(line: str) -> str | None:
    try:
        name, *arguments = shlex.split(line)
        program = find_program(name)
        if program is None:
            raise SettingsError(
                "The command of `engine_key` cannot be run: it is neither an absolute path nor on the PATH."
            )
        done = subprocess.run(  # noqa: S603 - the user's own settings file names it
            [program, *arguments],
            # Not the current folder, which may be a repository: what is run there may load files of it.
            cwd=os.path.dirname(program),  # noqa: PTH120
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise SettingsError(f"The command of `engine_key` ended with status {error.returncode}.") from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"The command of `engine_key` took longer than {_COMMAND_S:.0f} s.") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"The command of `engine_key` cannot be run ({type(error).__name__}).") from None
    try:
        lines = text_files.decode(done.stdout).splitlines()
    except UnicodeError:
        raise SettingsError("What the command of `engine_key` prints is not in UTF-8.") from None
    return lines[0].strip() if lines else None


_KINDS = {"env": _from_environment, "keyring": _from_keyring, "command": _from_command}
