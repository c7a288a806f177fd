"""`midfill/costs`: what every request has cost, those that were cancelled too."""

import asyncio
import time

import pytest

from midfill.client import ServerError

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"


async def ready(client):
    """The (scripted) model has been loaded."""
    async with asyncio.timeout(60):
        while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in client.heard):
            await client.request("midfill/costs", {"after": 0})


async def ask(client, version, text):
    """Open or change the document; returns the id of a request at its end and the future of the answer."""
    document = {"uri": URI, "version": version}
    if version == 1:
        item = document | {"languageId": "python", "text": text}
        client.notify("textDocument/didOpen", {"textDocument": item})
    else:
        change = {"textDocument": document, "contentChanges": [{"text": text}]}
        client.notify("textDocument/didChange", change)
    line = text.count("\n")
    position = {"line": line, "character": len(text.rpartition("\n")[2])}
    params = {"textDocument": {"uri": URI}, "position": position, "context": {"triggerKind": 1}}
    return client.send_request("textDocument/inlineCompletion", params)


async def costs(client, after=0):
    """Once nothing runs any more."""
    while True:
        found = await client.request("midfill/costs", {"after": after})
        if all(work["freedS"] is not None for work in found["work"]):
            return found
        await asyncio.sleep(0.01)


async def test_an_answer_and_its_work_are_told_with_the_id_of_the_request(client):
    it = await client({"text": "1"})
    await ready(it)
    id_, future = await ask(it, 1, "x = ")
    await future
    found = await costs(it)
    (answer,), (work,) = found["answers"], found["work"]
    assert (answer["request"], answer["source"], answer["reason"]) == (id_, "model", None)
    assert work["request"] == id_
    assert work["end"] in {"finished", "stopped"}
    assert work["generatedTokens"] == work["deliveredTokens"] > 0
    assert work["submittedS"] <= work["firstTokenS"] <= work["freedS"] <= time.monotonic()


async def test_the_work_of_a_cancelled_request_is_told(client):
    it = await client({"text": "a" * 30, "token_delay_s": 0.02})
    await ready(it)
    id_, future = await ask(it, 1, "x = ")
    running = []
    while not running or running[0]["deliveredTokens"] < 2:
        running = (await it.request("midfill/costs", {"after": 0}))["work"]
    assert running[0]["end"] is None
    cancelled_s = time.monotonic()
    it.cancel(id_)
    with pytest.raises(ServerError):
        await future
    found = await costs(it)
    (work,) = found["work"]
    assert found["answers"] == []
    assert (work["request"], work["end"]) == (id_, "cancelled")
    assert 2 <= work["deliveredTokens"] < 30
    # One clock for all processes: how long the engine was busy for nobody can be measured from outside.
    assert cancelled_s <= work["freedS"] < cancelled_s + 2


async def test_nothing_of_the_text_is_told(client):
    it = await client({"text": "suggestion"})
    await ready(it)
    await (await ask(it, 1, "secret_name = "))[1]
    found = str(await costs(it))
    assert "secret" not in found
    assert "suggestion" not in found


@pytest.mark.parametrize("params", [None, {"after": "x"}, {"after": 1.5}])
async def test_wrong_params_are_refused(client, params):
    it = await client()
    with pytest.raises(ServerError) as error:
        await it.request("midfill/costs", params)
    assert error.value.code == -32602
