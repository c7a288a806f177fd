"""llama.cpp's Vim plugin, as the replay plays it: what it sends, what it keeps, what it shows."""

from pathlib import Path

import pytest

from midfill.bench.llama_vim import LlamaVim, Options, _worthwhile
from midfill.text.documents import Document, Encoding

LINES = "".join(f"line_{n}\n" for n in range(400))


def vim(**options):
    return LlamaVim(Path("no.gguf"), Options(**options))


def context(plugin, text, line, column):
    document = Document.open("file:///a.py", "python", 1, text)
    whole = document.lines[line].rstrip("\n")
    return plugin._context(document, line, whole[:column], whole[column:])


def test_it_sends_whole_lines_and_the_line_up_to_the_cursor():
    sent = context(vim(lines_before=2, lines_after=1), LINES, 100, 3)
    assert (sent.prefix, sent.middle, sent.suffix) == ("line_98\nline_99\n", "lin", "e_100\nline_101\n")
    assert context(vim(), LINES, 300, 0).prefix.count("\n") == 256


def test_on_a_line_of_blanks_it_starts_from_the_beginning():
    sent = context(vim(), "a:\n    \nb\n", 1, 4)
    assert (sent.middle, sent.suffix, sent.indent) == ("", "\nb\n\n", 0)


def test_the_rest_of_a_kept_answer_is_shown_while_it_is_typed():
    plugin = vim()
    plugin._keep(context(plugin, "a\nx = \nb\n", 1, 4), "1 + 2")
    assert plugin._kept(context(plugin, "a\nx = \nb\n", 1, 4)) == ("1 + 2", "cache")
    assert plugin._kept(context(plugin, "a\nx = 1 +\nb\n", 1, 7)) == (" 2", "typed-through")
    assert plugin._kept(context(plugin, "a\nx = 2\nb\n", 1, 5))[0] is None
    assert plugin._kept(context(plugin, "a\nx = 1 + 2\nb\n", 1, 9))[0] is None
    # What follows has changed.
    assert plugin._kept(context(plugin, "a\nx = \nc\n", 1, 4))[0] is None


def test_an_answer_is_kept_for_windows_that_have_moved_down():
    plugin = vim(lines_before=3)
    plugin._keep(context(plugin, LINES, 100, 3), "x")
    moved = "".join(LINES.splitlines(keepends=True)[98:])
    assert plugin._kept(context(plugin, moved, 2, 3)) == ("x", "cache")


def test_it_does_not_keep_more_than_the_plugin():
    plugin = vim(lines_before=1)
    for line in range(1, 350):
        plugin._keep(context(plugin, LINES, line, 0), "x")
    assert len(plugin._cache) == 250


def test_looking_ahead_is_asking_as_if_the_suggestion_were_accepted():
    plugin = vim(lines_before=3)
    document = Document.open("file:///a.py", "python", 1, "a\nif x:\nb\n")
    ahead = plugin._accepted(document, 1, "if x:", "\n    y()\n    z")
    assert (ahead.prefix, ahead.middle, ahead.suffix) == ("a\nif x:\n    y()\n", "    z", "\nb\n\n")


@pytest.mark.parametrize(
    ("content", "line", "column", "shown"),
    [
        ("y = 2\n\n", 1, 0, "y = 2"),
        ("\n", 1, 0, ""),
        ("    y", 2, 4, "y"),  # on a line of blanks
        (")", 0, 6, ""),  # it stands behind the cursor
        ("b = 1", 1, 0, ""),  # the next line with text
        ("b = 1\nc = 1", 1, 0, ""),
        ("b = 1\nd", 1, 0, "b = 1\nd"),
    ],
)
def test_what_repeats_the_text_around_is_not_shown(content, line, column, shown):
    document = Document.open("file:///a.py", "python", 1, "print()\n\n    \nb = 1\nc = 1\n")
    assert _worthwhile(content, document, document.point((line, column), Encoding.UTF16)) == shown
