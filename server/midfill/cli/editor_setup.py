"""The configuration files by which each editor starts midfill.

Each editor is a row of `EDITORS`: its programs, its configuration file, the lines to add, and how to take
them out again. The user's own lines never change: ours stand between two marks, in a separate file, or are
inserted by a parser that keeps comments. Nothing is written here (`editor_files.write`).
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import midfill
from midfill.cli import editor_helix
from midfill.cli.editor_files import Edit, Home, Plan, read, with_block, without_block
from midfill.errors import MidfillError
from midfill.system import text_files as textfiles
from midfill.system.programs import find_program

_HELIX = ("hx", "helix")
_NEOVIM_LINE = "-- Written by: midfill setup neovim"
# Lines of the user's with which midfill is set up already.
_VIM_LINES = re.compile(r"^[^\"\n]*clients/vim\b|^[^\"\n]*g:midfill_", re.MULTILINE)
_EMACS_LINES = re.compile(r"^[^;\n]*global-midfill-mode", re.MULTILINE)
_CODE_SETTING = re.compile(r'"midfill\.server\.command"\s*:\s*(\[[^\]]*\])')


@dataclass(frozen=True, slots=True)
class Editor:
    """An editor that midfill can set up.

    Attributes:
        name: as in `midfill setup NAME`.
        title: its name for people.
        programs: it is installed if one of these is on the PATH.
        plan: returns what to change for the given folders.
        undo: returns how to take that back; None if midfill writes nothing for this editor.
    """

    name: str
    title: str
    programs: tuple[str, ...]
    plan: Callable[[Home], Plan]
    undo: Callable[[Home], Plan] | None = None

    @property
    def found(self) -> str | None:
        """Return the path of its program; None if it is not installed."""
        return _first(*self.programs)


def _first(*programs: str) -> str | None:
    """Return the path of the first of these programs that is on the PATH; None if none is."""
    return next((path for program in programs if (path := find_program(program))), None)


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


def _quoted(text: str) -> str:
    """Return the text as a string literal of Lua, Emacs Lisp or JSON."""
    return json.dumps(text, ensure_ascii=False)


def _neovim_file(home: Home) -> Path:
    return home.config / "nvim" / "plugin" / "midfill.lua"


def _neovim(home: Home) -> Plan:
    folder = home.config / "nvim"
    path = _neovim_file(home)
    before = read(path)
    for init in (folder / "init.lua", folder / "init.vim"):
        if before is None and re.search(r"require\W+midfill\W", read(init) or ""):
            return Plan(Edit(path, "", ""), (f"Your own lines in {init} already set up midfill.",))
    command = ", ".join(map(_quoted, home.command))
    after = (
        f"{_NEOVIM_LINE}\n"
        f"vim.opt.runtimepath:append({_quoted(str(home.clients / 'neovim'))})\n"
        f'require("midfill").setup({{ cmd = {{ {command} }} }})\n'
    )
    return Plan(
        Edit(path, before, after),
        ("<Tab> accepts, <C-Right> accepts a word, <M-Right> a line. To check it: :checkhealth midfill",),
    )


def _undo_neovim(home: Home) -> Plan:
    path = _neovim_file(home)
    before = read(path)
    if before is None or before.startswith(_NEOVIM_LINE):
        return Plan(Edit(path, before, None))
    return Plan(Edit(path, before, before), ("This file is your own: remove it yourself.",))


def _vimrc(home: Home) -> Path:
    candidates = (home.home / ".vimrc", home.home / ".vim" / "vimrc", home.config / "vim" / "vimrc")
    return next((path for path in candidates if path.exists()), candidates[0])


def _vim(home: Home) -> Plan:
    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    runtime = quoted(str(home.clients / "vim"))
    command = ", ".join(map(quoted, home.command))
    lines = (
        f"let &runtimepath = {runtime} .. ',' .. &runtimepath\n"
        f"let g:midfill_command = [{command}]\n"
        "filetype plugin on\n"
    )
    plan = with_block(_vimrc(home), '"', lines, _VIM_LINES)
    return Plan(
        plan.edit,
        (*plan.steps, "<Tab> accepts, <C-Right> accepts a word, <M-Right> a line. More: :help midfill"),
    )


def _undo_vim(home: Home) -> Plan:
    return without_block(_vimrc(home), '"', _VIM_LINES)


def _init_el(home: Home) -> Path:
    candidates = (
        home.home / ".emacs",
        home.home / ".emacs.el",
        home.home / ".emacs.d" / "init.el",
        home.config / "emacs" / "init.el",
    )
    return next((path for path in candidates if path.exists()), candidates[2])


def _emacs(home: Home) -> Plan:
    command = " ".join(map(_quoted, home.command))
    lines = (
        f"(add-to-list 'load-path {_quoted(str(home.clients / 'emacs'))})\n"
        "(require 'midfill)\n"
        f"(setq midfill-command '({command}))\n"
        "(global-midfill-mode)\n"
    )
    plan = with_block(_init_el(home), ";;", lines, _EMACS_LINES)
    return Plan(plan.edit, (*plan.steps, "TAB accepts, C-<right> accepts a word, M-<right> a line."))


def _undo_emacs(home: Home) -> Plan:
    return without_block(_init_el(home), ";;", _EMACS_LINES)


def _helix(home: Home) -> Plan:
    return editor_helix.plan(home, _first(*_HELIX))


def _code(folder: str) -> Callable[[Home], Plan]:
    def plan(home: Home) -> Plan:
        path = _code_file(home, folder)
        before = read(path)
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
        if found := _CODE_SETTING.search(code):
            after = text[: found.start(1)] + command + text[found.end(1) :]
        else:
            comma = "" if code[start + 1 :].lstrip().startswith("}") else ","
            ending = "\r\n" if "\r\n" in text else "\n"
            line = f'{ending}    "midfill.server.command": {command}{comma}'
            after = text[: start + 1] + line + text[start + 1 :]
        return Plan(Edit(path, before, after), steps)

    return plan


def _code_file(home: Home, folder: str) -> Path:
    return home.applications / folder / "User" / "settings.json"


def _undo_code(folder: str) -> Callable[[Home], Plan]:
    def undo(home: Home) -> Plan:
        path = _code_file(home, folder)
        before = after = read(path)
        if before is not None and (found := _CODE_SETTING.search(_code_of(before))):
            start, end = found.span()
            # With its comma, and its line, if nothing else is on that.
            end += len(re.match(r"[ \t]*,?", before[end:])[0])  # type: ignore[index] # it always matches
            lead = re.search(r"\r?\n[ \t]*\Z", before[:start])
            if lead and re.match(r"[ \t]*(\r?\n|\Z)", before[end:]):
                start = lead.start()
            after = before[:start] + before[end:]
        return Plan(Edit(path, before, after))

    return undo


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
    Editor("vscode", "VS Code", ("code",), _code("Code"), _undo_code("Code")),
    Editor(
        "vscode-insiders",
        "VS Code Insiders",
        ("code-insiders",),
        _code("Code - Insiders"),
        _undo_code("Code - Insiders"),
    ),
    Editor("vscodium", "VSCodium", ("codium",), _code("VSCodium"), _undo_code("VSCodium")),
    Editor("neovim", "Neovim", ("nvim",), _neovim, _undo_neovim),
    Editor("vim", "Vim", ("vim",), _vim, _undo_vim),
    Editor("emacs", "Emacs", ("emacs",), _emacs, _undo_emacs),
    Editor("helix", "Helix", _HELIX, _helix, editor_helix.undo),
    Editor("sublime", "Sublime Text", ("subl",), _sublime),
    Editor("kate", "Kate", ("kate",), _kate),
    Editor("zed", "Zed", ("zed", "zeditor"), _zed),
    Editor("jetbrains", "JetBrains IDEs", ("idea", "pycharm", "webstorm", "goland", "clion"), _jetbrains),
)
