"""`midfill serve` with an engine that others serve: what a user of one gets, and what it never does."""

import asyncio
import itertools
import json
import os
import sys
import uuid
from pathlib import Path

import psutil
import pytest
import raw
from raw import COMMAND, Raw

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from faulty import GOOD, STREAM, Faulty, chunk, event, listing, page, tokenize, word
from tiny import write_model

from midfill.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "def add(a, b):\n    return \n"


def likely(body):
    """A model that knows the middles of the probe where the text after the cursor stands before them."""
    if "regex" not in body:
        return GOOD
    text = body["regex"].removesuffix("[\\s\\S]*").replace("\\", "")
    prompt = body["prompt"]
    trained = (
        "<|fim_suffix|>" in prompt
        and prompt.startswith("<|fim_prefix|>")
        and prompt.endswith("<|fim_middle|>")
    )
    if "def add" in prompt:
        return [STREAM, chunk(word(text)), *GOOD[1:]]
    return [STREAM, chunk(word(text, -0.1 if trained else -9.0, "stop"))]


def sglang(**more):
    return Faulty(
        models={"data": [{"id": "team/qwen2.5-coder-7b", "owned_by": "sglang"}]}, script=likely, **more
    )


async def serve(server_url, tmp_path, *, command=None, **settings):
    config = tmp_path / "config.toml"
    lines = {"engine": server_url, "eagerness": "always", "prefetch": False} | settings
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    # Without a model on this machine.
    env = {
        "MIDFILL_CONFIG": str(config),
        "MIDFILL_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    log = tmp_path / "log.txt"
    server = await Raw.start("--log-level", "debug", "--log-file", str(log), env=env, command=command)
    server.log = log
    return server


async def ask(server):
    """Ask in a document of its own, so that nothing is reused."""
    uri = f"file:///work/{uuid.uuid4().hex}.py"
    item = {"uri": uri, "languageId": "python", "version": 1, "text": TEXT}
    server.notify("textDocument/didOpen", {"textDocument": item})
    params = {
        "textDocument": {"uri": uri},
        "position": {"line": 1, "character": 11},
        "context": {"triggerKind": 1},
    }
    server.request("ask", "textDocument/inlineCompletion", params)
    answer = await server.answer("ask")
    server.request("why", "midfill/explain", {"textDocument": {"uri": uri}})
    why = (await server.answer("why"))["result"]
    items = answer["result"]["items"]
    return (items[0]["insertText"] if items else ""), why["reason"]


async def until(server, wanted, seconds=60):
    """Ask as a typist does, until the answer is this one. What was away is left alone for 30 s at most."""
    async with asyncio.timeout(seconds):
        for _ in itertools.count():
            if (found := await ask(server))[0] == wanted:
                break
            await asyncio.sleep(0.1)
    return found


def shown(server):
    return [m["params"]["message"] for m in server.seen if m.get("method") == "window/showMessage"]


async def test_a_served_model_gives_suggestions_without_any_library_for_models(tmp_path):
    async with sglang() as model, await serve(model.url, tmp_path, command=COMMAND) as server:
        await server.initialize()
        assert await until(server, "a + b") == ("a + b", None)
        libraries = {Path(region.path).name for region in psutil.Process(server.pid).memory_maps()}
        assert not [name for name in libraries if "torch" in name or "openvino" in name]
        connections = psutil.Process(server.pid).net_connections()
        assert {(c.raddr.ip, c.raddr.port) for c in connections if c.raddr} <= {("127.0.0.1", model.port)}
        assert not [c for c in connections if c.status == psutil.CONN_LISTEN]
        assert shown(server) == []
        log = server.log.read_text()
        assert "serving qwen2.5-coder-7b (remote" in log
        assert "add(" not in log


async def test_a_server_that_is_away_is_said_once_and_found_when_it_comes(tmp_path):
    async with sglang() as model:
        pass
    async with await serve(model.url, tmp_path) as server:
        await server.initialize()
        sentence = f"midfill: 127.0.0.1:{model.port} cannot be reached."
        for _ in range(5):
            assert (await ask(server))[1] in {"loading", "model-failed"}
        async with asyncio.timeout(60):
            while sentence not in shown(server):
                await server.receive()
        async with model:
            await until(server, "a + b")
            # It dies in the middle of an answer, stays away for a while, and comes back.
            model.script = [STREAM, chunk(word("a"))]
            assert await ask(server) == ("", "engine-unavailable")
        for _ in range(8):
            assert await ask(server) == ("", "engine-unavailable")
        model.script = likely
        async with model:
            await until(server, "a + b")
        assert shown(server).count(sentence) == 1
        assert len(shown(server)) <= 3


@pytest.mark.slow
async def test_the_model_here_answers_while_the_server_is_away(tmp_path, monkeypatch):
    """It dies in the middle of the session; what comes then comes from here, until it is back."""
    monkeypatch.setattr(raw, "TIMEOUT_S", 60)
    folder = tmp_path / "tiny-granite-code"
    write_model("llama", folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("a + b")
    spelled = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.1] * len(ids)}
    choice = {"text": "a + b", "logprobs": spelled, "finish_reason": "stop"}
    script = [STREAM, chunk(event({"choices": [choice]})), b"0\r\n\r\n"]
    remote = Faulty(models=listing("vllm", "granite-code"), script=script)
    remote.pages["/tokenize"] = tokenize(tokenizer, "prompt")
    here = {"model": str(folder), "family": "granite-code", "dtype": "float32", "runner": "torch"}
    here |= {"engine_fallback": True, "healing": False, "max_new_tokens": 8, "deadline_s": 30.0}
    async with remote, await serve(remote.url, tmp_path, **here) as server:
        await server.initialize()
        await until(server, "a + b")
        await remote.__aexit__()
        # The model here is loaded only now.
        assert (await ask(server))[1] == "engine-unavailable"
        async with asyncio.timeout(60):
            while (found := await ask(server))[1] == "engine-unavailable":
                pass
        # Random weights write what they like; what counts is that they were asked.
        for _ in range(4):
            assert found[0] != "a + b"
            assert found[1] not in {"engine-unavailable", "engine-error", "deadline"}
            found = await ask(server)
        async with remote:
            await until(server, "a + b")
            asked = len(remote.completions)
            for _ in range(3):
                assert await ask(server) == ("a + b", None)
            assert len(remote.completions) == asked + 3
            # So does one that is there but has no room, or nobody behind it.
            remote.script = [page("503 Service Unavailable")]
            text, reason = await ask(server)
            assert text != "a + b"
            assert reason not in {"engine-unavailable", "engine-error", "overloaded"}
        assert len(shown(server)) == 1, shown(server)


async def test_an_editor_cannot_name_an_engine(tmp_path):
    """What it sends may come from a file of the workspace."""
    async with Faulty() as thief, sglang() as model, await serve(model.url, tmp_path) as server:
        options = {"engine": thief.url, "engineKey": "command:touch /tmp/x", "engineModel": "x"}
        await server.initialize(initializationOptions=options)
        server.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {"engine": thief.url}}})
        await until(server, "a + b")
        assert thief.asked == []
        assert sum("is taken from" in message for message in shown(server)) == 2


async def test_a_wrong_key_is_said_with_the_remedy(tmp_path):
    os.environ["MIDFILL_TEST_KEY"] = "sk-very-secret"
    try:
        async with (
            sglang() as model,
            await serve(model.url, tmp_path, engine_key="env:MIDFILL_TEST_KEY") as server,
        ):
            await server.initialize()
            await until(server, "a + b")
            model.script = [page("401 Unauthorized", b"sk-very-secret")]
            assert await ask(server) == ("", "engine-unavailable")
            (message,) = shown(server)
            assert "refuses the key (401); check `engine_key`" in message
            assert "sk-very" not in server.log.read_text() + message
    finally:
        del os.environ["MIDFILL_TEST_KEY"]


async def test_a_model_that_cannot_fill_in_is_refused_once(tmp_path):
    def chat(body):
        text = body.get("regex", "x").removesuffix("[\\s\\S]*").replace("\\", "")
        return [
            STREAM,
            chunk(event({"choices": [{"text": text, "logprobs": None, "finish_reason": "stop"}]})),
        ]

    async with sglang() as model:
        model.script = chat
        async with await serve(model.url, tmp_path) as server:
            await server.initialize()
            async with asyncio.timeout(60):
                while not shown(server):
                    await ask(server)
            (message,) = shown(server)
            assert "does not fill in the middle" in message
            assert "`family" in message
            assert await ask(server) == ("", "model-failed")


async def check(url, tmp_path):
    """`midfill engine check`: its status and what it found, by question."""
    env = {"MIDFILL_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "midfill", "engine", "check", url, "--json"),
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return process.returncode, {one["name"]: one for one in json.loads(out)["checks"]}


async def test_a_server_is_checked_with_advice(tmp_path):
    async with sglang() as model:
        model.pages["/metrics"] = lambda _body: {}
        status, found = await check(model.url, tmp_path)
        assert (found["reachable"]["status"], found["fills in"]["status"]) == ("ok", "ok")
        # Its vocabulary is not here, it has one answer for all holes, and does not tell what it computes.
        assert found["model"]["status"] == "warning"
        assert "midfill model pull" in found["model"]["remedy"]
        assert found["suggests"]["found"] == "1 of 3 known holes filled"
        assert "/metrics" in found["cancels"]["found"]
        assert all(one["remedy"] for one in found.values() if one["status"] != "ok")
        assert status == 0
    status, found = await check(model.url, tmp_path)
    assert status == 1
    assert "cannot be reached" in found["reachable"]["found"]
