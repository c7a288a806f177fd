"""Why an answer is as it is, told by request, by command and on the command line."""

import asyncio
import json
import sys

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
DOCUMENT = {"uri": URI, "languageId": "python", "version": 1, "text": "print(add(1, ))\nsecret_name = 1\n"}
HERE = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 13}, "context": {"triggerKind": 1}}


async def asked(client, tmp_path, *, text="2))\nprint(3)\n"):
    log = tmp_path / "midfill.log"
    server = await client({"text": text}, arguments=["--log-file", str(log), "--log-level", "debug"])
    async with asyncio.timeout(60):
        while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in server.heard):
            await server.request("midfill/explain", {"textDocument": {"uri": URI}})
    server.notify("textDocument/didOpen", {"textDocument": DOCUMENT})
    await server.request("textDocument/inlineCompletion", HERE)
    return server, log


async def test_the_parts_of_the_prompt_the_stages_and_the_filters(client, tmp_path):
    server, _ = await asked(client, tmp_path)
    told = await server.request("midfill/explain", {"textDocument": {"uri": URI}})
    assert (told["source"], told["reason"], told["layout"]) == ("model", None, "appending")
    assert sum(segment["tokens"] for segment in told["segments"]) == told["promptTokens"]
    assert [segment["source"] for segment in told["segments"]] == [
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "suffix",
        "<|fim_middle|>",
        "typed",
    ]
    stages = [stage["stage"] for stage in told["stages"]]
    assert stages == ["gate and reuse", "prompt", "queue", "prefill", "decode", "clean-up"]
    assert all(stage["ms"] >= 0 for stage in told["stages"])
    assert sum(stage["ms"] for stage in told["stages"]) <= told["latencyMs"] + 1
    # The model is stopped at the closer that the file has already.
    assert told["filters"] == [{"filter": "stop rules", "characters": -3}]
    assert "secret_name" not in json.dumps(told)


async def test_texts_are_told_only_when_asked_for_and_never_logged(client, tmp_path):
    server, log = await asked(client, tmp_path)
    told = await server.request("midfill/explain", {"textDocument": {"uri": URI}, "text": True})
    texts = {segment["source"]: segment["text"] for segment in told["segments"]}
    assert texts["suffix"] == "))\nsecret_name = 1\n"
    assert texts["typed"] + told["held"] == "print(add(1, "
    assert [step["after"] for step in told["texts"]] == ["model", "stop rules"]
    assert told["texts"][-1]["text"] == "2"
    await server.close()
    assert log.read_text()
    assert "secret_name" not in log.read_text()


async def test_the_command_explains_the_last_answer(client, tmp_path):
    server, _ = await asked(client, tmp_path, text="")
    for arguments in (None, [URI], [URI, True]):
        params = {"command": "midfill.explain", "arguments": arguments}
        told = await server.request("workspace/executeCommand", params)
        assert told["reason"] == "model-silent"
        assert ("texts" in told) == (arguments == [URI, True])
    shown = [params["message"] for method, params in server.heard if method == "window/showMessage"]
    assert shown == ["midfill: The model had nothing to add."] * 3


async def test_there_may_be_nothing_to_explain(client):
    server = await client({"text": "1"})
    told = await server.request("workspace/executeCommand", {"command": "midfill.explain"})
    assert told == {"source": "none", "reason": "not-open", "message": "The document is not open."}
    [shown] = [params["message"] for method, params in server.heard if method == "window/showMessage"]
    assert shown == "midfill: Nothing has been asked for yet."


async def test_the_command_line_shows_it(script, tmp_path):
    path = tmp_path / "main.py"
    path.write_text(DOCUMENT["text"])
    command = (
        sys.executable,
        "-P",
        "-m",
        "midfill",
        "complete",
        f"{path}:1:14",
        *script({"text": "2))\nx\n"}),
    )
    shown = await run(*command, "--explain")
    assert "layout appending" in shown
    assert "    | secret_name = 1\n" in shown
    assert "filter: stop rules (-3 characters)" in shown
    told = json.loads(await run(*command, "--explain", "--json"))
    assert told["text"] == "2"
    assert told["explanation"]["texts"][-1] == {"after": "stop rules", "text": "2"}
    assert "explanation" not in json.loads(await run(*command, "--json"))


async def run(*command):
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode()
