"""Recorded and made-up typing."""

import gzip
import json

import pytest

from midfill.bench.trace import cursor_after, read_trace, total_s
from midfill.bench.virtual_user import generate
from midfill.errors import MidfillError
from midfill.text.documents import Change

URI = "file:///replay/a.py"


def opened(t=0, text="x = \n"):
    item = {"uri": URI, "languageId": "python", "version": 1, "text": text}
    return {"t": t, "send": {"method": "textDocument/didOpen", "params": {"textDocument": item}}}


def changed(t, column, text, end=None, uri=URI):
    place = {"start": {"line": 0, "character": column}, "end": {"line": 0, "character": end or column}}
    params = {"textDocument": {"uri": uri, "version": 2}, "contentChanges": [{"range": place, "text": text}]}
    return {"t": t, "send": {"method": "textDocument/didChange", "params": params}}


def request(t, column):
    params = {
        "textDocument": {"uri": URI},
        "position": {"line": 0, "character": column},
        "context": {"triggerKind": 2},
    }
    return {"t": t, "id": 1, "send": {"method": "textDocument/inlineCompletion", "params": params}}


CANCELLED = {"t": 1200, "send": {"method": "$/cancelRequest", "params": {"id": 1}}}
CLOSED = {
    "t": 2000,
    "send": {"method": "textDocument/didClose", "params": {"textDocument": {"uri": URI}}},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_becomes_keys_with_gaps_and_requests(tmp_path):
    rows = [opened(), changed(1000, 4, "1"), request(1050, 5), CANCELLED, changed(1200, 5, "2"), CLOSED]
    (session,) = read_trace(write(tmp_path / "t.jsonl", *rows))
    assert (session.uri, session.language_id, session.rest_s) == (URI, "python", pytest.approx(0.8))
    assert [key.gap_s for key in session.keys] == [pytest.approx(1.0), pytest.approx(0.2)]
    assert [key.request_after_s for key in session.keys] == [pytest.approx(0.05), None]
    assert [key.cursor for key in session.keys] == [(0, 5), (0, 6)]
    assert [document.text for document in session.documents()] == ["x = 1\n", "x = 12\n"]
    assert total_s([session]) == pytest.approx(2.0)


def test_a_compressed_trace_is_read(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    plain = write(tmp_path / "t.jsonl", opened(), changed(1, 4, "1"))
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(read_trace(path)[0].keys) == 1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a row"),
        ("{}", "'t'"),
        (json.dumps({"t": 5}), "'send'"),
        (json.dumps(changed(2, 4, "a", uri="file:///other.py")), "its document is not the one that is open"),
        (json.dumps(request(5, 4)), "a request before the first key"),
        (json.dumps({"t": -1, "send": {"method": "textDocument/didChange", "params": {}}}), "before that of"),
        (json.dumps({"t": 1, "send": {"method": "textDocument/didChange", "params": {}}}), "not a row"),
        (json.dumps({"t": 1, "send": {"method": "textDocument/didChange", "params": None}}), "not a row"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, why):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(opened()) + "\n\n" + row + "\n")
    with pytest.raises(MidfillError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 3: this is not a row of a typing trace")
    assert why in str(error.value)


def test_files_that_are_no_trace_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(MidfillError, match=r"Cannot read .*there is no such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "plain.gz").write_text("not compressed")
    with pytest.raises(MidfillError, match=r"Cannot read .*plain\.gz"):
        read_trace(tmp_path / "plain.gz")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(MidfillError, match="line 1: this is not text in UTF-8"):
        read_trace(tmp_path / "latin.jsonl")
    with pytest.raises(MidfillError, match="has no session with typing in it"):
        read_trace(write(tmp_path / "empty.jsonl", opened()))


@pytest.mark.parametrize(
    ("change", "cursor"),
    [
        (Change("a", (3, 4), (3, 4)), (3, 5)),
        (Change("", (3, 4), (3, 9)), (3, 4)),
        (Change("a\n  b", (3, 4), (3, 4)), (4, 3)),
        (Change("😀", (0, 0), (0, 0)), (0, 2)),
    ],
)
def test_the_cursor_stands_behind_what_was_inserted(change, cursor):
    assert cursor_after(change) == cursor


SOURCE = "".join(f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(20))


@pytest.fixture
def tree(tmp_path):
    for name in ("a.py", "sub/b.py", "node_modules/c.py", ".git/d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SOURCE)
    (tmp_path / "README.md").write_text("words " * 200)
    (tmp_path / "binary.py").write_bytes(b"\xff" * 500)
    (tmp_path / "windows.py").write_bytes(b"a = 1\r\n" * 100)
    return tmp_path


def test_made_up_typing_is_the_same_for_the_same_seed(tree):
    assert generate(tree, 7, 12) == generate(tree, 7, 12)
    assert generate(tree, 7, 12) != generate(tree, 8, 12)
    assert generate(tree, 7, 12)[:5] == generate(tree, 7, 5)


def test_made_up_typing_ends_in_the_file_as_it_was(tree):
    sessions = generate(tree, 1, 40)
    assert {session.uri.split("/", 5)[5] for session in sessions} == {"a.py", "sub/b.py"}
    assert len({session.uri for session in sessions}) == 40
    for session in sessions:
        assert session.documents()[-1].text == SOURCE
        assert session.text != SOURCE


def test_made_up_typing_keeps_to_the_statistics_of_people(tree):
    keys = [key for session in generate(tree, 3, 300) for key in session.keys[1:]]
    gaps = sorted(key.gap_s for key in keys)
    for part, gap_s in ((0.1, 0.045), (0.25, 0.068), (0.5, 0.091), (0.75, 0.136), (0.9, 0.203)):
        assert gaps[int(part * len(gaps))] == pytest.approx(gap_s, rel=0.1)
    corrections = sum(not change.text for key in keys for change in key.changes)
    assert 0.02 < corrections / len(keys) < 0.08


def test_a_folder_without_code_is_named(tmp_path):
    with pytest.raises(MidfillError, match="has no source file of 400 to 100000 bytes"):
        generate(tmp_path, 0, 3)
