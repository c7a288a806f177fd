"""Changes of the configuration files of editors: plan them, show them as a diff, write them with a backup.

Knows no editor. Only `write` writes.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from midfill.errors import MidfillError
from midfill.system import text_files as textfiles
from midfill.system.file_errors import why_unreadable, why_unwritable

BEGIN, END = ">>> midfill >>>", "<<< midfill <<<"


@dataclass(frozen=True, slots=True)
class Edit:
    """A file's text before and after the change. None: there is no file."""

    path: Path
    before: str | None
    after: str | None

    @property
    def diff(self) -> str:
        """Return the change as a unified diff; "" if there is none."""
        old = [] if self.before is None else self.before.splitlines(keepends=True)
        new = [] if self.after is None else self.after.splitlines(keepends=True)
        source, target = ("/dev/null" if one is None else str(self.path) for one in (self.before, self.after))
        lines = difflib.unified_diff(old, new, source, target)
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes and steps that set up one editor.

    Attributes:
        edit: of its configuration file; None if the user has to write it.
        steps: sentences for the user: what to do by hand, or what to know.
        shown: the configuration to copy, if `edit` is None.
    """

    edit: Edit | None = None
    steps: tuple[str, ...] = ()
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Home:
    """The user's folders, and the command to start.

    Attributes:
        command: starts the server of this installation, with absolute paths.
        clients: the folder of the editor plugins.
        home: the user's home folder.
    """

    command: tuple[str, ...]
    clients: Path
    home: Path = field(default_factory=Path.home)

    @property
    def config(self) -> Path:
        """Return the folder of configuration files."""
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or self.home / "AppData" / "Local")
        return Path(os.environ.get("XDG_CONFIG_HOME") or self.home / ".config")

    @property
    def applications(self) -> Path:
        """Return the folder where graphical applications keep their configuration."""
        if sys.platform == "win32":
            return Path(os.environ.get("APPDATA") or self.home / "AppData" / "Roaming")
        if sys.platform == "darwin":
            return self.home / "Library" / "Application Support"
        return self.config


def write(edit: Edit) -> Path | None:
    """Write an edit atomically. Return the path of the backup.

    None if there was no file, or if it is deleted: then it had nothing but lines of midfill.

    Raises `MidfillError` if the file has changed since the edit was planned, or cannot be written.
    """
    # Dotfiles are often symbolic links, which must stay.
    path = edit.path.resolve()
    if read(path) != edit.before:
        raise MidfillError(f"{edit.path} has changed in the meantime. Run the command again.")
    backup = None
    try:
        if edit.after is None:
            path.unlink(missing_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        if edit.before is not None:
            backup = _unused(edit.path)
            shutil.copy2(path, backup)
        textfiles.replace(path, edit.after)
    except OSError as error:
        raise MidfillError(f"Cannot write {edit.path}: {why_unwritable(error)}.") from error
    return backup


def _unused(path: Path) -> Path:
    backup = path.with_name(path.name + ".before-midfill")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.before-midfill-{number}")
    return backup


def read(path: Path) -> str | None:
    """Return a file's text with its line ends and byte order mark; None if there is no file."""
    try:
        data = path.read_bytes()
        text = textfiles.decode(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MidfillError(f"Cannot read {path}: {why_unreadable(error)}.") from error
    except UnicodeError as error:
        raise MidfillError(f"Cannot read {path}: {error}") from error
    return textfiles.BOM + text if data.startswith(codecs.BOM_UTF8) else text


def with_block(path: Path, comment: str, lines: str, own: re.Pattern[str]) -> Plan:
    """Return the plan to put lines between marks at the end of a file, or to replace those of an earlier run.

    Args:
        path: the user's file.
        comment: starts a comment line in it.
        lines: what to add.
        own: matches lines with which the user has set up midfill already; nothing is added then.
    """
    before = read(path)
    text = before or ""
    block = f"{comment} {BEGIN} (written by: midfill setup)\n{lines}{comment} {END}\n"
    ending = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", ending)
    if found := _marked(comment).search(text):
        after = text[: found.start()] + block + text[found.end() :]
    elif own.search(text):
        return Plan(Edit(path, before, text), ("Your own lines in this file already set up midfill.",))
    else:
        gap = "" if not text else ending if text.endswith("\n") else 2 * ending
        after = text + gap + block
    return Plan(Edit(path, before, after))


def without_block(path: Path, comment: str, own: re.Pattern[str]) -> Plan:
    """Return the plan to remove the lines that `with_block` has added. `path` and `comment` are those of it.

    `own` matches lines of the user's that start midfill; they stay.
    """
    before = read(path)
    after = before
    if before is not None and (found := _marked(comment).search(before)):
        head = before[: found.start()]
        # With the empty line before it, if there is one.
        gap = re.search(r"(?<=\n)\r?\n\Z", head)
        after = (head[: gap.start()] if gap else head) + before[found.end() :]
        if not after.strip(textfiles.BOM + "\r\n"):
            # Nothing else is in the file: setup has made it.
            after = None
    steps = ("Your own lines in this file start midfill: remove them yourself.",)
    return Plan(Edit(path, before, after), steps if own.search(after or "") else ())


def _marked(comment: str) -> re.Pattern[str]:
    begin, end = re.escape(f"{comment} {BEGIN}"), re.escape(f"{comment} {END}")
    return re.compile(rf"^{begin}.*?^{end}[^\n]*\n?", re.MULTILINE | re.DOTALL)
