"""Random edits in every encoding, in the real server and in a naive model."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import changes, joined, naive_edit, texts
from raw import Blocking

from profiles import examples

URI = "file:///work/main.py"
ENCODINGS = ["utf-8", "utf-16", "utf-32"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A server for each encoding."""
    path = tmp_path_factory.mktemp("property") / "script.json"
    path.write_text("{}")
    started = {}
    for encoding in ENCODINGS:
        server = started[encoding] = Blocking("--engine", f"scripted:{path}")
        capabilities = {"general": {"positionEncodings": [encoding]}}
        server.request("initialize", {"processId": None, "rootUri": None, "capabilities": capabilities})
        server.notify("initialized", {})
    yield started
    for server in started.values():
        server.close()


def span(*places):
    return dict(
        zip(("start", "end"), ({"line": line, "character": column} for line, column in places), strict=True)
    )


def as_json(change):
    return {"text": change.text} | (
        {"range": span(change.start, change.end)} if change.start is not None else {}
    )


@pytest.mark.slow
@pytest.mark.fuzz
@settings(max_examples=examples(), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=texts, edits=st.lists(st.lists(changes, max_size=3), max_size=4), encoding=st.sampled_from(ENCODINGS)
)
def test_random_edits_equal_a_naive_model(servers, text, edits, encoding):
    server = servers[encoding]
    naive = joined(text)
    item = {"uri": URI, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})
    for version, group in enumerate(edits, start=2):
        params = {"textDocument": {"uri": URI, "version": version}, "contentChanges": [*map(as_json, group)]}
        server.notify("textDocument/didChange", params)
        for change in group:
            naive = naive_edit(naive, change, encoding)
    assert server.request("midfill/documentText", {"textDocument": {"uri": URI}})["text"] == naive
