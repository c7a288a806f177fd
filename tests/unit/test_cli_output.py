"""Commands whose output cannot be written: one sentence and a status, or silence where nobody reads."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.programs

COMMAND = [sys.executable, "-P", "-m", "midfill"]
PRINTING = [
    "--help",
    "--version",
    "status",
    "status --json",
    "model list",
    "model list --json",
    "adapter list",
    "bench --help",
]


@pytest.fixture
def midfill(tmp_path):
    env = os.environ | {
        "MIDFILL_CACHE": str(tmp_path / "cache"),
        "MIDFILL_CONFIG": str(tmp_path / "config.toml"),
        "MIDFILL_STATE": str(tmp_path / "state"),
        "MIDFILL_DATA": str(tmp_path / "data"),
    }

    def run(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, limit=None, **more):
        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.run(
            [*COMMAND, *arguments],
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            check=False,
            env=env | more,
            preexec_fn=limited if limit is not None else None,
        )

    return run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's")
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", PRINTING)
def test_a_full_disk_is_one_sentence(midfill, command, buffered):
    with Path("/dev/full").open("wb") as full:
        done = midfill(*command.split(), stdout=full, PYTHONUNBUFFERED=buffered)
    assert done.returncode not in (0, 120)
    assert done.stderr.decode() == "midfill: Cannot write the output: No space left on device.\n"


@pytest.mark.parametrize("command", PRINTING)
def test_a_reader_that_has_left_is_told_nothing(midfill, command):
    read, write = os.pipe()
    os.close(read)
    done = midfill(*command.split(), stdout=write)
    os.close(write)
    assert done.returncode not in (0, 120)
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's")
def test_errors_that_cannot_be_told_are_a_status_still(midfill):
    with Path("/dev/full").open("wb") as full:
        for command in ("nonsense", "model use nonsense", "complete nowhere:1:1"):
            assert midfill(*command.split(), stderr=full).returncode in (1, 2)
        assert midfill("model", "list", stdout=full, stderr=full).returncode == 1


@pytest.mark.parametrize(
    "more",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1", "PYTHONUNBUFFERED": "1"},
    ],
    ids=str,
)
def test_characters_that_the_output_does_not_know_are_replaced(midfill, tmp_path, more):
    script = tmp_path / "script.json"
    script.write_text('{"rules": [{"text": "x + 1  # é → 漢 \\\\ud83d\\n"}]}'.replace("\\\\", "\\"))
    (tmp_path / "a.py").write_text("def f(x):\n    return \n")
    place = (f"{tmp_path}/a.py:2:12", "--engine", f"scripted:{script}")
    for flags in ([], ["--explain"], ["--json"]):
        done = midfill("complete", *place, *flags, **more)
        assert done.returncode == 0, done.stderr
        assert b"x + 1  #" in done.stdout
        assert done.stderr == b""


def test_names_that_are_no_text_are_replaced(midfill):
    done = midfill("complete", b"\xff\xfe.py:1:1", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["model use qwen2.5-coder-0.5b", "setup neovim --write"])
def test_files_on_a_full_disk_are_one_sentence_and_stay_as_they_were(midfill, tmp_path, command):
    config = tmp_path / "config.toml"
    config.write_text('eagerness = "low"\n')
    home = tmp_path / "home"
    home.mkdir()
    done = midfill(*command.split(), limit=0, HOME=str(home), XDG_CONFIG_HOME=str(home))
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert config.read_text() == 'eagerness = "low"\n'
