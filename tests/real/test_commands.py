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
    assert result["sentinels"] == {
        "<|fim_prefix|>": 151659,
        "<|fim_suffix|>": 151661,
        "<|fim_middle|>": 151660,
    }
    assert result["dtype"] == "int8"


def test_the_doctor_finds_nothing_wrong(model):
    done = subprocess.run(
        [*COMMAND, "doctor", "--json"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert set(checks) == {"versions", "settings", "device", "cache", "model", "memory", "speed"}
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
