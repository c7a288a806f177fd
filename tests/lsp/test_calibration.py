"""From results to what is shown: `midfill eval calibrate`, and the server that reads what it has written."""

import asyncio
import json
import random

import pytest

import forkserver

pytestmark = pytest.mark.asyncio(loop_scope="module")

SURE, URI = -0.05, "file:///work/main.py"


def results(path, seed, model="scripted"):
    """Of a model that is wrong where it is sure, and right where it is not."""
    chance = random.Random(seed)
    rows = [{"eval": "repo", "model": model}]
    for number in range(120):
        logprob = -chance.expovariate(1.0)
        right = logprob < -0.5
        text = "compute(v)"
        rows.append(
            {
                "id": f"{path.stem}{number}",
                "file": "a.py",
                "kind": "rest-of-line",
                "language": "python",
                "line_before": "a = ",
                "line_after": "",
                "truth": text if right else "other(w)",
                "text": text,
                "reason": None,
                "tokens": [[end, logprob] for end in range(1, len(text) + 1)],
                "finished": True,
                "latency_ms": 1.0,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def midfill(*arguments):
    process = await asyncio.create_subprocess_exec(
        *forkserver.command(*arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    return process.returncode, out.decode(), errors.decode()


async def shown(client):
    """What a new server shows unasked of a text that the model is sure of; why, its status, its messages."""
    it = await client({"after": "a = ", "text": "compute(v)", "logprob": SURE})
    async with asyncio.timeout(60):
        while (status := await it.request("midfill/status", None))["state"] != "ready":
            pass
    item = {"uri": URI, "languageId": "python", "version": 1, "text": "a = \n"}
    it.notify("textDocument/didOpen", {"textDocument": item})
    here = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
    answer = await it.request("textDocument/inlineCompletion", here | {"context": {"triggerKind": 2}})
    why = await it.request("midfill/explain", {"textDocument": {"uri": URI}})
    messages = [params["message"] for method, params in it.heard if method == "window/showMessage"]
    return [one["insertText"] for one in answer["items"]], why, status, messages


async def test_what_is_fitted_is_written_used_and_taken_back(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    files = [results(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("abc")]

    texts, _, status, messages = await shown(client)
    assert (texts, status["calibration"], messages) == (["compute(v)"], None, [])

    # Without --write nothing changes.
    code, out, _ = await midfill("eval", "calibrate", *files[:2], "--held-out", files[2])
    assert code == 0
    assert "To use it, add --write." in out
    assert not (tmp_path / "data").exists()

    training = (*files[:2], "--held-out", files[2])
    code, out, errors = await midfill("eval", "calibrate", *training, "--write", "--json")
    assert code == 0, errors
    written = json.loads(out)
    assert written["model"] == "scripted"
    assert written["brier"]["fitted"] < written["brier"]["built_in"]
    texts, why, status, messages = await shown(client)
    assert (texts, why["reason"], messages) == ([], "low-confidence", [])
    assert "by your own calibration" in why["message"]
    assert status["calibration"] == written["file"]

    # A broken file is said, once, and not used.
    path = tmp_path / "data" / "calibrations" / written["file"].rsplit("/", 1)[-1]
    path.write_text(path.read_text().replace('"bias"', '"bais"'))
    texts, _, status, messages = await shown(client)
    assert (texts, status["calibration"]) == (["compute(v)"], None)
    (message,) = messages
    assert str(path) in message
    assert "--reset" in message

    code, out, _ = await midfill("eval", "calibrate", "--reset", "--model", "scripted")
    assert (code, path.exists()) == (0, False)
    texts, _, status, messages = await shown(client)
    assert (texts, status["calibration"], messages) == (["compute(v)"], None, [])


async def test_another_models_calibration_is_not_used(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    files = [results(tmp_path / f"{name}.jsonl", seed, model="other") for seed, name in enumerate("ab")]
    assert (await midfill("eval", "calibrate", *files, "--write"))[0] == 0
    texts, _, status, _ = await shown(client)
    assert (texts, status["calibration"]) == (["compute(v)"], None)


async def test_what_is_no_better_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    files = [results(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("ab")]
    for file in files:
        # Fewer than are needed.
        rows = (tmp_path / file).read_text().splitlines(keepends=True)
        (tmp_path / file).write_text("".join(rows[:30]))
    code, out, errors = await midfill("eval", "calibrate", *files, "--write")
    assert code == 1
    assert "Not saved." in errors
    assert not (tmp_path / "data").exists()
    code, out, _ = await midfill("eval", "calibrate", *files, "--write", "--force")
    assert code == 0
    assert "Servers use it for scripted" in out


async def test_reset_and_files_do_not_go_together(tmp_path):
    code, _, errors = await midfill("eval", "calibrate", "--reset", str(tmp_path / "a"))
    assert (code, "--reset takes no RESULTS" in errors) == (2, True)
    code, _, errors = await midfill("eval", "calibrate")
    assert (code, "Give result files" in errors) == (2, True)
