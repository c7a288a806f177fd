"""`midfill setup helix`: golden files in `helix`, and what the real `hx --health` of 25.07.1 prints.

`NAME.before.toml` is the user's file, `NAME.after.toml` what setup makes of it, and `NAME.undone.toml` what
undoing makes of that, where it is not the first again.
"""

import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from midfill.cli import editor_files, editor_helix
from midfill.cli.editor_files import Home
from midfill.errors import MidfillError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in of Helix is a shell script")

FOLDER = Path(__file__).parent / "helix"
CASES = sorted(path.name.removesuffix(".before.toml") for path in FOLDER.glob("*.before.toml"))


def fake_helix(folder):
    """A program that says of three languages what the real one says."""
    program = folder / "hx"
    program.write_text(f"#!/bin/sh\nexec {shutil.which('cat')} '{FOLDER}/health-'\"$2\".txt 2>/dev/null\n")
    program.chmod(0o755)
    return str(program)


def home_with(folder, case, monkeypatch=None):
    """A home whose `languages.toml` is that of a case; without one if that is empty."""
    path = folder / ".config" / "helix" / "languages.toml"
    path.parent.mkdir(parents=True)
    before = (FOLDER / f"{case}.before.toml").read_bytes()
    if before:
        path.write_bytes(before)
    return Home(("/opt/midfill/bin/midfill", "serve"), folder / "clients", folder)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return lambda case: home_with(tmp_path, case)


def golden(case, kind):
    return (FOLDER / f"{case}.{kind}.toml").read_bytes().decode()


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_and_what_is_left_when_it_is_undone(home, tmp_path, case):
    there = home(case)
    edit = editor_helix.plan(there, fake_helix(tmp_path)).edit
    assert edit.after == golden(case, "after")
    tomllib.loads(edit.after)
    editor_files.write(edit)
    again = editor_helix.plan(there, fake_helix(tmp_path)).edit
    assert again.diff == ""
    undone = editor_helix.undo(there).edit
    assert (undone.after or "") == golden(case, "undone")
    editor_files.write(undone)
    assert editor_helix.undo(there).edit.diff == ""
    # A file that setup has made goes; one of the user's stays.
    assert edit.path.exists() == bool(golden(case, "before"))


def test_undoing_gives_the_users_file_back():
    """But for one that an earlier version wrote, without marks: its lists of servers stay."""
    same = {case for case in CASES if golden(case, "undone") == golden(case, "before")}
    assert set(CASES) - same == {"unmarked"}


@pytest.mark.parametrize(
    ("language", "servers"),
    [
        ("python", ["ty", "ruff", "jedi", "pylsp", "zuban"]),
        ("ruby", ["ruby-lsp", "solargraph"]),
        ("rust", ["rust-analyzer"]),
    ],
)
def test_the_servers_are_those_of_the_installed_helix(tmp_path, language, servers):
    assert editor_helix.servers_of(fake_helix(tmp_path), language) == servers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Language 'x' not found\n",
        "Configured language servers: None\nConfigured debug adapter: None\n  ✓ /usr/bin/lldb: x\n",
        "Configured language server: pylsp\nBinary for language server: /usr/bin/pylsp\n",
        "\x1b[31mConfigured language servers:\n",
    ],
)
def test_what_cannot_be_read_names_no_server(text):
    assert editor_helix.read_health(text) == []


def test_a_list_that_has_midfill_already_names_it_once():
    text = (
        "Configured language servers:\n  ✓ pylsp: /bin/pylsp\n  ✘ midfill: 'm' not found\nConfigured x: y\n"
    )
    assert editor_helix.read_health(text) == ["pylsp"]


@pytest.mark.parametrize("program", [None, "/nowhere/hx"])
def test_without_a_helix_that_answers_the_servers_are_those_of_25_07(home, program):
    values = tomllib.loads(editor_helix.plan(home("none"), program).edit.after)
    lists = {one["name"]: one["language-servers"] for one in values["language"]}
    assert lists == {name: [*own, "midfill"] for name, own in editor_helix.DEFAULT_SERVERS.items()}


def test_lines_that_a_user_has_put_into_the_block_stay(home, tmp_path):
    there = home("none")
    edit = editor_helix.plan(there, None).edit
    own = edit.after.replace('name = "go"\n', 'name = "go"\nauto-format = false\n')
    edit.path.write_text(own)
    assert editor_helix.plan(there, None).edit.diff == ""
    undone = tomllib.loads(editor_helix.undo(there).edit.after)
    (entry,) = [one for one in undone["language"] if "auto-format" in one]
    assert entry["name"] == "go"
    assert "midfill" not in str(undone)


def test_a_form_that_cannot_be_changed_is_said_and_stays(home):
    there = home("none")
    path = there.config / "helix" / "languages.toml"
    path.write_text('language = [{name = "python"}]\n')
    with pytest.raises(MidfillError, match=rf"{path}.*Edit its `language-servers` yourself"):
        editor_helix.plan(there, None)
