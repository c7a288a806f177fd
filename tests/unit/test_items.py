"""The items that editors show, as each kind of client needs them."""

import re

import pytest
from lsprotocol import types

from midfill.completion.answer import Answer
from midfill.lsp.items import PopupStyle, popup_item
from midfill.text.documents import Document, Encoding, Point, Snapshot

HERE = "▮"


def item(marked, text, style=None, language="python", num_replaced=0):
    before, after = marked.split(HERE)
    document = Document.open("file:///a", language, 1, before + after)
    snapshot = Snapshot(document, Point(before.count("\n"), len(before) - before.rfind("\n") - 1))
    return popup_item(snapshot, Answer(text, num_replaced), Encoding.UTF16, None, style or PopupStyle())


def columns(found):
    return found.text_edit.range.start.character, found.text_edit.range.end.character


@pytest.mark.parametrize(
    ("marked", "language", "word"),
    [
        ("x = json.lo▮", "python", "lo"),
        ("x = json.▮", "python", ""),
        ("été_1▮", "python", "été_1"),
        ("a-b▮", "python", "b"),
        (".btn { background-co▮", "css", "background-co"),
        ("(string-tr▮", "emacs-lisp", "string-tr"),
        ("x▮", "a language that nobody knows", "x"),
    ],
)
def test_an_item_begins_with_the_word_before_the_cursor(marked, language, word):
    found = item(marked, "1 + 2\n3", language=language)
    cursor = marked.index(HERE)
    assert columns(found) == (cursor - len(word), cursor)
    assert found.text_edit.new_text == word + "1 + 2\n3"
    assert found.filter_text == found.label == word + "1 + 2"


def test_columns_are_the_clients():
    assert columns(item("'🙂' + ab▮", "c")) == (7, 9)


def test_a_long_label_is_cut_and_what_it_is_found_by_is_not():
    found = item("a▮", "b" * 100)
    assert found.label == "a" + "b" * 58 + "…"
    assert found.filter_text == "a" + "b" * 100


def test_of_a_very_long_line_only_the_word_is_shown():
    found = item("x = 1;" * 1000 + "ab▮", "c")
    assert found.documentation == "abc"


def client(name=None, version=None, **item_capabilities):
    completion = types.CompletionClientCapabilities(
        completion_item=types.ClientCompletionItemOptions(**item_capabilities)
    )
    capabilities = types.ClientCapabilities(
        text_document=types.TextDocumentClientCapabilities(completion=completion)
    )
    info = None if name is None else types.ClientInfo(name, version)
    return PopupStyle.of(types.InitializeParams(capabilities=capabilities, client_info=info))


def test_a_client_that_says_nothing_gets_the_plainest_item():
    assert PopupStyle.of(types.InitializeParams(capabilities=types.ClientCapabilities())) == PopupStyle()
    found = item("a▮", "b", client())
    assert found.insert_text_mode is None
    assert found.documentation == "ab"


def test_lines_are_not_indented_again_by_clients_that_would():
    support = types.ClientCompletionItemInsertTextModeOptions(
        [types.InsertTextMode.AsIs, types.InsertTextMode.AdjustIndentation]
    )
    found = item("a▮", "b", client(insert_text_mode_support=support))
    assert found.insert_text_mode is types.InsertTextMode.AsIs


def test_documentation_is_code_where_the_client_shows_it():
    found = item("  a▮", "b\n  c", client(documentation_format=[types.MarkupKind.Markdown]))
    assert found.documentation.value == "```python\nab\n  c\n```"


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("▮", "```sh\nmake\n```\n![](https://example.org/x.png)"),
        ("▮", "a\n````\n```\n`````\nb"),
        ("```` ▮", "b"),
        ("▮", "a\r```\r![](x)"),
        ("▮", "a`b"),
    ],
)
@pytest.mark.parametrize("language", ["markdown", "python", "a`\n![](x)", ""])
def test_documentation_cannot_be_broken_out_of(marked, text, language):
    found = item(marked, text, client(documentation_format=[types.MarkupKind.Markdown]), language)
    first, *lines, last = found.documentation.value.splitlines()
    fence = re.match("`{3,}", first).group()
    assert first.removeprefix(fence) in {language, ""}
    assert last == fence
    assert not any(fence in line for line in lines)


def test_the_line_ends_of_the_file_are_inserted_and_not_shown():
    found = item("a▮", "b\r\nc")
    assert found.text_edit.new_text == "ab\r\nc"
    assert (found.documentation, found.label, found.filter_text) == ("ab\nc", "ab", "ab")


@pytest.mark.parametrize("version", ["0.11.4", "0.11.0-dev"])
def test_neovim_0_11_would_cut_the_text_of_an_edit_at_its_first_blank(version):
    found = item("x = ab▮", "c + d", client("Neovim", version))
    assert found.text_edit is None
    assert found.insert_text == "abc + d"
    assert found.filter_text == "abc + d"


@pytest.mark.parametrize(("name", "version"), [("Neovim", "0.12.0"), ("Neovim", None), ("helix", "0.11")])
def test_all_other_clients_get_an_edit(name, version):
    found = item("x = ab▮", "c + d", client(name, version))
    assert found.text_edit.new_text == "abc + d"
    assert found.insert_text is None


def test_an_item_takes_the_place_of_closers_behind_the_cursor():
    found = item("f(a▮)", "b):\n    c", num_replaced=1)
    assert columns(found) == (2, 4)
    assert found.text_edit.new_text == "ab):\n    c"


def test_where_nothing_can_be_replaced_it_ends_before_the_closers():
    found = item("f(a▮)", "b, c):\n    d", client("Neovim", "0.11.4"), num_replaced=1)
    assert found.insert_text == "ab, c"
    assert item("f(a▮)", "):\n    d", client("Neovim", "0.11.4"), num_replaced=1) is None
