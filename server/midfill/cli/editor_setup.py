"""Editors on this machine, and how each of them is told to start midfill.

An editor is a row of `EDITORS`: its programs, the file that configures it, and what belongs there. What is
not ours in such a file stays as it is: our lines stand between two marks, in a file of their own, or are put
in by a parser that keeps comments. Nothing is written before `write`, and what was there is kept beside it.
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

from midfill.errors import MidfillError
from midfill.system import text_files as textfiles
from midfill.system.programs import find_program

_BEGIN, _END = ">>> midfill >>>", "<<< midfill <<<"

# Of Helix's own table: a list in the user's file takes the place of the whole list, so it names these too.
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
    """A file as it is (None: it is not there) and as it is to be."""

    path: Path
    before: str | None
    after: str

    @property
    def diff(self) -> str:
        """The change in unified form; "" if there is none."""
        old = [] if self.before is None else self.before.splitlines(keepends=True)
        new = self.after.splitlines(keepends=True)
        name = str(self.path)
        lines = difflib.unified_diff(old, new, "/dev/null" if self.before is None else name, name)
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for an editor.

    Attributes:
        edit: of its configuration; None where that is the user's own to write.
        steps: what is to be done by hand, or what to know; sentences.
        shown: the configuration itself where nothing is edited.
    """

    edit: Edit | None = None
    steps: tuple[str, ...] = ()
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Home:
    """Where configurations are, and what is to be started.

    Attributes:
        command: starts this installation, by absolute paths.
        clients: the folder of the plugins for editors.
    """

    command: tuple[str, ...]
    clients: Path
    home: Path = field(default_factory=Path.home)

    @property
    def config(self) -> Path:
        """The folder of configurations."""
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or self.home / "AppData" / "Local")
        return Path(os.environ.get("XDG_CONFIG_HOME") or self.home / ".config")

    @property
    def applications(self) -> Path:
        """The folder where programs with windows keep theirs."""
        if sys.platform == "win32":
            return Path(os.environ.get("APPDATA") or self.home / "AppData" / "Roaming")
        if sys.platform == "darwin":
            return self.home / "Library" / "Application Support"
        return self.config


@dataclass(frozen=True, slots=True)
class Editor:
    """An editor that may be set up.

    Attributes:
        name: as in `midfill setup NAME`.
        title: its name for people.
        programs: one of them on the PATH means that it is installed.
        plan: what is to be done.
    """

    name: str
    title: str
    programs: tuple[str, ...]
    plan: Callable[[Home], Plan]

    @property
    def found(self) -> str | None:
        """The path of its program; None if it is not installed."""
        return next((path for program in self.programs if (path := find_program(program))), None)


def here() -> Home:
    """What is installed here, for the user who runs it."""
    script = Path(sysconfig.get_path("scripts")) / ("midfill.exe" if sys.platform == "win32" else "midfill")
    command = (str(script),) if script.exists() else (sys.executable, "-P", "-m", "midfill")
    package = Path(__file__).parent
    # In a wheel they lie in the package; in a working copy, where they are edited.
    clients = next(
        (path for path in (package / "clients", package.parents[1] / "clients") if path.is_dir()),
        package / "clients",
    )
    return Home((*command, "serve"), clients)


def find(name: str) -> Editor:
    """The editor of that name or program. Raises `MidfillError` if there is none."""
    for editor in EDITORS:
        if name.lower() in {editor.name, *editor.programs}:
            return editor
    known = ", ".join(editor.name for editor in EDITORS)
    raise MidfillError(f"Unknown editor {name!r}; known are: {known}. Others start: midfill serve")


def write(edit: Edit) -> Path | None:
    """Put an edit on the disk, whole or not at all. Returns where the file that was there is kept.

    Raises `MidfillError` if the file is not as it was, or cannot be written.
    """
    # Who keeps dotfiles elsewhere has links here; they stay.
    path = edit.path.resolve()
    if _read(path) != edit.before:
        raise MidfillError(f"{edit.path} has changed meanwhile: run the command again.")
    backup = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if edit.before is not None:
            backup = _unused(edit.path)
            shutil.copy2(path, backup)
        textfiles.replace(path, edit.after)
    except OSError as error:
        raise MidfillError(f"Cannot write {edit.path} ({error.strerror}).") from error
    return backup


def _unused(path: Path) -> Path:
    backup = path.with_name(path.name + ".before-midfill")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.before-midfill-{number}")
    return backup


def _read(path: Path) -> str | None:
    """A file's text, line ends and byte order mark as they are; None if there is no such file."""
    try:
        data = path.read_bytes()
        text = textfiles.decode(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MidfillError(f"Cannot read {path} ({error.strerror}).") from error
    except UnicodeError as error:
        raise MidfillError(f"Cannot read {path}: {error}") from error
    return textfiles.BOM + text if data.startswith(codecs.BOM_UTF8) else text


def _with_block(path: Path, comment: str, lines: str, own: re.Pattern[str]) -> Plan:
    """Lines of ours at the end of a user's file, between marks; those of an earlier run are replaced.

    `own` finds lines by which the user has set it up already.
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
        return Plan(Edit(path, before, text), ("Your own lines set it up.",))
    else:
        gap = "" if not text else ending if text.endswith("\n") else 2 * ending
        after = text + gap + block
    return Plan(Edit(path, before, after))


def _quoted(text: str) -> str:
    """A string of Lua, Emacs Lisp or JSON."""
    return json.dumps(text, ensure_ascii=False)


def _neovim(home: Home) -> Plan:
    folder = home.config / "nvim"
    path = folder / "plugin" / "midfill.lua"
    before = _read(path)
    for init in (folder / "init.lua", folder / "init.vim"):
        if before is None and re.search(r"require\W+midfill\W", _read(init) or ""):
            return Plan(Edit(path, "", ""), (f"Your own lines in {init} set it up.",))
    command = ", ".join(map(_quoted, home.command))
    after = (
        "-- Written by: midfill setup neovim\n"
        f"vim.opt.runtimepath:append({_quoted(str(home.clients / 'neovim'))})\n"
        f'require("midfill").setup({{ cmd = {{ {command} }} }})\n'
    )
    return Plan(
        Edit(path, before, after),
        ("<Tab> accepts, <C-Right> a word, <M-Right> a line. :checkhealth midfill looks at it all.",),
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
    return Plan(plan.edit, (*plan.steps, "<Tab> accepts, <C-Right> a word, <M-Right> a line: :help midfill"))


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
    return Plan(plan.edit, (*plan.steps, "TAB accepts, C-<right> a word, M-<right> a line."))


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
        raise MidfillError(f"{path} is not the TOML that Helix reads ({error}): mend it first.") from error
    steps = (
        "Helix shows popup items; it has no ghost text.",
        f"For {', '.join(_HELIX_SERVERS)}; add it to `language-servers` of others yourself.",
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
            raise MidfillError(f"{path} is not the JSON that VS Code reads: mend it first.")
        steps = (
            "The extension is in clients/vscode of midfill's repository: `npm ci && npm run package`, "
            "then `code --install-extension midfill.vsix`.",
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
    """JSON with comments: the same with blanks where comments are."""
    pattern = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(lambda match: match.group(1) or re.sub(r"[^\n]", " ", match.group()), text)


def _sublime(home: Home) -> Plan:
    client = {"command": list(home.command), "enabled": True, "selector": "source"}
    shown = json.dumps({"clients": {"midfill": client}}, indent=2)
    return Plan(
        None,
        ("With the package LSP: this goes into Preferences > Package Settings > LSP > Settings.",),
        shown,
    )


def _kate(home: Home) -> Plan:
    server = {
        "command": list(home.command),
        "rootIndicationFileNames": [".git"],
        "highlightingModeRegex": ".*",
        # Else Kate calls every file by the name of this entry, and not by its language.
        "documentLanguageId": False,
    }
    shown = json.dumps({"servers": {"python": server}}, indent=2)
    return Plan(
        None,
        (
            "Put this into Settings > Configure Kate > LSP Client > User Server Settings. Popup items. "
            "Kate runs one server for a language: it takes the place of the language's own.",
        ),
        shown,
    )


def _zed(_: Home) -> Plan:
    return Plan(None, ("Zed starts servers that an extension of it brings, and there is none for midfill.",))


def _jetbrains(home: Home) -> Plan:
    return Plan(
        None,
        ("With the plugin LSP4IJ: Settings > Languages & Frameworks > Language Servers > +.",),
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
