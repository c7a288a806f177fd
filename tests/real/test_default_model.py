"""The default model through the real server: what a user gets."""

import asyncio

import pytest

from midfill.lsp.client import ServerError

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def open_at(server, marked, name):
    """Open a document; gives the params of a request at its mark ▮."""
    before, after = marked.split("▮")
    uri = f"file:///work/{name}"
    item = {"uri": uri, "languageId": name.rpartition(".")[2], "version": 1, "text": before + after}
    server.notify("textDocument/didOpen", {"textDocument": item})
    position = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
    return {"textDocument": {"uri": uri}, "position": position, "context": {"triggerKind": 1}}


async def ghost(server, marked, name="main.py"):
    params = await open_at(server, marked, name)
    items = (await server.request("textDocument/inlineCompletion", params))["items"]
    why = await server.request("midfill/explain", params)
    return (items[0]["insertText"] if items else ""), why


@pytest.mark.parametrize(
    ("name", "marked", "expected"),
    [
        ("a.py", "def add(a, b):\n    return a ▮\n", "+ b"),
        ("b.py", "import json\n\n\ndef read(text):\n    return json.lo▮\n", "ads(text)"),
        ("c.ts", "function add(a: number, b: number): number {\n  return ▮\n}\n", "a + b"),
        ("d.go", "package m\n\nfunc Add(a int, b int) int {\n\treturn ▮\n}\n", "a + b"),
        ("e.py", "for i in range(▮):\n    print(i)\n", ""),
    ],
)
async def test_known_holes_are_filled(server, name, marked, expected):
    text, why = await ghost(server, marked, name)
    assert expected in text
    assert text, why
    assert why["source"] == "model"


async def test_the_next_key_computes_only_what_is_new(server):
    head = "import math\n\n\ndef circle_area(radius):\n    return math.pi * radius ** 2\n\n\n"
    params = await open_at(server, head + "def circle_perimeter(radius):\n    return ▮\n", "reuse.py")
    uri, position = params["textDocument"]["uri"], params["position"]
    await server.request("textDocument/inlineCompletion", params)
    for version, char in enumerate("2 * ma", start=2):
        change = {"range": {"start": position, "end": position}, "text": char}
        document = {"uri": uri, "version": version}
        server.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        position = position | {"character": position["character"] + 1}
        await server.request("textDocument/inlineCompletion", params | {"position": position})
        why = await server.request("midfill/explain", params)
        assert why["promptTokens"] - why["reusedTokens"] <= 8


async def test_a_cancelled_request_leaves_the_model_to_the_next(server):
    slow = await open_at(server, "def parse(text):\n    ▮\n" + "x = 1\n" * 40, "slow.py")
    id_, future = server.send_request("textDocument/inlineCompletion", slow)
    await server.request("midfill/explain", slow)
    server.cancel(id_)
    with pytest.raises(ServerError) as error:
        await future
    assert error.value.code == -32800
    text, why = await ghost(server, "def add(a, b):\n    return a ▮\n")
    assert "+ b" in text, why


async def test_many_documents_at_once_are_all_answered(server):
    asked = [ghost(server, f"def add_{n}(a, b):\n    return a ▮\n", f"many{n}.py") for n in range(6)]
    answers = await asyncio.gather(*asked)
    assert all(text for text, _ in answers)
