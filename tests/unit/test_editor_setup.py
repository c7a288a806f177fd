"""`midfill setup` on real files in a home of its own."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from midfill.cli import editor_files
from midfill.cli import editor_setup as editors
from midfill.cli.main import cli
from midfill.errors import MidfillError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the places of files are those of Linux")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(cli, ["setup", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def report(*arguments):
    found = json.loads(run("--json", *arguments))
    assert Path(found["command"][0]).is_absolute()
    return found["editors"]


FILES = {
    "neovim": ".config/nvim/plugin/midfill.lua",
    "vim": ".vimrc",
    "emacs": ".emacs.d/init.el",
    "helix": ".config/helix/languages.toml",
    "vscode": ".config/Code/User/settings.json",
    "vscodium": ".config/VSCodium/User/settings.json",
}


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_written_unless_asked_for(home, name):
    output = run(name)
    assert "+++" in output
    assert f"midfill setup {name} --write" in output
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_shown_and_a_second_run_has_nothing_to_do(home, name):
    [done] = report(name, "--write")
    path = home / FILES[name]
    assert (done["status"], done["file"], done["backup"]) == ("written", str(path), None)
    added = [line[1:] for line in done["diff"].splitlines() if line.startswith("+") and line[:3] != "+++"]
    assert "\n".join(added) == path.read_text().rstrip("\n")
    assert editors.here().command[0] in path.read_text()
    before = path.read_text()
    [again] = report(name, "--write")
    assert again["status"] == "ready"
    assert path.read_text() == before
    assert "already set up" in run(name)


@pytest.mark.parametrize("name", FILES)
def test_what_was_written_is_shown_and_taken_back(home, name):
    path = home / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    theirs = {"vim": "set number\r\n", "emacs": ";; mine\n", "helix": "# mine\n"}.get(name)
    theirs = '{\n  "editor.tabSize": 4\n}\n' if path.suffix == ".json" else theirs
    if theirs is not None:
        path.write_bytes(theirs.encode())
    report(name, "--write")
    written = path.read_bytes()
    output = run(name, "--undo")
    assert "---" in output
    assert f"midfill setup {name} --undo --write" in output
    assert path.read_bytes() == written
    [done] = report(name, "--undo", "--write")
    assert done["status"] == "written"
    if theirs is None:
        # The whole file was ours.
        assert not path.exists()
    else:
        assert path.read_bytes().decode() == theirs
    [again] = report(name, "--undo", "--write")
    assert again["status"] == "ready"
    assert "Nothing of midfill's setup is in it." in run(name, "--undo")


@pytest.mark.parametrize(
    ("theirs", "left"),
    [
        ('{"midfill.server.command": ["x"], "a": 1}', '{ "a": 1}'),
        ('{\n  "a": 1,\n  "midfill.server.command": [\n    "x"\n  ]\n}\n', '{\n  "a": 1,\n}\n'),
        ('{\n  // "midfill.server.command": ["x"],\n}\n', '{\n  // "midfill.server.command": ["x"],\n}\n'),
    ],
)
def test_vs_codes_setting_is_taken_out_wherever_it_stands(home, theirs, left):
    path = home / FILES["vscode"]
    path.parent.mkdir(parents=True)
    path.write_text(theirs)
    report("vscode", "--undo", "--write")
    assert path.read_text() == left


@pytest.mark.parametrize("name", ["vim", "emacs", "neovim"])
def test_lines_of_the_users_own_are_not_taken_out(home, name):
    path = home / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {"vim": "let g:midfill_x = 1\n", "emacs": "(global-midfill-mode)\n", "neovim": "-- mine\n"}[name]
    path.write_text(own)
    [done] = report(name, "--undo", "--write")
    assert (done["status"], path.read_text()) == ("ready", own)
    assert "remove" in done["steps"][0]


@pytest.mark.parametrize("name", ["sublime", "kate", "zed", "jetbrains"])
def test_what_was_put_in_by_hand_is_taken_out_by_hand(home, name):
    assert "by hand" in run(name, "--undo", "--write")


def test_the_plugins_are_found():
    clients = editors.here().clients
    assert {"emacs", "neovim", "vim"} <= {folder.name for folder in clients.iterdir()}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vim", "set number\nlet g:x = 1"),
        ("vim", "set number\r\nlet g:x = 1\r\n"),
        ("emacs", ";; mine\n(setq x 1)\n"),
    ],
)
def test_the_users_own_lines_stay(home, name, theirs):
    path = home / FILES[name]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(theirs.encode())
    path.chmod(0o600)
    [done] = report(name, "--write")
    text = path.read_bytes().decode()
    assert text.startswith(theirs)
    assert ("\r\n" in text) == ("\r\n" in theirs)
    assert text.count("\n") == text.count("\r\n") or "\r" not in text
    assert Path(done["backup"]).read_bytes().decode() == theirs
    assert path.stat().st_mode & 0o777 == 0o600
    # Lines of ours are brought up to date where they stand; an older copy is kept as well.
    path.write_bytes(text.replace("clients", "elsewhere").encode() + b'\n;; " behind it\n')
    [again] = report(name, "--write")
    assert path.read_bytes().decode() == text + '\n;; " behind it\n'
    assert again["backup"] != done["backup"]


@pytest.mark.parametrize(
    ("name", "file", "own"),
    [
        ("vim", ".vimrc", "set runtimepath^=~/src/midfill/clients/vim\n"),
        ("emacs", ".emacs", "(require 'midfill)\n(global-midfill-mode)\n"),
        ("neovim", ".config/nvim/init.lua", "require('midfill').setup {}\n"),
    ],
)
def test_who_has_set_it_up_by_hand_is_left_alone(home, name, file, own):
    path = home / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(own)
    [found] = report(name, "--write")
    assert found["status"] == "ready"
    assert path.read_text() == own


def test_helix_keeps_comments_servers_and_order(home):
    path = home / FILES["helix"]
    path.parent.mkdir(parents=True)
    path.write_text(
        "# mine\n"
        '[language-server.mine]\ncommand = "mine" # here\n\n'
        '[[language]]\nname = "python"\n'
        'language-servers = ["ruff", { name = "mine", except-features = [] }]\n\n'
        '[[language]]\nname = "rust"\nauto-format = true\n'
    )
    before = path.read_text()
    report("helix", "--write")
    text = path.read_text()
    assert all(line in text for line in before.splitlines() if "language-servers" not in line)
    values = tomllib.loads(text)
    command = list(editors.here().command)
    assert values["language-server"]["midfill"] == {"command": command[0], "args": command[1:]}
    assert values["language-server"]["mine"] == {"command": "mine"}
    languages = {one["name"]: one for one in values["language"]}
    assert languages["python"]["language-servers"] == [
        "ruff",
        {"name": "mine", "except-features": []},
        "midfill",
    ]
    assert languages["rust"] == {
        "name": "rust",
        "auto-format": True,
        "language-servers": ["rust-analyzer", "midfill"],
    }
    assert languages["go"]["language-servers"] == ["gopls", "golangci-lint-lsp", "midfill"]


def test_vs_codes_comments_stay(home):
    path = home / FILES["vscode"]
    path.parent.mkdir(parents=True)
    theirs = '// "midfill.server.command": []\n{\n  /* { */\n  "a": "// no comment", // last\n}\n'
    path.write_text(theirs)
    report("vscode", "--write")
    lines = path.read_text().splitlines(keepends=True)
    [ours] = [line for line in lines if "midfill" in line and not line.startswith("//")]
    assert json.loads("{" + ours.strip().rstrip(",") + "}") == {
        "midfill.server.command": list(editors.here().command[:-1])
    }
    assert "".join(line for line in lines if line != ours) == theirs
    path.write_text(path.read_text().replace(ours, ours.replace("[", '["/old/midfill", ')))
    report("vscode", "--write")
    assert path.read_text().count(ours.strip()) == 1
    assert report("vscode")[0]["status"] == "ready"


@pytest.mark.parametrize(
    ("name", "text"), [("helix", "[language\n"), ("helix", "language = 1\n"), ("vscode", "[]")]
)
def test_a_file_that_cannot_be_read_is_named_and_stays(home, name, text):
    path = home / FILES[name]
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(MidfillError, match=str(path)):
        run(name, "--write")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vim", "set number\r\n"),
        ("helix", '# mine\r\n[[language]]\r\nname = "python"\r\n'),
        ("vscode", '{\r\n    "editor.tabSize": 4 // mine\r\n}\r\n'),
        ("vscode", ""),
    ],
)
def test_a_byte_order_mark_stays(home, name, theirs):
    path = home / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + theirs.encode())
    report(name, "--write")
    text = path.read_bytes().decode()
    assert "midfill" in text
    if theirs:
        assert text.startswith("\ufeff")
        assert text.count("\ufeff") == 1
        assert [
            line for line in theirs.splitlines() if line not in text.removeprefix("\ufeff").splitlines()
        ] == []
    assert report(name)[0]["status"] == "ready"


@pytest.mark.parametrize("name", ["vim", "emacs", "helix", "vscode"])
def test_a_file_in_utf_16_is_said_and_stays(home, name):
    path = home / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("x\n".encode("utf-16"))
    before = path.read_bytes()
    with pytest.raises(MidfillError, match=rf"{path}.*UTF-16\. Save it as UTF-8"):
        run(name, "--write")
    assert path.read_bytes() == before


def test_a_link_stays_a_link(home):
    real = home / "dotfiles" / "vimrc"
    real.parent.mkdir()
    real.write_text("set number\n")
    (home / ".vimrc").symlink_to(real)
    report("vim", "--write")
    assert (home / ".vimrc").is_symlink()
    assert "midfill" in real.read_text()


def test_a_file_that_changed_meanwhile_is_not_written(home):
    edit = editors.find("vim").plan(editors.here()).edit
    (home / ".vimrc").write_text("set number\n")
    with pytest.raises(MidfillError, match="has changed in the meantime"):
        editor_files.write(edit)
    assert (home / ".vimrc").read_text() == "set number\n"


def test_programs_of_the_current_folder_are_no_editors(home, tmp_path, monkeypatch):
    (tmp_path / "code").write_text("#!/bin/sh\n")
    (tmp_path / "code").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".:")
    assert report() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one["program"] for one in report()] == [str(tmp_path / "code")]


def test_editors_on_the_path_are_found(home):
    (home / "bin").mkdir()
    assert "No supported editor was found" in run()
    for program in ("nvim", "hx", "subl"):
        (home / "bin" / program).write_text("#!/bin/sh\n")
        (home / "bin" / program).chmod(0o755)
    found = {one["editor"]: one["program"] for one in report()}
    assert found == {
        "neovim": str(home / "bin" / "nvim"),
        "helix": str(home / "bin" / "hx"),
        "sublime": str(home / "bin" / "subl"),
    }


@pytest.mark.parametrize("name", ["sublime", "kate", "jetbrains"])
def test_what_is_to_be_done_by_hand_is_shown(home, name):
    output = run(name, "--write")
    assert editors.here().command[0] in output
    assert "not on your PATH" in output
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_an_unknown_editor_is_named_and_so_are_the_known_ones(home):
    with pytest.raises(MidfillError, match=r"'notepad'.*vscode.*neovim"):
        run("notepad")


def test_programs_are_names_too():
    assert editors.find("nvim").name == editors.find("Neovim").name == "neovim"
    assert editors.find("hx").name == "helix"


@pytest.mark.slow
def test_the_wheel_brings_the_plugins(tmp_path):
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {
        "midfill/clients/neovim/lua/midfill/ghost.lua",
        "midfill/clients/neovim/doc/midfill.txt",
        "midfill/clients/vim/plugin/midfill.vim",
        "midfill/clients/emacs/midfill.el",
    } <= names
    assert not any("vscode" in name for name in names)


def test_kate_names_no_language_that_the_entry_is_called_by(home):
    """It would send the entry's name for every file; without, the file's own name tells."""
    (server,) = json.loads(report("kate")[0]["configuration"])["servers"].values()
    assert server["documentLanguageId"] is False
    assert server["highlightingModeRegex"] == ".*"
