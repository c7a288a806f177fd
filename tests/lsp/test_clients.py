"""What other editors send, played to the real server: each .jsonl file in `clients` is one of them.

Its first line says which one, and whether the messages were recorded from it or written by hand.
"""

import json
from pathlib import Path

import pytest
from raw import Raw

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = sorted((Path(__file__).parent / "clients").glob("*.jsonl"))
URI = "file:///work/main.py"
RULES = [{"after": "total = su", "text": "m(values)"}, {"text": "1"}]


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
async def test_a_client_is_served_as_it_speaks(script, path):
    header, *messages = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert header["how"].startswith(("recorded", "written by hand"))
    answers = {}
    async with await Raw.start(*script(*RULES)) as server:
        for message in messages:
            if message["method"] == "initialize":
                # Nobody waits this long for a popup; a busy machine may.
                message["params"]["initializationOptions"] = {"popupBudgetMs": 10_000}
            server.send(message)
            if "id" in message:
                answers[message["method"]] = await server.answer(message["id"])
            if message["method"] == "initialized":
                await server.loaded()
        server.request("text", "midfill/documentText", {"textDocument": {"uri": URI}})
        text = (await server.answer("text"))["result"]["text"]
    assert text.rstrip("\n") in {"values = [1, 2]\ntotal = su", "values = [1, 2]\ntotal = sum"}
    result = answers["textDocument/completion"]["result"]
    (item,) = result["items"]
    assert item["label"] == item["filterText"] == item["textEdit"]["newText"] == "sum(values)"
    start, end = ({"line": 1, "character": column} for column in (8, 10))
    assert item["textEdit"]["range"] == {"start": start, "end": end}
    # What was not announced is refused, and the client goes on.
    if "textDocument/documentSymbol" in answers:
        assert answers["textDocument/documentSymbol"]["error"]["code"] == -32601


async def test_what_is_empty_is_not_there_for_vim_script(script):
    """ALE asks a server only for what it says more of than `{}`."""
    async with await Raw.start(*script(*RULES)) as server:
        offered = (await server.initialize())["capabilities"]
    assert offered["completionProvider"] == {"resolveProvider": False}


async def test_there_are_clients():
    assert {path.stem for path in CLIENTS} >= {"ale", "helix", "jupyterlab-lsp", "kate"}
