"""Messages that no well-behaved client sends, and what pygls would make of them: see `protocol.py`."""

import json

import pytest
from raw import frame

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
OPEN = {"textDocument": {"uri": URI, "languageId": "python", "version": 1, "text": "a = \n"}}
AT = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
EXPLAIN = {"textDocument": {"uri": URI}}


def explain(id_):
    return {"jsonrpc": "2.0", "id": id_, "method": "midfill/explain", "params": EXPLAIN}


async def test_an_unknown_request_is_refused(shared):
    shared.request(1, "no/suchMethod", {"a": 1})
    assert (await shared.answer(1))["error"]["code"] == -32601
    shared.request(2, "$/no/such", {})
    assert (await shared.answer(2))["error"]["code"] == -32601


async def test_an_unknown_notification_is_ignored(scripted):
    server = await scripted()
    for method in (
        "no/such",
        "$/no/such",
        "textDocument/didSave",
        "workspace/didChangeWatchedFiles",
        "$/setTrace",
    ):
        server.notify(method, {"value": "verbose"})
    await server.serves()
    assert [message for message in server.seen if "error" in message] == []


@pytest.mark.parametrize(
    "method", ["textDocument/inlineCompletion", "textDocument/completion", "midfill/explain"]
)
@pytest.mark.parametrize(
    "params",
    [
        None,
        [],
        7,
        "text",
        {},
        {"textDocument": {}},
        {"textDocument": None, "position": None},
        {"textDocument": {"uri": 5}},
    ],
    ids=str,
)
async def test_missing_or_wrong_params_are_refused_at_once(shared, method, params):
    shared.request(1, method, params)
    error = (await shared.answer(1))["error"]
    assert error["code"] == -32602
    assert_clean(error["message"])


@pytest.mark.parametrize(
    "position",
    [
        {"line": "a", "character": 0},
        {"line": None, "character": 0},
        {"line": 1},
        {"line": [], "character": {}},
        [0, 0],
        "0:0",
    ],
    ids=str,
)
async def test_wrong_positions_are_refused(shared, position):
    params = {"textDocument": {"uri": URI}, "position": position, "context": {"triggerKind": 2}}
    for method in ("textDocument/inlineCompletion", "textDocument/completion"):
        shared.request(1, method, params)
        assert (await shared.answer(1))["error"]["code"] == -32602


async def test_a_request_without_the_key_params_is_refused(shared):
    shared.send({"jsonrpc": "2.0", "id": 1, "method": "textDocument/inlineCompletion"})
    assert (await shared.answer(1))["error"]["code"] == -32602


@pytest.mark.parametrize(
    "method",
    [
        "textDocument/didOpen",
        "textDocument/didChange",
        "textDocument/didClose",
        "notebookDocument/didOpen",
        "notebookDocument/didChange",
        "notebookDocument/didClose",
        "workspace/didChangeConfiguration",
        "workspace/didChangeWorkspaceFolders",
        "window/workDoneProgress/cancel",
        "$/cancelRequest",
        "$/setTrace",
        "initialized",
    ],
)
async def test_notifications_with_wrong_params_are_dropped(shared, method):
    for params in (
        None,
        [],
        7,
        "text",
        {},
        {"textDocument": {}},
        {"textDocument": 3, "contentChanges": [4]},
        {"id": {}},
    ):
        shared.notify(method, params)
    await shared.serves()


@pytest.mark.parametrize("trigger", [0, 1, 2])
async def test_trigger_kinds_of_old_and_new_clients(shared, trigger):
    shared.notify("textDocument/didOpen", OPEN)
    shared.request(1, "textDocument/inlineCompletion", AT | {"context": {"triggerKind": trigger}})
    assert "items" in (await shared.answer(1))["result"]
    shared.notify("textDocument/didClose", {"textDocument": {"uri": URI}})


@pytest.mark.parametrize(
    "context", [None, {}, {"triggerKind": 7}, {"triggerKind": "2"}, 5, {"triggerKind": None}], ids=str
)
async def test_wrong_contexts_get_an_answer(shared, context):
    shared.request(1, "textDocument/inlineCompletion", AT | {"context": context})
    answer = await shared.answer(1)
    assert "result" in answer or answer["error"]["code"] == -32602


PARSE, INVALID = -32700, -32600


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", PARSE),
        (b"", PARSE),
        (b"\xff\xfe{}", PARSE),
        (b'{"jsonrpc":"2.0","id":1,"method":"\xed\xa0\x80"}', PARSE),
        (b"[" * 100_000, PARSE),
        (b"[" * 100_000 + b"]" * 100_000, PARSE),
        (b'{"a":' * 100_000, PARSE),
        (b"9" * 10_000, PARSE),
        (b"[]", INVALID),
        (b"[1,2]", INVALID),
        (json.dumps([explain(1), explain(2)]).encode(), INVALID),
        (b"null", INVALID),
        (b"7", INVALID),
        (b'"text"', INVALID),
        (b"true", INVALID),
        (b"NaN", INVALID),
        (b"{}", INVALID),
        (b'{"jsonrpc":"1.0","id":1,"method":"shutdown"}', INVALID),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', INVALID),
        (b'{"jsonrpc":"2.0","id":{},"method":"shutdown"}', INVALID),
        (b'{"jsonrpc":"2.0","id":[1],"method":"shutdown"}', INVALID),
        (b'{"jsonrpc":"2.0","id":true,"method":"shutdown"}', INVALID),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_bad_messages_are_refused_and_the_next_request_is_served(shared, body, code):
    shared.send(body)
    message = await shared.receive()
    while "method" in message:
        message = await shared.receive()
    assert (message["id"], message["error"]["code"]) == (None, code)
    assert_clean(message["error"]["message"])
    await shared.serves()


@pytest.mark.parametrize(
    "response",
    [
        {"id": 99, "result": None},
        {"id": "no such", "error": {"code": 1, "message": "x"}},
        {"id": None, "result": None},
        {"id": 99, "error": "junk"},
        {"id": 99},
        {},
        {"result": 5},
    ],
    ids=str,
)
async def test_answers_to_nothing_are_ignored(shared, response):
    shared.send({"jsonrpc": "2.0"} | response)
    await shared.serves()


async def test_an_answer_with_the_id_of_the_clients_own_request_does_not_answer_it(scripted):
    # pygls keeps both directions' requests in one table.
    server = await scripted({"hang": True})
    await hanging(server, 5)
    server.send({"jsonrpc": "2.0", "id": 5, "result": "mine"})
    server.notify("$/cancelRequest", {"id": 5})
    assert (await server.answer(5))["error"]["code"] == -32800


async def hanging(server, id_):
    """Start a request with this id that is never answered by the model."""
    await server.loaded()
    server.notify("textDocument/didOpen", OPEN)
    server.request(id_, "textDocument/inlineCompletion", AT | {"context": {"triggerKind": 2}})


@pytest.mark.parametrize("id_", [1.5, "7", 7, 0, -3, "", "é\u2028😀", 2**53 + 1], ids=repr)
async def test_a_request_is_cancelled_by_an_id_of_any_kind(shares, id_):
    server = await shares({"hang": True})
    await hanging(server, id_)
    other = "8" if id_ == 7 else str(id_) if not isinstance(id_, str) else 7
    server.notify("$/cancelRequest", {"id": other})
    server.notify("$/cancelRequest", {"id": id_})
    assert (await server.answer(id_))["error"]["code"] == -32800
    # The model is free again: what agrees with an open document would be kept for a while.
    server.notify("textDocument/didClose", {"textDocument": {"uri": URI}})


async def test_cancelling_what_is_over_or_never_was_does_nothing(scripted):
    server = await scripted()
    server.send(explain(1))
    await server.answer(1)
    for id_ in (1, 2, "x", None, {}, [], True, 1.5):
        server.notify("$/cancelRequest", {"id": id_})
    await server.serves()
    assert [message for message in server.seen if message.get("id") == 1] == [server.seen[-2]]


@pytest.mark.parametrize(
    "id_",
    [0, 1, -1, 1.5, 2**63, 10**40, "", "text", "é\u2028\U0001f600", "9" * 5000, None],
    ids=lambda v: repr(v)[:20],
)
async def test_ids_of_every_kind_are_echoed(shared, id_):
    shared.send(explain(id_))
    assert (await shared.answer(id_))["result"]["reason"] == "not-open"
    shared.request(id_, "no/such")
    assert (await shared.answer(id_))["error"]["code"] == -32601


@pytest.mark.parametrize(
    "data",
    [
        b"content-length: %d\r\n\r\n%b",
        b"CONTENT-LENGTH:%d\r\n\r\n%b",
        b"Content-Length:   %d  \r\n\r\n%b",
        b"Content-Type: application/vscode-jsonrpc; charset=utf-8\r\nContent-Length: %d\r\n\r\n%b",
        b"Content-Length: %d\r\nContent-Type: application/vscode-jsonrpc; charset=utf8\r\n\r\n%b",
        b"Content-Length: %d\r\nX-Unknown: yes: no\r\n\r\n%b",
        b"Content-Length: %d\n\n%b",
        b"\r\n\r\nContent-Length: %d\r\n\r\n%b",
    ],
)
async def test_headers_in_every_spelling(shared, data):
    body = json.dumps(explain("h")).encode()
    shared.send_bytes(data % (len(body), body))
    assert "result" in await shared.answer("h")


async def test_one_byte_at_a_time(shared):
    for byte in frame(explain("slow")):
        shared.send_bytes(bytes([byte]))
        await shared.process.stdin.drain()
    assert "result" in await shared.answer("slow")


async def test_a_hundred_requests_in_one_write(shared):
    shared.send_bytes(b"".join(frame(explain(id_)) for id_ in range(100)))
    for id_ in range(100):
        await shared.answer(id_)


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"hello",
        b"\x00\xff\n\x00",
        b"Content-Length: \r\n\r\n",
        b"Content-Length: abc\r\n\r\n{}",
        b"Content-Length: -5\r\n\r\n{}",
        b"Content-Length: 1.5\r\n\r\n{}\r\n",
        b"Content-Length: 1099511627776\r\n\r\n{}",
        b"Content-Length: 99999999999999999999999999\r\n\r\n",
        b"Content-Length: " + b"9" * 100_000 + b"\r\n\r\n",
        b"x" * 200_000,
        b"\r\n" * 1000,
        b"Content-Length: 0\r\n\r\n",
        b"Content-Length: 5\r\n\r\n{}{}{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda value: str(value)[:50],
)
async def test_garbage_between_frames_neither_kills_nor_deafens(shared, garbage):
    shared.send_bytes(garbage)
    await shared.serves()


@pytest.mark.process
async def test_a_length_of_a_terabyte_allocates_nothing(scripted):
    server = await scripted()
    before = server.memory()
    server.send_bytes(b"Content-Length: 1099511627776\r\n\r\n")
    await server.serves()
    assert server.memory() - before < 20_000_000


async def test_errors_carry_no_traceback_and_no_path(shared):
    messages = []
    for id_, (method, params) in enumerate(
        [
            ("no/such", {}),
            ("textDocument/inlineCompletion", {"textDocument": {"uri": "file:///home/someone/secret.py"}}),
            ("textDocument/completion", {"position": "file:///home/someone/secret.py"}),
            ("midfill/documentText", {"textDocument": {"uri": "file:///home/someone/secret.py"}}),
            ("midfill/explain", None),
            ("initialize", None),
        ]
    ):
        shared.request(id_, method, params)
        answer = await shared.answer(id_)
        messages.append(json.dumps(answer["error"]))
    for message in messages:
        assert_clean(message)


async def test_a_broken_capability_does_not_lock_its_editor_out(scripted):
    server = await scripted(initialize=False)
    capabilities = {
        "textDocument": {"completion": {"completionItem": 5}},
        "general": {"positionEncodings": ["utf-8"]},
        "window": [],
    }
    result = await server.initialize(
        capabilities=capabilities, workspaceFolders="junk", clientInfo=7, trace="nonsense"
    )
    assert result["capabilities"]["positionEncoding"] == "utf-8"
    await server.serves()


def assert_clean(message):
    for word in ("Traceback", 'File "', ".py", "/work", "someone", "lsprotocol", "cattrs"):
        assert word not in message
