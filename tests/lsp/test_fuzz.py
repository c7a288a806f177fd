"""Messages of all kinds, sent to the real server: each request gets one answer, and it goes on."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw import Blocking

from profiles import examples

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

URI = "file:///work/main.py"
METHODS = [
    "$/cancelRequest",
    "$/setTrace",
    "initialized",
    "midfill/costs",
    "midfill/explain",
    "midfill/status",
    "notebookDocument/didChange",
    "notebookDocument/didClose",
    "notebookDocument/didOpen",
    "textDocument/completion",
    "textDocument/didChange",
    "textDocument/didClose",
    "textDocument/didOpen",
    "textDocument/didSave",
    "textDocument/inlineCompletion",
    "workspace/didChangeConfiguration",
    "workspace/didChangeWatchedFiles",
    "workspace/didChangeWorkspaceFolders",
    "workspace/executeCommand",
    "no/such/method",
]
KEYS = st.sampled_from(
    [
        *("textDocument", "uri", "languageId", "version", "text", "position", "line", "character", "range"),
        *("start", "end", "contentChanges", "context", "triggerKind", "settings", "midfill", "eagerness"),
        *("command", "arguments", "changes", "event", "added", "removed", "notebookDocument", "cells", "id"),
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from([URI, "file:///b.py", "midfill.adapter.use", "always"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6)),
    max_leaves=12,
)
messages = st.lists(st.tuples(st.sampled_from(METHODS), values), min_size=1, max_size=6)


IDS = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.json"
    path.write_text(json.dumps({"rules": [{"text": "1"}]}))
    server = Blocking("--engine", f"scripted:{path}")
    server.request("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
    server.notify("initialized", {})
    yield server
    server.close()


@settings(max_examples=examples(3), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=messages, as_requests=st.booleans())
def test_whatever_is_sent_the_next_request_is_answered(server, sent, as_requests):
    for method, params in sent:
        if as_requests:
            server.send({"jsonrpc": "2.0", "id": f"any {next(IDS)}", "method": method, "params": params})
        else:
            server.notify(method, params)
    # The answers to those above are passed over; each comes once.
    answered = []
    assert isinstance(server.request("midfill/status", {}, passed_over=answered), dict)
    ids = [message["id"] for message in answered if str(message.get("id")).startswith("any ")]
    assert len(ids) == len(set(ids))
    assert server.process.poll() is None
