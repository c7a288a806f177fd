"""The commands that run the default model, as a person starts them."""

import json
import subprocess
import sys

COMMAND = [sys.executable, "-P", "-m", "midfill"]


def test_the_demo_gets_a_suggestion_in_every_sample(model):
    done = subprocess.run(
        [*COMMAND, "demo", "--json"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["model"] == model.name
    assert {suggestion["file"] for suggestion in result["suggestions"]} == {
        "shapes.py",
        "cart.ts",
        "stack.go",
    }
    for suggestion in result["suggestions"]:
        assert set(suggestion) == {"file", "line", "text", "latency_ms", "source"}
        assert suggestion["text"].strip()
        assert suggestion["latency_ms"] > 0


def test_the_check_knows_the_default_model(model):
    done = subprocess.run(
        [*COMMAND, "model", "check", model.name, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["family"] == "qwen2.5-coder"
    # Its own order, and no doubt that it was trained to fill in.
    assert (result["probe"]["best"], result["probe"]["understood"]) == ("psm", True)
    assert result["probe"]["nats_per_char"]["psm"] > result["probe"]["prefix_alone"] + 0.5
    assert result["layouts"][0] == "appending"
    assert result["sentinels"] == {
        "<|fim_prefix|>": 151659,
        "<|fim_suffix|>": 151661,
        "<|fim_middle|>": 151660,
    }
    assert result["dtype"] == "int8"


def test_the_table_of_families_is_held_against_what_is_installed(model):
    done = subprocess.run(
        [*COMMAND, "eval", "families", "--no-probe", "--json"], capture_output=True, timeout=60, check=True
    )
    result = json.loads(done.stdout)
    assert "qwen2.5-coder" in result["vocabularies"][model.name]
    ids = result["families"]["qwen2.5-coder"]["vocabularies"][model.name]
    assert ids["sentinels"]["<|fim_middle|>"] == 151660
    assert ids["files"] == {"<|repo_name|>": 151663, "<|file_sep|>": 151664}
    assert len(ids["stops"]) == 8


def test_the_doctor_finds_nothing_wrong(model):
    done = subprocess.run(
        [*COMMAND, "doctor", "--json"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert set(checks) == {
        "versions",
        "settings",
        "device",
        "gpu",
        "cache",
        "model",
        "memory",
        "gate",
        "speed",
    }
    assert all(check["status"] != "error" for check in checks.values())
    assert all(check["remedy"] for check in checks.values() if check["status"] != "ok")


def test_one_completion_in_the_terminal(model):
    done = subprocess.run(
        [*COMMAND, "complete", "-", "--language", "python", "--json"],
        input="def add(a, b):\n    return",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a + b" in json.loads(done.stdout)["text"]
