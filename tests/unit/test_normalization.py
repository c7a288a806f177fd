"""What a model writes becomes text of the file: line ends, indentation, and nothing unsafe to show."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.normalization import Normalizer, normalized
from midfill.completion.postprocess.stop import stop

TABS = CursorContext("", "", ("}",), above="func f() {\n\tg()\n}\n\nfunc h() {\n", language_id="go")
PIECES = st.lists(
    st.sampled_from([
        *("\r", "\n", "\r\n", "\t", " ", "  ", "    ", "        "),
        *("* ", "a", "return x", "if a {", "}", "else:", "#"),
        *("\x1b[31m", "\u200d", "\u202e", "é", "\ufe0f"),
    ]),
    max_size=12,
)  # fmt: skip
LANGUAGES = st.sampled_from(["python", "go", "makefile", "yaml", "javascript", "markdown", ""])
ABOVE = st.sampled_from(
    ["", "a:\n", "def f():\n\tif x:\n", "if x:\n    y\n", "all: a\n", "/**\n", "\t/**\n", "'''\n"]
)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a\r\nb\r\n", "a\nb\n"),
        ("a\rb\r", "a\nb\n"),
        ("a\r\r\nb", "a\nb"),
        ("a\r\rb", "a\n\nb"),
        ("a\nb\r\nc\rd", "a\nb\nc\nd"),
        ("\r\n\r\na", "\n\na"),
    ],
)
def test_every_line_ends_once(written, expected):
    cursor = CursorContext("x = ", "")
    assert normalized(written, cursor) == expected
    whole = Normalizer(cursor)
    for char in written:
        whole.push(char)
    whole.finish()
    assert whole.text == expected


@pytest.mark.parametrize(
    ("language", "above", "written", "expected"),
    [
        # Elements and blocks of templates.
        ("html", "<div>\n\t<ul>", "\n    <li>b</li>\n", "\n\t\t<li>b</li>\n"),
        ("html", "<div>\n\t<br>", "\n    <p>b</p>\n", "\n\t<p>b</p>\n"),
        ("xml", '<a>\n\t<b x="1">', "\n        <c/>\n", "\n\t\t<c/>\n"),
        (
            "typescriptreact",
            "\treturn (\n\t\t<div>",
            "\n      <p>a</p>\n    </div>\n",
            "\n\t\t\t<p>a</p>\n\t\t</div>\n",
        ),
        ("typescriptreact", '\t\t<div\n\t\t\ta="b"\n\t\t>', "\n      <p>a</p>\n", "\n\t\t\t<p>a</p>\n"),
        (
            "svelte",
            "<ul>\n\t{#each a as b}",
            "\n    <li>{b}</li>\n  {/each}\n",
            "\n\t\t<li>{b}</li>\n\t{/each}\n",
        ),
        ("jinja", "<ul>\n\t{% for a in b %}", "\n    <li>a</li>\n", "\n\t\t<li>a</li>\n"),
        ("cpp", "class A {\n\ttemplate <typename T>", "\n  T f();\n", "\n\tT f();\n"),
        # Where nothing is indented yet.
        ("go", "package a\n\nfunc f() {", "\n    if a {\n        b()\n    }\n", "\n\tif a {\n\t\tb()\n\t}\n"),
        ("go", "package a\n\nfunc f() {", "\n\tb()\n", "\n\tb()\n"),
        ("rust", "fn f() {", "\n    b()\n", "\n    b()\n"),
    ],
)
def test_a_step_is_what_the_line_above_opens(language, above, written, expected):
    head, _, line = above.rpartition("\n")
    cursor = CursorContext(line, "", above=head + "\n", language_id=language)
    assert normalized(written, cursor) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("    if x {\n        y()\n    }\n", "\tif x {\n\t\ty()\n\t}\n"),
        ("  if x {\n    y()\n  }\n", "\tif x {\n\t\ty()\n\t}\n"),
        ("        if x {\n                y()\n        }\n", "\tif x {\n\t\ty()\n\t}\n"),
        ("\tif x {\n\t\ty()\n\t}\n", "\tif x {\n\t\ty()\n\t}\n"),
        ("    /*\n     * y\n     */\n    y()\n", "\t/*\n\t * y\n\t */\n\ty()\n"),
        ("\tfoo(a,\n\t    b)\n", "\tfoo(a,\n\t    b)\n"),
    ],
)
def test_blanks_become_the_tabs_of_the_file(written, expected):
    assert normalized(written, TABS) == expected


@given(PIECES, LANGUAGES, ABOVE, st.sampled_from(["", "\t", "    ", "x = ", "\tx = "]))
@example(["        ", "else", ":", "\n", "    ", "a"], "python", "def f():\n\tif x:\n", "")
def test_it_does_not_matter_in_which_pieces_a_text_comes(pieces, language, above, before):
    cursor = CursorContext(before, "", above=above, language_id=language)
    whole = Normalizer(cursor)
    for piece in pieces:
        known = whole.text
        whole.push(piece)
        assert whole.text.startswith(known)
    whole.finish()
    assert whole.text == normalized("".join(pieces), cursor)
    assert "\r" not in whole.text
    assert whole.is_altered or "".join(pieces).startswith(whole.text)


@given(PIECES, LANGUAGES, ABOVE)
def test_where_it_ends_is_judged_on_what_came_through(pieces, language, above):
    cursor = CursorContext("", "", above=above, language_id=language)
    whole = Normalizer(cursor)
    for piece in pieces:
        whole.push(piece)
        if (end := stop(whole.text, cursor)) is not None:
            assert stop(normalized("".join(pieces), cursor), cursor) == end
            break


def test_text_after_an_unsafe_character_never_comes_through():
    whole = Normalizer(CursorContext("x = ", ""))
    for piece in ("1 + ", "2\x1b", "[31m", "\nprint()\n"):
        whole.push(piece)
    whole.finish()
    assert (whole.text, whole.is_cut) == ("1 + 2", True)
