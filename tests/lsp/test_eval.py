"""The evaluations through the real server: it must fill as the pipeline in one process does."""

import json
import subprocess
import sys

import pytest
from hostile_git import lacking
from planted_adapters import write_base

import forkserver

CODE = "import math\n\n\ndef area(radius):\n    return math.pi * abs(radius) ** 2  # é𐐀\n\n\nprint(area(2))\n"


def measured(*arguments):
    done = subprocess.run(
        [*forkserver.command("eval", *map(str, arguments)), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.json"
    rules = [{"text": "radius) ** 2", "after": "abs("}, {"text": "    print(1)\n    print(2)\n"}]
    path.write_text(json.dumps({"rules": rules}))
    return f"scripted:{path}"


def test_the_server_fills_as_the_pipeline_does(tmp_path, script):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "area.py").write_text(CODE)
    found = {}
    for way in ((), ("--server",)):
        results = tmp_path / f"results{len(way)}"
        measured("repo", folder, "--holes", 12, "--engine", script, "--results", results, *way)
        rows = [json.loads(line) for line in results.read_text().splitlines()[1:]]
        found[way] = [(row["id"], row["text"], row["reason"]) for row in rows]
        assert results.stat().st_mode & 0o077 == 0
    pipeline, server = found.values()
    assert len(pipeline) > 5
    assert pipeline == server


def test_tasks_are_filled_plotted_and_compared(tmp_path, script):
    task = {
        "task_id": "Kind/1",
        "prompt": "def area(radius):\n    return abs(",
        "suffix": "\n",
        "canonical_solution": "radius) ** 2",
        "test": "def check(it):\n    assert it(-2) == 4\n",
        "entry_point": "area",
    }
    tasks, results = tmp_path / "tasks.jsonl", tmp_path / "results"
    tasks.write_text(json.dumps(task) + "\n")
    first = measured(
        "infilling", tasks, "--engine", script, "--results", results, "--plot", tmp_path / "a.png"
    )
    assert first["pass@1"] == {"Kind": 1.0, "all": 1.0}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = measured("infilling", tasks, "--engine", script, "--server", "--compare", results)
    assert again["pass@1"] == first["pass@1"]
    equal = {"tasks": 1, "better": 0, "worse": 0, "p": 1.0}
    assert again["compared"] == {**equal, "line_0": equal}


def test_settings_and_options_that_cannot_be_meant_are_refused(tmp_path):
    for arguments in (
        ("repo",),
        ("repo", str(tmp_path), "--set", "max_new_tokens"),
        ("infilling", "x", "--raw", "--server"),
    ):
        done = subprocess.run(
            forkserver.command("eval", *arguments), capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("midfill eval")
        assert done.stderr.endswith("--help\n")
        assert done.stderr.count("\n") == 1
    done = subprocess.run(
        forkserver.command("eval", "repo", str(tmp_path), "--set", "no_setting=1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no_setting" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the program that would run is a shell's")
@pytest.mark.parametrize(
    "command", [["eval", "repo"], ["adapter", "plan", "--repo"], ["adapter", "train", "--repo"]]
)
def test_a_repository_that_names_programs_runs_none(tmp_path, script, command):
    marker = tmp_path / "ran"
    folder = lacking(tmp_path, marker)
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    rest = ["--model", tmp_path / "base"] if command[0] == "adapter" else ["--holes", "2", "--engine", script]
    done = subprocess.run(
        forkserver.command(*map(str, [*command, folder, *rest])), capture_output=True, text=True, check=False
    )
    assert not marker.exists()
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 if command[0] == "eval" else "git" in done.stderr, done.stderr


def test_scenarios_are_played_to_the_server(tmp_path, script):
    folder = tmp_path / "scenarios"
    folder.mkdir()
    head = "language: python\nfile: area.py\nrow: 2\ncol: 99\n"
    buffer = "-- buffer.txt --\ndef area(radius):\n    return abs(\n-- steps --\nrequest-completion manual\n"
    (folder / "edit.txtar").write_text(
        f"id: edit\n{head}{buffer}-- history --\n<|file|> area.py\n<|old|>\ndef area(r):\n<|new|>\n"
        "def area(radius):\n-- expected --\ndef area(radius):\n    return abs(radius) ** 2\n"
    )
    (folder / "silent.txtar").write_text(f"id: silent\n{head}{buffer}  expect !shown\n")
    results = tmp_path / "results"
    summary = measured("edits", folder, "--engine", script, "--results", results)
    assert (summary["score"], summary["shown"], summary["quiet"]) == (1.0, 1.0, 0.0)
    assert summary["latency_ms"]["p50"] > 0
    again = measured("edits", folder, "--engine", script, "--results", results)
    assert again == summary
