"""`midfill bench replay` and `bench engine` as a person starts them, with a script for a model.

Typing is in real time here, so that a busy machine may miss the next key: what is counted then is exact, what
became of each request is not. That is tested in a time of its own (`tests/engine/test_bench_replay.py`).
"""

import json
import subprocess

import pytest
from click.testing import CliRunner

import forkserver
from midfill.bench.shapes import SHAPES
from midfill.cli.main import cli

URI = "file:///replay/main.py"
TYPED = "total = sum(values)"
EACH_MS = 300
# Before the typing, one suggestion is asked for here, to measure the start.
PROBE = {"after": "return a ", "text": "+ b"}
NAMES = {
    "suggestion_ms": {"p50", "p95", "p99"},
    "model_ran_ms": {"p50", "p95", "p99"},
    "recomputed_tokens": {"p50", "p99"},
    "cancel_to_free_ms": {"p50", "p99"},
}


def run(*arguments):
    return subprocess.run(
        forkserver.command("bench", *map(str, arguments)),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def measured(*arguments):
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def engine(tmp_path):
    def write(*rules):
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": rules}))
        return f"scripted:{path}"

    return write


@pytest.fixture
def trace(tmp_path):
    """A file of typing; see `write_trace`."""
    return write_trace(tmp_path / "trace.jsonl")


def write_trace(path, pause_ms=0):
    """TYPED, a key every `EACH_MS`, and a request 50 ms after each; with a pause after `total =`."""
    document = {"uri": URI}
    item = document | {"languageId": "python", "version": 1, "text": "values = [1, 2]\n\n"}
    rows = [(0, "textDocument/didOpen", {"textDocument": item})]
    for column, char in enumerate(TYPED):
        place = {"line": 1, "character": column}
        change = {"range": {"start": place, "end": place}, "text": char}
        at = EACH_MS * (column + 1) + (pause_ms if column >= len("total =") else 0)
        params = {"textDocument": document | {"version": column + 2}, "contentChanges": [change]}
        rows.append((at, "textDocument/didChange", params))
        params = {"textDocument": document, "position": {"line": 1, "character": column + 1}}
        rows.append((at + 50, "textDocument/inlineCompletion", params | {"context": {"triggerKind": 2}}))
    end = EACH_MS * len(TYPED) + pause_ms + 500
    rows.append((end, "textDocument/didClose", {"textDocument": document}))
    path.write_text(
        "".join(json.dumps({"t": t, "send": {"method": m, "params": p}}) + "\n" for t, m, p in rows)
    )
    return path


@pytest.mark.serial
def test_a_right_suggestion_is_accepted_and_its_keys_are_saved(tmp_path, engine):
    # It is accepted when it appears, however long the typist would have waited for it.
    found = measured(
        "replay",
        write_trace(tmp_path / "trace.jsonl", pause_ms=60_000),
        "--engine",
        engine(PROBE, {"after": "total =", "text": " sum(values)"}, {"text": "zzz"}),
    )
    assert found["outcomes"]["accepted"] == 1
    assert found["keys"] == len(TYPED)
    assert found["keystrokes_saved"] == len(" sum(values)") - 1
    assert found["requests"] == len("total =") + 1
    assert sum(found["outcomes"][name] for name in ("shown", "cancelled", "late")) == len("total =")
    assert 0 < found["suggestion_ms"]["p50"] <= found["suggestion_ms"]["p95"]
    assert found["peak_rss_mb"] > 10
    assert 0 < found["startup_s"] <= found["first_suggestion_s"]
    assert found["recomputed_first_tokens"]["p50"] > 0
    assert found["sources"]["model"] > 0
    # A token is a character here: those of what was accepted are neither wasted nor unaccepted.
    used = found["generated_tokens"] - found["wasted_tokens"] - found["unaccepted_tokens"]
    assert used >= len(" sum(values)")
    for name, percents in NAMES.items():
        assert set(found[name]) == percents
    whole = ("requests", "reused_share", "keystrokes_saved", "wasted_tokens", "peak_rss_mb")
    assert all(found[name] is not None for name in whole)


@pytest.mark.serial
def test_a_suggestion_can_be_typed_through_instead(tmp_path, engine):
    rules = {"after": "total =", "text": " sum(values)"}, {"text": "zzz"}
    trace = write_trace(tmp_path / "trace.jsonl", pause_ms=5_000)
    found = measured("replay", trace, "--no-accept", "--engine", engine(*rules))
    assert found["outcomes"]["accepted"] == found["keystrokes_saved"] == 0
    assert found["requests"] == len(TYPED)
    inside = found["inside_right_suggestion"]
    assert inside["requests"] == len(" sum(values)") - 1
    missed = found["outcomes"]["cancelled"] + found["outcomes"]["late"]
    assert inside["requests"] - missed <= found["sources"].get("typed-through", 0) <= inside["requests"]


@pytest.mark.serial
def test_requests_that_the_next_key_overtakes_are_cancelled(trace, engine):
    found = measured("replay", trace, "--speed", 3, "--engine", engine(PROBE, {"hang": True}))
    assert found["requests"] == len(TYPED)
    assert found["cancelled_share"] == 1
    assert found["outcomes"]["cancelled"] == len(TYPED)
    # What hangs agrees with all that is typed, so it is kept until the document is closed.
    assert found["cancel_to_free_ms"]["p50"] < EACH_MS * len(TYPED) / 3
    assert 0 < found["cancel_to_answer_ms"]["p50"] < EACH_MS * len(TYPED) / 3
    assert found["suggestion_ms"] == {"p50": None, "p95": None, "p99": None}


@pytest.mark.serial
def test_what_cancelled_requests_have_written_is_counted(trace, engine):
    slow = {"text": "z" * 50, "token_delay_s": 0.03}
    found = measured("replay", trace, "--engine", engine(PROBE, slow))
    assert found["outcomes"]["cancelled"] >= len(TYPED) - 1
    assert found["wasted_tokens"] == found["generated_tokens"] > len(TYPED)
    # A script computes its prompt for each request anew; the requests were all cancelled.
    assert found["samples"]["recomputed_tokens"] == len(TYPED) - 1
    assert found["recomputed_tokens"]["p50"] > 10
    assert found["samples"]["cancel_to_free_ms"] >= len(TYPED) - 1
    # Each is free before it would have written its fifty tokens.
    assert 0 < found["cancel_to_free_ms"]["p50"] < 50 * 30


@pytest.mark.serial
def test_a_suggestion_that_leads_elsewhere_is_not_accepted(trace, engine):
    found = measured("replay", trace, "--speed", 2, "--engine", engine({"text": "sum(other)"}))
    assert found["outcomes"]["accepted"] == 0
    assert found["keystrokes_saved"] == 0
    # The rest was computed ahead, for the case that it is accepted.
    assert found["unaccepted_tokens"] + found["wasted_tokens"] == found["generated_tokens"]
    assert found["unaccepted_tokens"] > 0


@pytest.mark.serial
def test_the_time_can_be_limited(trace, engine):
    found = measured("replay", trace, "--limit-s", 1, "--engine", engine({"text": "zzz"}))
    assert 2 <= found["keys"] <= 5
    assert found["seconds"] < EACH_MS * len(TYPED) / 1000


def test_made_up_typing_is_drawn(tmp_path, engine):
    pytest.importorskip("matplotlib")
    source = "".join(f"def area_{n}(width):\n    return {n} * width\n\n\n" for n in range(40))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(source)
    picture = tmp_path / "replay.png"
    options = ("--sessions", 2, "--speed", 4, "--plot", picture)
    done = run("replay", "--files", tmp_path / "src", *options, "--engine", engine({"text": "width"}))
    assert done.returncode == 0, done.stderr
    assert "time to a suggestion, ms" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "Give either a TRACE (a file of recorded typing) or --files DIR"),
        (("a.jsonl", "--files", "."), 2, "Give either a TRACE (a file of recorded typing) or --files DIR"),
        (("nowhere.jsonl",), 1, "Cannot read nowhere.jsonl"),
        (("--files", "/nowhere"), 2, "Directory '/nowhere' does not exist"),
    ],
)
def test_a_replay_of_nothing_is_refused(arguments, status, message):
    done = run("replay", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_comparison_that_cannot_be_made_is_a_sentence(trace, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    done = run("replay", trace, "--against", "llama.cpp", "--engine", engine())
    assert done.returncode == 1
    assert "Run: midfill model pull qwen2.5-coder-0.5b --gguf" in done.stderr
    done = run("replay", trace, "--against", "generate", "--engine", engine())
    assert done.returncode == 1
    assert "Run: midfill model pull qwen2.5-coder-0.5b\n" in done.stderr


def test_a_model_that_cannot_be_loaded_is_a_sentence(trace, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"load_error": "No such model here."}))
    done = run("replay", trace, "--engine", f"scripted:{tmp_path / 'bad.json'}")
    assert done.returncode == 1
    assert "No such model here." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_engine_is_measured_alone_where_nothing_can_be_compared(engine):
    found = measured("engine", "--rounds", 1, "--cancellations", 2, "--engine", engine({"text": "x" * 64}))
    assert found["model"] == "scripted"
    assert found["decode_tok_s"] > 0
    assert found["first_token_warm_ms"] > 0
    nothing = {"decode": None, "prefill": None}
    assert found["ratios"] == {"llama.cpp": nothing, "generate": nothing}
    assert found["tokens_equal_generate"] is None
    assert set(found["skipped"]) == {"llama.cpp", "generate", "tokens_equal_generate"}


def test_the_reasons_for_what_is_not_compared_are_shown(engine):
    done = run("engine", "--rounds", 1, "--cancellations", 2, "--engine", engine({"text": "x" * 64}))
    assert done.returncode == 0, done.stderr
    assert "no generate: the model has no folder" in done.stdout


@pytest.mark.slow
def test_a_shape_is_measured_without_any_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    # How it is measured does not depend on the size of the model, which would be 164 million weights.
    small = {"n_embd": 48, "n_layer": 2, "n_inner": 96, "vocab_size": 3_000}
    monkeypatch.setitem(SHAPES, "tiny_starcoder_py", SHAPES["tiny_starcoder_py"] | small)
    # A prompt of so small a model may have been read before its request is cancelled.
    options = "--rounds 1 --cancellations 12 --prefill-tokens 128 --context-tokens 64 --device cpu --json"
    done = CliRunner().invoke(cli, ["bench", "engine", "--shape", "tiny_starcoder_py", *options.split()])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"] == "random:tiny_starcoder_py"
    assert (found["prefill_tokens"], found["context_tokens"]) == (128, 64)
    assert found["tokens_equal_generate"] is True
    assert found["ratios"]["generate"]["prefill"] > 0
    assert found["first_token_warm_steps"] > 0
    assert found["cancel_to_free_ms"]["p99"] >= 0
    assert "llama.cpp" in found["skipped"]


def test_an_unknown_shape_is_answered_with_the_list():
    done = run("engine", "--shape", "gpt-5")
    assert done.returncode == 1
    assert "Use one of: tiny_starcoder_py, qwen2.5-coder-0.5b" in done.stderr
    assert run("engine", "--shape", "gpt-5", "--model", "x").returncode == 2
