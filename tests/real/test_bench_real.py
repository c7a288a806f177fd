"""The benchmarks with the default model: that they run, and what they must not get wrong."""

import json
import subprocess
import sys

import pytest

from midfill.models import store

# A slow machine reads and writes with the whole model for minutes.
pytestmark = pytest.mark.timeout(1200)

COMMAND = [sys.executable, "-P", "-m", "midfill", "bench"]


def measured(*arguments):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_engine_is_compared_with_generate(model):
    found = measured("engine", "--model", model.name, "--rounds", 1, "--cancellations", 5)
    assert found["tokens_equal_generate"] is True
    assert found["ratios"]["generate"]["decode"] > 0
    if store.find_gguf(model.name) is None:
        assert found["ratios"]["llama.cpp"] == {"decode": None, "prefill": None}
        assert set(found["skipped"]) == {"llama.cpp"}
    else:
        assert found["ratios"]["llama.cpp"]["prefill"] > 0


def test_a_person_typing_gets_suggestions(model, tmp_path):
    functions = [f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(20)]
    (tmp_path / "area.py").write_text("".join(functions))
    found = measured("replay", "--files", tmp_path, "--limit-s", 10, "--model", model.name)
    assert found["requests"] > 10
    # On a slow machine every request may be cancelled by the next key; each has a fate all the same.
    assert sum(found["outcomes"].values()) == found["requests"]
    assert found["outcomes"]["failed"] == 0
    assert found["peak_rss_mb"] > 300


def test_the_same_typing_is_played_to_llama_cpp_and_generate(model, tmp_path):
    """What is asserted holds on a slow machine too, on which nobody may be in time."""
    pytest.importorskip("xllamacpp")
    if store.find_gguf(model.name) is None:
        pytest.skip(f"needs the GGUF file: midfill model pull {model.name} --gguf")
    functions = [f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(20)]
    (tmp_path / "area.py").write_text("".join(functions))
    others = ("--against", "llama.cpp", "--against", "generate", "--lines", 24, 8)
    found = measured("replay", "--files", tmp_path, "--limit-s", 12, "--model", model.name, *others)
    assert set(found["others"]) == set(found["ratios"]) == {"llama.cpp", "generate"}
    for summary in (found, *found["others"].values()):
        assert summary["requests"] > 10
        assert sum(summary["outcomes"].values()) == summary["requests"]
        assert summary["outcomes"]["failed"] == 0
        assert summary["startup_s"] > 0
        assert summary["peak_rss_mb"] > 300
    generate = found["others"]["generate"]
    # Nothing is reused: every prompt that was begun was computed whole.
    assert generate["recomputed_first_tokens"]["p50"] > 50


def test_what_the_server_takes_while_a_model_decodes_is_told_beside_its_budget(model):
    # Whether it is within that depends on the machine.
    found = measured("lsp", "--busy", "--model", model.name)
    assert 0 < found["median_ms"] <= found["p95_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["met"] == (found["p95_ms"] < found["targets"]["p95_ms"])
