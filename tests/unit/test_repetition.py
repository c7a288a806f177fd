"""Lines that run away, and lines that only look like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.completion.postprocess.repetition import GrowingLine, cut_at_limit


def kept(line, around=(), before=""):
    cut = GrowingLine(around, before).cut(line)
    return None if cut is None else line[:cut]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("for _ in range(n):  # 1" + "0" * 200, "for _ in range(n):"),
        ("x = " + "a" * 200, "x ="),
        ("a" * 200, ""),
        ("x = [0" + ", 0" * 100, "x = [0"),
        ("the man and " * 30, "the man and"),
        ("let x = a" + ".clone()" * 50, "let x = a.clone()"),
        ("x = 1" + " " * 200 + "# a", "x = 1"),
        ("x = " + "(" * 200, "x ="),
        ("print('" + "very " * 60, "print('very"),
        ("# " + "-" * 200, "# " + "-" * 77),
        ("=" * 200, "=" * 79),
        # Dots behind a word are no ruler.
        ("Wait" + "." * 200, "Wait"),
        ("# Foo " + "-" * 200, "# Foo " + "-" * 73),
    ],
)
def test_of_a_line_that_runs_away_the_beginning_is_kept(line, expected):
    assert kept(line) == expected


def test_dots_behind_a_word_that_stands_there_already_are_no_ruler():
    assert kept("." * 200, before="Wait") == ""


@pytest.mark.parametrize(
    "line",
    [
        "# " + "-" * 77,
        "=" * 79,
        "|---|---|---|---|",
        "[" + "0, " * 15 + "0]",
        "{" + "0x00, " * 12 + "}",
        "sha = '" + "0" * 64 + "'",
        "x = 1" + " " * 40 + "# a",
        "and then he said that he said that she said that it was so, and that was all that there was to it.",
    ],
)
def test_rulers_tables_and_arrays_are_no_repetition(line):
    assert kept(line) is None


def test_a_row_may_be_as_wide_as_those_around():
    row = "    " + "0, " * 60
    assert kept(row) is not None
    assert kept(row, [row]) is None
    assert kept("0, " * 60, [row], before="    ") is None
    assert kept(4 * row, [row]) is not None


def test_a_ruler_is_as_wide_as_those_around_wherever_it_begins():
    assert kept("-" * 200, ["# " + "-" * 60], before="# ") == "-" * 60


def test_at_the_token_limit_a_short_repetition_counts():
    assert cut_at_limit("x = [0" + ", 0" * 8, ()) == len("x = [0")
    assert cut_at_limit("x = [0, 0, 0", ()) is None
    assert cut_at_limit("x = [0" + ", 0" * 8, ["y = [0" + ", 0" * 8 + "]"]) is None
    assert cut_at_limit("# " + "-" * 40, ()) is None


@given(
    st.lists(st.sampled_from(["a", "0, ", "-", "ab", " ", "x.y", "0" * 50, "-" * 60, "ab" * 40])), st.text()
)
def test_more_of_a_line_never_changes_where_it_is_cut(parts, more):
    line = "".join(parts)
    growing = GrowingLine(())
    for size in range(len(line) + 1):
        if (cut := growing.cut(line[:size])) is not None:
            assert GrowingLine(()).cut(line + more) == cut
            break
    else:
        assert GrowingLine(()).cut(line) is None
