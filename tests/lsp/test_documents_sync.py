"""The server's copy of a document equals the editor's, whatever edits come and in whatever encoding."""

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"


def place(line, character):
    return {"line": line, "character": character}


def span(start, end):
    return {"start": place(*start), "end": place(*end)}


def opened(text, uri=URI, version=1, language="python"):
    return {"textDocument": {"uri": uri, "languageId": language, "version": version, "text": text}}


async def open_(server, text, uri=URI, version=1):
    server.notify("textDocument/didOpen", opened(text, uri, version))


def edited(*edits, version=2, uri=URI):
    return {"textDocument": {"uri": uri, "version": version}, "contentChanges": list(edits)}


async def text_of(server, uri=URI):
    server.request("text", "midfill/documentText", {"textDocument": {"uri": uri}})
    answer = await server.answer("text")
    return answer["result"]["text"] if "result" in answer else answer["error"]["code"]


async def test_an_incremental_change(shared):
    await open_(shared, "ab\ncd\n")
    shared.notify("textDocument/didChange", edited({"range": span((0, 1), (1, 1)), "text": "X"}))
    assert await text_of(shared) == "aXd\n"


@pytest.mark.parametrize(
    "extra", [{}, {"range": None}, {"rangeLength": 3}, {"range": None, "rangeLength": None}], ids=str
)
async def test_full_text_is_taken_though_incremental_was_announced(shared, extra):
    await open_(shared, "ab\ncd\n")
    shared.notify("textDocument/didChange", edited({"text": "new\n"} | extra))
    assert await text_of(shared) == "new\n"


async def test_each_change_of_a_notification_sees_the_one_before(shared):
    await open_(shared, "")
    edits = [{"range": span((0, 0), (0, 0)), "text": text} for text in ("c", "b", "a")]
    shared.notify("textDocument/didChange", edited(*edits, {"range": span((0, 1), (0, 2)), "text": "\n"}))
    assert await text_of(shared) == "a\nc"


@pytest.mark.parametrize("length", [0, -1, 999, None, 1.5], ids=str)
async def test_a_false_range_length_does_not_matter(shared, length):
    await open_(shared, "abc")
    shared.notify(
        "textDocument/didChange", edited({"range": span((0, 1), (0, 2)), "rangeLength": length, "text": "X"})
    )
    assert await text_of(shared) == "aXc"


async def test_versions_that_repeat_jump_or_go_back_are_taken_as_they_come(shared):
    await open_(shared, "0", version=5)
    for turn, version in enumerate([5, 900, 3, -1, 0, 2**31 - 1, 1]):
        shared.notify("textDocument/didChange", edited({"text": str(turn)}, version=version))
        assert await text_of(shared) == str(turn)


@pytest.mark.parametrize("version", [None, "7", 2**70], ids=str)
async def test_a_strange_version_loses_no_edit_or_is_dropped_whole(shared, version):
    await open_(shared, "old")
    shared.notify("textDocument/didChange", edited({"text": "new"}, version=version))
    assert await text_of(shared) == "new"


async def test_a_change_without_a_version_is_taken(shared):
    await open_(shared, "old")
    shared.notify(
        "textDocument/didChange", {"textDocument": {"uri": URI}, "contentChanges": [{"text": "new"}]}
    )
    assert await text_of(shared) == "new"


async def test_a_change_without_changes_changes_nothing(shared):
    await open_(shared, "old")
    shared.notify("textDocument/didChange", edited())
    assert await text_of(shared) == "old"


async def test_opening_again_replaces_the_text(shared):
    await open_(shared, "one")
    await open_(shared, "two")
    assert await text_of(shared) == "two"


async def test_closing_twice_and_changing_what_is_closed_are_harmless(shared):
    await open_(shared, "one")
    for _ in range(2):
        shared.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
    shared.notify("textDocument/didChange", edited({"text": "ghost"}))
    assert await text_of(shared) == -32602


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\ufeffx = 1\n",
        "a\0b",
        "\ud83d",
        "\ude00\ud83d",
        "a\x0cb\x0bc\x85d\u2028e\u2029f\n",
        "a\r\nb\rc\nd",
        "👩\u200d💻" * 3,
        "\r",
        "\r\n",
    ],
    ids=ascii,
)
async def test_odd_texts_are_kept_as_they_are(shared, text):
    await open_(shared, text)
    assert await text_of(shared) == text


async def test_only_the_three_line_ends_of_the_protocol_end_a_line(shared):
    await open_(shared, "a\x0cb\x85c\u2028d\x1ce\rf\r\ng\nh")
    for line in (3, 2, 1, 0):
        shared.notify(
            "textDocument/didChange", edited({"range": span((line, 0), (line, 0)), "text": str(line)})
        )
    assert await text_of(shared) == "0a\x0cb\x85c\u2028d\x1ce\r1f\r\n2g\n3h"


@pytest.mark.parametrize(
    ("where", "result"),
    [
        (((0, 99), (0, 99)), "abcX\nde"),
        (((1, 99), (1, 99)), "abc\ndeX"),
        (((99, 0), (99, 5)), "abc\ndeX"),
        (((0, 1), (99, 99)), "aX"),
        (((2**40, 0), (2**80, 2**80)), "abc\ndeX"),
        (((-1, 4), (-1, 4)), "Xabc\nde"),
        (((0, -5), (0, 1)), "Xbc\nde"),
        (((1, 1), (0, 1)), "aXe"),
    ],
    ids=str,
)
async def test_positions_outside_the_text_are_clamped(shared, where, result):
    await open_(shared, "abc\nde")
    shared.notify("textDocument/didChange", edited({"range": span(*where), "text": "X"}))
    assert await text_of(shared) == result


@pytest.mark.parametrize(
    ("offered", "chosen", "column"),
    [
        (None, "utf-16", 3),
        ([], "utf-16", 3),
        (["utf-8"], "utf-8", 5),
        (["utf-16"], "utf-16", 3),
        (["utf-32", "utf-16"], "utf-32", 2),
        (["utf-7", "utf-8"], "utf-8", 5),
        (["utf-7"], "utf-16", 3),
    ],
    ids=str,
)
async def test_the_position_encoding_is_negotiated(scripted, offered, chosen, column):
    server = await scripted({"after": "a😀", "text": "!"}, initialize=False)
    capabilities = {} if offered is None else {"general": {"positionEncodings": offered}}
    assert (await server.initialize(capabilities=capabilities))["capabilities"]["positionEncoding"] == chosen
    await server.loaded()
    await open_(server, "a😀")
    params = {"textDocument": {"uri": URI}, "position": place(0, column), "context": {"triggerKind": 2}}
    server.request(1, "textDocument/inlineCompletion", params)
    (item,) = (await server.answer(1))["result"]["items"]
    assert item["range"] == span((0, column), (0, column))


@pytest.mark.parametrize(
    "uri",
    [
        "untitled:Untitled-1",
        "vscode-notebook-cell:/c%3A/a/b.ipynb#W0sZmlsZQ%3D%3D",
        "file:///c%3A/Users/a%20b/x.py",
        "file:///C:/Users/a b/x.py",
        "file://server/share/x.py",
        "file:///tmp/%ff%fe.py",
        "file:///a%",
        "git:/x.py?%7B%22ref%22%3A%22~%22%7D",
        "http://[::1",
        "",
        " ",
        "not a uri",
        "x" * 10_000,
        "file:///é😀.py",
    ],
    ids=lambda uri: ascii(uri)[:30],
)
async def test_odd_uris_are_names_and_nothing_more(shared, uri):
    await open_(shared, "a = ", uri=uri)
    shared.notify("textDocument/didChange", edited({"text": "b = "}, uri=uri))
    params = {"textDocument": {"uri": uri}, "position": place(0, 4), "context": {"triggerKind": 2}}
    shared.request(1, "textDocument/inlineCompletion", params)
    assert "result" in await shared.answer(1)
    assert await text_of(shared, uri) == "b = "
    shared.notify("textDocument/didClose", {"textDocument": {"uri": uri}})


async def test_an_unopened_document_is_not_read_from_disk(scripted, tmp_path):
    path = tmp_path / "there.py"
    path.write_text("a = ")
    server = await scripted({"text": "1"})
    await server.loaded()
    params = {"textDocument": {"uri": path.as_uri()}, "position": place(0, 4), "context": {"triggerKind": 1}}
    server.request(1, "textDocument/inlineCompletion", params)
    assert (await server.answer(1))["result"]["items"] == []
    server.request(2, "midfill/explain", {"textDocument": {"uri": path.as_uri()}})
    assert (await server.answer(2))["result"]["reason"] == "not-open"
