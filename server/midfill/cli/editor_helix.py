"""Set up Helix: add midfill to the language servers that the installed Helix uses, or take it out again.

A list in the user's `languages.toml` replaces Helix's own list of a language, so what is written names the
servers of both. They are read from `hx --health`; without an installed Helix they are those of 25.07. Every
change is compared with what it should mean before it is shown.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from midfill.cli.editor_files import BEGIN, END, Edit, Home, Plan, read
from midfill.errors import MidfillError
from midfill.system import text_files as textfiles

# Helix's own servers, as `hx --health LANGUAGE` of 25.07.1 prints them with an empty configuration.
DEFAULT_SERVERS = {
    "python": ["ty", "ruff", "jedi", "pylsp", "zuban"],
    "javascript": ["typescript-language-server"],
    "typescript": ["typescript-language-server"],
    "tsx": ["typescript-language-server"],
    "jsx": ["typescript-language-server"],
    "rust": ["rust-analyzer"],
    "go": ["gopls", "golangci-lint-lsp"],
    "c": ["clangd"],
    "cpp": ["clangd"],
    "java": ["jdtls"],
    "ruby": ["ruby-lsp", "solargraph"],
    "bash": ["bash-language-server"],
}
# After a line that was added to an entry of the user's.
_MARK = "# added by: midfill setup"
_HEALTH_S = 10

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SERVERS = re.compile(r"^Configured language servers:[^\n]*\n((?:[ \t]+\S+[^\n]*\n?)*)", re.MULTILINE)
_SERVER = re.compile(r"^[ \t]+\S[ \t]+([\w.+-]+):[ \t]", re.MULTILINE)
_BLOCK = re.compile(rf"(?:\r?\n)?^# {BEGIN}[^\n]*\n(.*?)^# {END}[^\n]*\n?", re.MULTILINE | re.DOTALL)
# A line that begins a table.
_HEADER = re.compile(r"^[ \t]*\[\[?([^\[\]\n,]+)\]\]?[ \t\r]*(?:#[^\n]*)?$", re.MULTILINE)
_NAME = re.compile(r"^[^\n]*\n[ \t]*name[ \t]*=[^\n]*\n|^[^\n]*\n")
_REST = re.compile(r"(?:^[ \t\r]*(?:#[^\n]*)?(?:\n|\Z))*\Z", re.MULTILINE)


def plan(home: Home, program: str | None) -> Plan:
    """Return the plan to add midfill to the languages of Helix; `program` is the installed one, if any."""
    path, before, text = _languages_toml(home)
    found = {name: servers_of(program, name) for name in DEFAULT_SERVERS} if program else {}
    defaults = {name: found.get(name) or own for name, own in DEFAULT_SERVERS.items()}
    command = {"command": home.command[0], "args": list(home.command[1:])}
    values = _plain(path, text)
    try:
        expected = _with_midfill(values, command, defaults)
        after = _written(text, values, command, defaults)
    except (AttributeError, TypeError, KeyError) as error:
        raise MidfillError(f"{path} is not a configuration of Helix ({error}). Correct it first.") from error
    source = f"what {program} has" if any(found.values()) else "the list of Helix 25.07"
    steps = (
        "Helix shows suggestions in its popup; it has no ghost text. Items of the last server are on top.",
        f"Set up for {', '.join(DEFAULT_SERVERS)}, after their own servers ({source}). For other "
        "languages, add it to their `language-servers`.",
    )
    return Plan(_edit(path, before, after, lambda values: values == expected), steps)


def undo(home: Home) -> Plan:
    """Return the plan to take midfill out of Helix's languages; all else stays."""
    path, before, text = _languages_toml(home)
    others = _others(_plain(path, text))
    # A block that a user has added to loses its marks only.
    bare = _BLOCK.sub(lambda match: "" if _is_ours(match.group(1)) else "\n" + match.group(1), text)
    lines = bare.splitlines(keepends=True)
    bare = "".join(line for line in lines if not line.rstrip().endswith(_MARK))
    after = "".join(_without_midfill(kind, section) for kind, section in _sections(bare))

    def is_right(values: dict[str, Any]) -> bool:
        return "midfill" not in str(values) and _others(values) == others

    # A file that has nothing else was made by setup.
    return Plan(_edit(path, before, after if after or before == "" else None, is_right))


def servers_of(program: str, language: str) -> list[str]:
    """Return the servers that a Helix uses for a language; [] if it does not say."""
    try:
        # In the root folder: Helix would also read the configuration of a workspace.
        ended = subprocess.run(
            [program, "--health", language],
            cwd=Path(program).anchor,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_HEALTH_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_health(ended.stdout.decode("utf-8", "replace"))


def read_health(text: str) -> list[str]:
    """Return the names of the servers in the output of `hx --health LANGUAGE`, without midfill."""
    found = _SERVERS.search(_COLOUR.sub("", text))
    names = _SERVER.findall(found.group(1)) if found else []
    return [name for name in names if name != "midfill"]


def _languages_toml(home: Home) -> tuple[Path, str | None, str]:
    """Return the path of the user's file, its text (None: there is none), and that without its first mark."""
    path = home.config / "helix" / "languages.toml"
    before = read(path)
    return path, before, (before or "").removeprefix(textfiles.BOM)


def _edit(
    path: Path, before: str | None, after: str | None, is_right: Callable[[dict[str, Any]], bool]
) -> Edit:
    """Return the change, if its values are right. `after` has no byte order mark yet."""
    try:
        safe = is_right(tomllib.loads(after or ""))
    except tomllib.TOMLDecodeError:
        safe = False
    if not safe:
        raise MidfillError(
            f"{path} has a form that cannot be changed safely. Edit its `language-servers` yourself."
        )
    mark = textfiles.BOM if before is not None and before.startswith(textfiles.BOM) else ""
    return Edit(path, before, None if after is None else mark + after)


def _plain(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MidfillError(f"{path} is not valid TOML for Helix ({error}). Correct it first.") from error


def _name(server: Any) -> str:
    """Return the name of an entry of `language-servers`: a string, or a table with a name."""
    name = server.get("name", "") if isinstance(server, dict) else server
    return str(name)


def _entry(languages: Any, name: str) -> tuple[int, Any] | None:
    """Return the entry of a language that decides its servers, and its index; None if there is none."""
    entries = [(index, one) for index, one in enumerate(languages) if one.get("name") == name]
    return next((pair for pair in entries if "language-servers" in pair[1]), entries[0] if entries else None)


# What a change means, in plain values


def _with_midfill(
    values: dict[str, Any], command: dict[str, Any], defaults: dict[str, list[str]]
) -> dict[str, Any]:
    result = copy.deepcopy(values)
    result.setdefault("language-server", {}).setdefault("midfill", {}).update(command)
    languages = result.setdefault("language", [])
    for name, servers in defaults.items():
        if (found := _entry(languages, name)) is None:
            languages.append({"name": name, "language-servers": [*servers, "midfill"]})
            continue
        names = found[1].setdefault("language-servers", list(servers))
        if "midfill" not in map(_name, names):
            names.append("midfill")
    return result


def _others(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values without midfill and without lists of servers: what undoing must not change."""
    result = copy.deepcopy(values)
    result.get("language-server", {}).pop("midfill", None)
    for entry in result.get("language", []):
        entry.pop("language-servers", None)
    result["language"] = [entry for entry in result.get("language", []) if set(entry) != {"name"}]
    return {key: value for key, value in result.items() if value}


# The same changes in the text. tomlkit edits one table at a time: it would reorder those of a whole file.


def _sections(text: str) -> list[tuple[str, str]]:
    """Split a file into its tables, each with its name and all up to the next; the first has no name."""
    headers = list(_HEADER.finditer(text))
    starts = [0, *(one.start() for one in headers), len(text)]
    names = ["", *(re.sub(r"[\s\"']", "", one.group(1)) for one in headers)]
    return [(name, text[starts[i] : starts[i + 1]]) for i, name in enumerate(names)]


def _written(
    text: str, values: dict[str, Any], command: dict[str, Any], defaults: dict[str, list[str]]
) -> str:
    ending = "\r\n" if "\r\n" in text else "\n"
    sections = _sections(text)
    tables = [index for index, (name, _) in enumerate(sections) if name == "language"]
    block = []
    own = values.get("language-server", {}).get("midfill")
    if own is None:
        block.append(
            "[language-server.midfill]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in command.items())
        )
    elif own | command != own:
        sections = [
            (name, _updated(section, command) if name == "language-server.midfill" else section)
            for name, section in sections
        ]
    for language, servers in defaults.items():
        line = f"language-servers = {_toml([*servers, 'midfill'])}"
        found = _entry(values.get("language", []), language)
        if found is None:
            block.append(f'[[language]]\nname = "{language}"\n{line}\n')
            continue
        index, entry = found
        names = entry.get("language-servers")
        if index >= len(tables) or "midfill" in map(_name, names or ()):
            continue
        name, section = sections[tables[index]]
        if names is None:
            head = _NAME.match(section)
            place = head.end() if head else len(section)
            section = f"{section[:place]}{line} {_MARK}{ending}{section[place:]}"
        else:
            section = _appended(section)
        sections[tables[index]] = (name, section)
    after = "".join(section for _, section in sections)
    if block:
        lines = f"# {BEGIN} (written by: midfill setup)\n" + "\n".join(block) + f"# {END}\n"
        gap = "" if not after else ending if after.endswith("\n") else 2 * ending
        after += gap + lines.replace("\n", ending)
    return after


def _updated(section: str, command: dict[str, Any]) -> str:
    """Return the table of midfill with this command; the user's other keys stay."""
    import tomlkit

    document: Any = tomlkit.parse(section)
    document["language-server"]["midfill"].update(command)
    return tomlkit.dumps(document)


def _appended(section: str) -> str:
    """Return the entry of a language with midfill at the end of its list."""
    import tomlkit

    document: Any = tomlkit.parse(section)
    document["language"][0]["language-servers"].append("midfill")
    return tomlkit.dumps(document)


def _without_midfill(kind: str, section: str) -> str:
    """Return a table without midfill: "" for its own, but for the comments that lead to the next one."""
    import tomlkit

    if kind == "language-server.midfill" or kind.startswith("language-server.midfill."):
        rest = _REST.search(section)
        return rest.group() if rest else ""
    if kind != "language" or "midfill" not in section:
        return section
    document: Any = tomlkit.parse(section)
    names = document["language"][0].get("language-servers", [])
    for index in reversed([index for index, one in enumerate(names) if _name(one) == "midfill"]):
        del names[index]
    return tomlkit.dumps(document)


def _is_ours(block: str) -> bool:
    """Return whether a block has nothing but what setup has written."""
    values = tomllib.loads(block)
    return (
        set(values) <= {"language-server", "language"}
        and set(values.get("language-server", {})) <= {"midfill"}
        and all(set(entry) == {"name", "language-servers"} for entry in values.get("language", []))
    )


def _toml(value: str | list[str]) -> str:
    # JSON's strings and lists of strings are TOML's, too.
    return json.dumps(value, ensure_ascii=False)
