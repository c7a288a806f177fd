"""The configuration files by which each editor starts midfill.

Each editor is a row of `EDITORS`: its programs, its configuration file and the lines to add. The user's own
lines never change: ours stand between two marks, in a separate file, or are inserted by a parser that keeps
comments. Only `write` writes, and it keeps a backup beside the file.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import midfill
from midfill.errors import MidfillError
from midfill.system import text_files as textfiles
from midfill.system.file_errors import why_unreadable, why_unwritable
from midfill.system.programs import find_program

_BEGIN, _END = ">>> midfill >>>", "<<< midfill <<<"

# From Helix's default table: a list in the user's file replaces the whole list, so it has to name these too.
_HELIX_SERVERS = {
    "python": ["pylsp"],
    "javascript": ["typescript-language-server"],
    "typescript": ["typescript-language-server"],
    "rust": ["rust-analyzer"],
    "go": ["gopls"],
    "c": ["clangd"],
    "cpp": ["clangd"],
    "java": ["jdtls"],
    "ruby": ["solargraph"],
    "bash": ["bash-language-server"],
}


@dataclass(frozen=True, slots=True)
class Edit:
    """A file's text before (None: there is no file) and after the change."""

    path: Path
    before: str | None
    after: str

    @property
    def diff(self) -> str:
        """Return the change as a unified diff; "" if there is none."""
        old = [] if self.before is None else self.before.splitlines(keepends=True)
        new = self.after.splitlines(keepends=True)
        name = str(self.path)
        lines = difflib.unified_diff(old, new, "/dev/null" if self.before is None else name, name)
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


@dataclass(frozen=True, slots=True)
class Editor:
    """An editor that midfill can set up.

    Attributes:
        name: as in `midfill setup NAME`.
        title: its name for people.
        programs: it is installed if one of these is on the PATH.
        plan: returns what to change for the given folders.
    """

    name: str
    title: str
    programs: tuple[str, ...]
    plan: Callable[[Home], Plan]

    @property
    def found(self) -> str | None:
        """Return the path of its program; None if it is not installed."""
        return next((path for program in self.programs if (path := find_program(program))), None)


def here() -> Home:
    """Return the folders of the current user, and the command of this installation."""
    script = Path(sysconfig.get_path("scripts")) / ("midfill.exe" if sys.platform == "win32" else "midfill")
    command = (str(script),) if script.exists() else (sys.executable, "-P", "-m", "midfill")
    package = Path(midfill.__file__).parent
    # A wheel has the plugins inside the package; a working copy at the top of the repository.
    clients = next(
        (path for path in (package / "clients", package.parents[1] / "clients") if path.is_dir()),
        package / "clients",
    )
    return Home((*command, "serve"), clients)


def find(name: str) -> Editor:
    """Return the editor with this name or program. Raises `MidfillError` if there is none."""
    for editor in EDITORS:
        if name.lower() in {editor.name, *editor.programs}:
            return editor
    known = ", ".join(editor.name for editor in EDITORS)
    raise MidfillError(
        f"Unknown editor {name!r}. Known editors: {known}. In any other, configure: midfill serve"
    )


def write(edit: Edit) -> Path | None:
    """Write an edit atomically. Return the path of the backup; None if there was no file.

    Raises `MidfillError` if the file has changed since the edit was planned, or cannot be written.
    """
    # Dotfiles are often symbolic links, which must stay.
    path = edit.path.resolve()
    if _read(path) != edit.before:
        raise MidfillError(f"{edit.path} has changed in the meantime. Run the command again.")
    backup = None
    try:
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


def _read(path: Path) -> str | None:
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


def _with_block(path: Path, comment: str, lines: str, own: re.Pattern[str]) -> Plan:
    """Return the plan to put lines between marks at the end of a file, or to replace those of an earlier run.

    Args:
        path: the user's file.
        comment: starts a comment line in it.
        lines: what to add.
        own: matches lines with which the user has set up midfill already; nothing is added then.
    """
    before = _read(path)
    text = before or ""
    block = f"{comment} {_BEGIN} (written by: midfill setup)\n{lines}{comment} {_END}\n"
    ending = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", ending)
    marked = re.compile(
        rf"^{re.escape(comment)} {re.escape(_BEGIN)}.*?^{re.escape(comment)} {re.escape(_END)}[^\n]*\n?",
        re.MULTILINE | re.DOTALL,
    )
    if found := marked.search(text):
        after = text[: found.start()] + block + text[found.end() :]
    elif own.search(text):
        return Plan(Edit(path, before, text), ("Your own lines in this file already set up midfill.",))
    else:
        gap = "" if not text else ending if text.endswith("\n") else 2 * ending
        after = text + gap + block
    return Plan(Edit(path, before, after))


def _quoted(text: str) -> str:
    """Return the text as a string literal of Lua, Emacs Lisp or JSON."""
    return json.dumps(text, ensure_ascii=False)


def _neovim(home: Home) -> Plan:
    folder = home.config / "nvim"
    path = folder / "plugin" / "midfill.lua"
    before = _read(path)
    for init in (folder / "init.lua", folder / "init.vim"):
        if before is None and re.search(r"require\W+midfill\W", _read(init) or ""):
            return Plan(Edit(path, "", ""), (f"Your own lines in {init} already set up midfill.",))
    command = ", ".join(map(_quoted, home.command))
    after = (
        "-- Written by: midfill setup neovim\n"
        f"vim.opt.runtimepath:append({_quoted(str(home.clients / 'neovim'))})\n"
        f'require("midfill").setup({{ cmd = {{ {command} }} }})\n'
    )
    return Plan(
        Edit(path, before, after),
        ("<Tab> accepts, <C-Right> accepts a word, <M-Right> a line. To check it: :checkhealth midfill",),
    )


def _vim(home: Home) -> Plan:
    candidates = (home.home / ".vimrc", home.home / ".vim" / "vimrc", home.config / "vim" / "vimrc")
    path = next((path for path in candidates if path.exists()), candidates[0])

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    runtime = quoted(str(home.clients / "vim"))
    command = ", ".join(map(quoted, home.command))
    lines = (
        f"let &runtimepath = {runtime} .. ',' .. &runtimepath\n"
        f"let g:midfill_command = [{command}]\n"
        "filetype plugin on\n"
    )
    plan = _with_block(
        path, '"', lines, re.compile(r"^[^\"\n]*clients/vim\b|^[^\"\n]*g:midfill_", re.MULTILINE)
    )
    return Plan(
        plan.edit,
        (*plan.steps, "<Tab> accepts, <C-Right> accepts a word, <M-Right> a line. More: :help midfill"),
    )


def _emacs(home: Home) -> Plan:
    candidates = (
        home.home / ".emacs",
        home.home / ".emacs.el",
        home.home / ".emacs.d" / "init.el",
        home.config / "emacs" / "init.el",
    )
    path = next((path for path in candidates if path.exists()), candidates[2])
    command = " ".join(map(_quoted, home.command))
    lines = (
        f"(add-to-list 'load-path {_quoted(str(home.clients / 'emacs'))})\n"
        "(require 'midfill)\n"
        f"(setq midfill-command '({command}))\n"
        "(global-midfill-mode)\n"
    )
    plan = _with_block(path, ";;", lines, re.compile(r"^[^;\n]*global-midfill-mode", re.MULTILINE))
    return Plan(plan.edit, (*plan.steps, "TAB accepts, C-<right> accepts a word, M-<right> a line."))


def _helix(home: Home) -> Plan:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = home.config / "helix" / "languages.toml"
    before = _read(path)
    try:
        mark = textfiles.BOM if (before or "").startswith(textfiles.BOM) else ""
        document: Any = tomlkit.parse((before or "").removeprefix(mark))
        program, *arguments = home.command
        servers = document.setdefault("language-server", tomlkit.table(is_super_table=True))
        wanted = {"command": program, "args": arguments}
        if dict(servers.get("midfill", {})) != wanted:
            servers["midfill"] = wanted
        if "language" not in document:
            document["language"] = tomlkit.aot()
        languages = document["language"]
        for name, defaults in _HELIX_SERVERS.items():
            entry = next((one for one in languages if one.get("name") == name), None)
            if entry is None:
                entry = tomlkit.table()
                entry["name"] = name
                languages.append(entry)
                entry = languages[-1]
            names = entry.setdefault("language-servers", list(defaults))
            if "midfill" not in [one.get("name") if isinstance(one, dict) else one for one in names]:
                names.append("midfill")
        after = mark + tomlkit.dumps(document)
    except (TOMLKitError, TypeError, AttributeError, ValueError) as error:
        raise MidfillError(f"{path} is not valid TOML for Helix ({error}). Correct it first.") from error
    steps = (
        "Helix shows suggestions in its popup; it has no ghost text.",
        f"Set up for {', '.join(_HELIX_SERVERS)}. For other languages, add it to their `language-servers`.",
    )
    return Plan(Edit(path, before, after), steps)


def _code(folder: str) -> Callable[[Home], Plan]:
    def plan(home: Home) -> Plan:
        path = home.applications / folder / "User" / "settings.json"
        before = _read(path)
        text = before if before and before.strip().strip(textfiles.BOM) else "{\n}\n"
        command = json.dumps(list(home.command[:-1]))
        code = _code_of(text)
        start = code.find("{")
        if start < 0:
            raise MidfillError(f"{path} is not valid JSON for VS Code. Correct it first.")
        steps = (
            "To install the extension, run in clients/vscode of midfill's repository: `npm ci && "
            "npm run package`, then `code --install-extension midfill.vsix`.",
        )
        if found := re.search(r'"midfill\.server\.command"\s*:\s*(\[[^\]]*\])', code):
            after = text[: found.start(1)] + command + text[found.end(1) :]
        else:
            comma = "" if code[start + 1 :].lstrip().startswith("}") else ","
            ending = "\r\n" if "\r\n" in text else "\n"
            line = f'{ending}    "midfill.server.command": {command}{comma}'
            after = text[: start + 1] + line + text[start + 1 :]
        return Plan(Edit(path, before, after), steps)

    return plan


def _code_of(text: str) -> str:
    """Return JSON with comments, with spaces in place of the comments."""
    pattern = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(lambda match: match.group(1) or re.sub(r"[^\n]", " ", match.group()), text)


def _sublime(home: Home) -> Plan:
    client = {"command": list(home.command), "enabled": True, "selector": "source"}
    shown = json.dumps({"clients": {"midfill": client}}, indent=2)
    return Plan(
        None,
        ("Install the package LSP. Put this into Preferences > Package Settings > LSP > Settings.",),
        shown,
    )


def _kate(home: Home) -> Plan:
    server = {
        "command": list(home.command),
        "rootIndicationFileNames": [".git"],
        "highlightingModeRegex": ".*",
        # Without it Kate sends the name of this entry as the language of every file.
        "documentLanguageId": False,
    }
    shown = json.dumps({"servers": {"python": server}}, indent=2)
    return Plan(
        None,
        (
            "Put this into Settings > Configure Kate > LSP Client > User Server Settings. Kate shows "
            "suggestions in its popup. It runs one server per language: midfill replaces the language's own.",
        ),
        shown,
    )


def _zed(_: Home) -> Plan:
    return Plan(
        None,
        ("Not supported: Zed starts servers from extensions only, and there is none for midfill.",),
    )


def _jetbrains(home: Home) -> Plan:
    return Plan(
        None,
        (
            "Install the plugin LSP4IJ. Add this command in Settings > Languages & Frameworks > Language "
            "Servers > +.",
        ),
        " ".join(home.command),
    )


EDITORS = (
    Editor("vscode", "VS Code", ("code",), _code("Code")),
    Editor("vscode-insiders", "VS Code Insiders", ("code-insiders",), _code("Code - Insiders")),
    Editor("vscodium", "VSCodium", ("codium",), _code("VSCodium")),
    Editor("neovim", "Neovim", ("nvim",), _neovim),
    Editor("vim", "Vim", ("vim",), _vim),
    Editor("emacs", "Emacs", ("emacs",), _emacs),
    Editor("helix", "Helix", ("hx", "helix"), _helix),
    Editor("sublime", "Sublime Text", ("subl",), _sublime),
    Editor("kate", "Kate", ("kate",), _kate),
    Editor("zed", "Zed", ("zed", "zeditor"), _zed),
    Editor("jetbrains", "JetBrains IDEs", ("idea", "pycharm", "webstorm", "goland", "clion"), _jetbrains),
)
