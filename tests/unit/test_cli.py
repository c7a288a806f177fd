"""The command line as a process: what a person types, what comes back."""

import inspect
import json
import os
import subprocess
import sys

import click
import pytest

import forkserver
from midfill.cli.main import cli

pytestmark = pytest.mark.programs

COMMAND = [sys.executable, "-P", "-m", "midfill"]


@pytest.fixture
def midfill(tmp_path):
    """Run midfill with a cache and settings of its own."""
    env = os.environ | {
        "MIDFILL_CACHE": str(tmp_path / "cache"),
        "MIDFILL_CONFIG": str(tmp_path / "config.toml"),
    }

    def run(*arguments, text=None, cwd=None):
        return subprocess.run(
            forkserver.command(*arguments),
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=env,
            cwd=cwd,
        )

    return run


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"rules": [{"text": "1 + 1\n"}]}))
    return f"scripted:{path}"


def test_help_imports_nothing_heavy():
    code = """
import sys
sys.argv = ["midfill", "--help"]
from midfill.cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {
    "httpx2", "lsprotocol", "numpy", "openvino", "psutil", "pydantic", "pygls", "rich", "safetensors",
    "starlette", "tantivy", "tokenizers", "torch", "transformers", "tree_sitter", "uvicorn",
}
print(heavy & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "midfill demo" in done.stdout
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "arguments", [["serve"], ["complete"], ["demo"], ["doctor"], ["model", "pull"], ["model", "check"]]
)
def test_every_command_has_help(midfill, arguments):
    done = midfill(*arguments, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def commands(group=cli, path=("midfill",)):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_help_page_has_an_example_and_explains_every_option(path, command):
    assert f"\n  {path}" in inspect.cleandoc(command.help)
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, option.name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--bogus", "midfill: No such option '--bogus'. For help: midfill --help"),
        ("serv", "midfill: No such command 'serv'. Did you mean 'serve'? For help: midfill --help"),
        ("model use", "midfill model use: Missing argument 'NAME'. For help: midfill model use --help"),
        ("eval calibrate --reset --write",
         "midfill eval calibrate: --reset takes no RESULTS, --held-out or --write. "
         "For help: midfill eval calibrate --help"),
        ("serve --log-level loud",
         "midfill serve: Invalid value for '--log-level': 'loud' is not one of 'debug', 'info', 'warning', "
         "'error'. For help: midfill serve --help"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_one_line_that_names_the_help(midfill, arguments, line):
    done = midfill(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == line + "\n"


@pytest.mark.parametrize("arguments", [[], ["model"]])
def test_a_group_alone_shows_its_help(midfill, arguments):
    done = midfill(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Usage: {' '.join(['midfill', *arguments])} [OPTIONS] COMMAND")


def test_the_version_is_printed(midfill):
    assert midfill("--version").stdout.startswith("midfill 0.")


def test_a_completion_is_printed(midfill, script, tmp_path):
    path = tmp_path / "a.py"
    path.write_text("a = \nb = 2\n")
    done = midfill("complete", f"{path}:1:5", "--engine", script)
    assert (done.returncode, done.stdout) == (0, "1 + 1\n")


def test_line_ends_are_those_of_the_file_where_stdout_would_change_them(tmp_path):
    """Standard output of a program on Windows writes a carriage return before each line feed."""
    (tmp_path / "a.py").write_bytes(b"def f():\r\n    x = 1\r\n    \r\n")
    (tmp_path / "script.json").write_text('{"rules": [{"text": "y = 2\\r\\n    return x + y\\r\\n"}]}')
    program = (
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, newline='\\r\\n');"
        "sys.argv = ['midfill', 'complete', 'a.py:3:5', '--engine', 'scripted:script.json'];"
        "from midfill.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.rstrip() == b"y = 2\r\n    return x + y"


def test_a_terminal_is_sent_no_commands(midfill, tmp_path):
    (tmp_path / "script.json").write_text('{"rules": [{"text": "1 + \\u001b]0;PWNED\\u00072\\n"}]}')
    text = "# \x1b[31m\u202e\na = \n"
    for option in ([], ["--explain"], ["--json"]):
        done = midfill(
            "complete", "-:2:5", "--language", "python", *option, "--engine", "scripted:script.json",
            text=text, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0
        assert not set("\x1b\x07\u202e") & set(done.stdout + done.stderr)
        assert "1 +" in done.stdout


def test_a_completion_from_stdin_as_json(midfill, script):
    done = midfill(
        "complete", "-:1:5", "--language", "python", "--json", "--engine", script, text="a = \nb = 2\n"
    )
    assert json.loads(done.stdout)["text"] == "1 + 1"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere.py:1:1", "Cannot read nowhere.py: there is no such file. Check the path."),
        ("a.py:9:1", "a.py has 2 lines, so there is no line 9."),
        ("a.py:0:1", "'a.py:0:1' is not FILE:LINE:COL"),
        ("a.py", "'a.py' is not FILE:LINE:COL"),
        ("a.py:x:y", "'a.py:x:y' is not FILE:LINE:COL"),
        ("binary.py:1:1", "binary.py is not UTF-8 text."),
    ],
)
def test_a_bad_place_is_named(midfill, tmp_path, where, message):
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\xfa")
    done = midfill("complete", where, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_suggestion_is_said_with_the_reason(midfill, script):
    done = midfill("complete", "-:1:1", "--engine", script, text="\n")
    assert done.returncode == 1
    assert "The file is empty" in done.stderr


def test_a_model_that_is_not_here_names_the_command_that_fetches_it(midfill):
    done = midfill("complete", "-:1:1", text="a = 1\n")
    assert done.returncode == 1
    assert "midfill model pull qwen2.5-coder-0.5b" in done.stderr


def test_models_are_listed(midfill):
    models = json.loads(midfill("model", "list", "--json").stdout)
    names = {model["name"] for model in models["models"]}
    assert models["used"] == "qwen2.5-coder-0.5b"
    assert names >= {
        "qwen2.5-coder-0.5b",
        "tiny-starcoder-py",
        "starcoderbase-7b",
        "mellum-4b",
        "seed-coder-8b",
    }
    assert not any(model["installed"] for model in models["models"])
    files = {model["name"]: model["gguf"] for model in models["models"]}
    assert files["qwen2.5-coder-0.5b"] == "available"
    assert files["mellum-4b"] is None


def test_with_llama_cpp_a_model_is_its_gguf_file(midfill, tmp_path):
    (tmp_path / "config.toml").write_text('runner = "llamacpp"\n')
    done = midfill("complete", "-:1:1", text="a = 1\n")
    assert done.returncode == 1
    assert "Run: midfill model pull qwen2.5-coder-0.5b --gguf" in done.stderr
    file = tmp_path / "cache" / "gguf" / "qwen2.5-coder-0.5b.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    models = json.loads(midfill("model", "list", "--json").stdout)["models"]
    assert [(model["installed"], model["gguf"]) for model in models if model["gguf"] == "here"] == [
        (False, "here")
    ]
    assert json.loads(midfill("status", "--json").stdout)["model_path"] == str(file)
    assert midfill("model", "use", "qwen2.5-coder-0.5b").returncode == 0
    # It is used as it is, and damaged.
    done = midfill("complete", "-:1:1", text="a = 1\n")
    assert done.returncode == 1
    assert "damaged or incomplete" in done.stderr


@pytest.mark.parametrize("command", ["use", "path"])
def test_an_absent_model_cannot_be_used(midfill, command):
    done = midfill("model", command, "qwen2.5-coder-1.5b")
    assert done.returncode == 1
    assert "midfill model pull qwen2.5-coder-1.5b" in done.stderr


def test_a_broken_settings_file_is_named(midfill, tmp_path):
    (tmp_path / "config.toml").write_text("max_new_tokens = 0\n")
    done = midfill("complete", "-:1:1", text="a = 1\n")
    assert done.returncode == 1
    assert "config.toml" in done.stderr
    assert "max_new_tokens" in done.stderr


def test_the_doctor_names_the_remedy_for_a_missing_model(midfill):
    done = midfill("doctor", "--json")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["model"]["status"] == "error"
    assert checks["model"]["remedy"] == "Run: midfill model pull qwen2.5-coder-0.5b"
