"""Documents against a naive model (see `tests/lsp/naive.py`), and the rules of their positions."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import changes, joined, naive_edit, naive_offset, positions, texts

from midfill.text.documents import Change, Document, Encoding, Point, Snapshot, changed_lines, split_lines
from profiles import examples


@pytest.mark.fuzz
@settings(max_examples=examples())
@given(texts, st.lists(changes, max_size=6), st.sampled_from(Encoding))
def test_edits_equal_a_naive_model(text, edits, encoding):
    naive = joined(text)
    document = Document.open("file:///a", "python", 1, naive)
    for version, change in enumerate(edits, start=2):
        before, document = document, document.edit([change], version, encoding)
        naive = naive_edit(naive, change, encoding)
        assert document.text == naive
        first, old_end, new_end = document.changes_since(before.lines)
        assert before.lines[:first] == document.lines[:first]
        assert before.lines[old_end:] == document.lines[new_end:]
        assert document.lines == split_lines(naive)
        assert document.num_chars == len(naive)
        assert document.version == version


def lines_of_all_lengths(rng):
    """Lines of which some are long, with characters of every width and halves of characters."""
    alphabet = ["a", "b", " ", "é", "漢", "😀", "\ud83d", "\ude00"]
    widths = [(60, 0), (1, 1), (20, 20)]
    for _ in range(rng.randint(1, 4)):
        plain, special = rng.choice(widths)
        weights = [max(plain, 1)] * 3 + [special] * 5
        yield "".join(rng.choices(alphabet, weights, k=rng.choice([0, 3, 16_384, 20_000, 40_000])))
        yield rng.choice(["\n", "\r\n", "\r"])


def many_changes(rng, lines):
    """Changes near the ends of lines and of the pieces that long ones are cut into, and anywhere."""
    inserted = [
        "",
        "",
        "x",
        "()",
        "é",
        "😀",
        "\ud83d",
        "\ude00",
        "\n",
        "\r",
        "\r\n",
        "x\r\ny",
        "a\n\nb",
        "z" * 9_000,
    ]
    for _ in range(rng.randint(8, 40)):
        row = rng.randint(0, len(lines))
        column = rng.choice([0, 1, 4_095, 4_096, 4_097, 8_192, rng.randint(0, 40_000), 99_999])
        length = rng.choice([0, 0, 1, 2, 4_096, rng.randint(0, 40_000), 99_999])
        end = (row, column + length) if rng.random() < 0.9 else (row + rng.randint(0, 2), rng.randint(0, 9))
        places = [(row, column), end]
        if rng.random() < 0.1:
            places.reverse()
        yield Change(rng.choice(inserted), *places)
    if rng.random() < 0.1:
        yield Change("".join(lines_of_all_lengths(rng)))


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("seed", range(60))
def test_many_changes_at_once_are_those_changes_one_by_one(seed, encoding):
    rng = random.Random(seed)
    document = Document.open("file:///a", "python", 1, "".join(lines_of_all_lengths(rng)))
    edits = list(many_changes(rng, document.lines))
    by_one = document
    for change in edits:
        by_one = by_one.edit([change], 2, encoding)
    at_once = document.edit(edits, 2, encoding)
    assert at_once.lines == by_one.lines
    assert at_once.num_chars == by_one.num_chars == len(at_once.text)


@pytest.mark.parametrize("inserted", ["()", "\n"])
@pytest.mark.parametrize("backwards", [False, True])
def test_many_changes_of_one_long_line_take_time_in_proportion(inserted, backwards):
    def seconds(num):
        document = Document.open("file:///a", "python", 1, "é" * 50 * num)
        step = (0, 50 + len(inserted)) if inserted != "\n" else (1, 50)
        places = [(at * step[0], at * step[1] if step[0] == 0 else step[1]) for at in range(num)]
        if backwards:
            places = [(0, at * 50) for at in reversed(range(num))]
        changes = [Change(inserted, place, place) for place in places]
        taken = []
        for _ in range(3):
            begun = time.thread_time()
            document.edit(changes, 2, Encoding.UTF16)
            taken.append(time.thread_time() - begun)
        return min(taken)

    # Four times as many, in a line four times as long, took sixteen times as long when each cost the line.
    assert seconds(4_000) < 9 * seconds(1_000)


@pytest.mark.fuzz
@settings(max_examples=examples())
@given(texts, positions, st.sampled_from(Encoding))
def test_places_go_there_and_back(text, position, encoding):
    document = Document.open("file:///a", "python", 1, joined(text))
    point = document.point(position, encoding)
    assert document.point(document.position(point, encoding), encoding) == point
    offset = sum(map(len, document.lines[: point.line])) + point.column
    assert offset == naive_offset(document.text, position, encoding)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_the_three_line_ends_end_a_line(separator):
    assert split_lines(f"a{separator}b\nc") == [f"a{separator}b\n", "c"]


def test_a_position_past_the_end_is_clamped():
    document = Document.open("file:///a", "python", 1, "abc")
    assert document.point((0, 99), Encoding.UTF16) == Point(0, 3)
    assert document.point((7, 0), Encoding.UTF16) == Point(0, 3)


def test_a_unit_inside_a_character_means_the_place_before_it():
    document = Document.open("file:///a", "python", 1, "a😀b")
    assert document.point((0, 2), Encoding.UTF16) == Point(0, 1)
    assert document.point((0, 3), Encoding.UTF16) == Point(0, 2)
    assert document.point((0, 4), Encoding.UTF8) == Point(0, 1)


def test_a_snapshot_does_not_see_later_edits():
    document = Document.open("file:///a", "python", 1, "ab\ncd")
    snapshot = Snapshot(document, Point(0, 1))
    document.edit([Change("xyz", (0, 1), (1, 1))], 2, Encoding.UTF16)
    assert (snapshot.line_before, snapshot.line_after, snapshot.lines_after(5)) == ("a", "b", ["cd"])


@pytest.mark.parametrize(
    ("text", "ending"), [("a\r\nb", "\r\n"), ("a\nb\r\n", "\n"), ("a\rb", "\r"), ("a", "\n")]
)
def test_the_first_line_decides_the_line_ending(text, ending):
    assert Document.open("file:///a", "python", 1, text).line_ending == ending


@pytest.mark.parametrize(
    ("text", "line", "ending"),
    [
        ("a\r\nb\r\nc", 1, "\r\n"),
        ("a\r\nb\r\nc", 2, "\r\n"),
        ("a\r\nb\nc\n", 1, "\n"),
        ("a\nb\r\nc\r\n", 1, "\r\n"),
        ("a\nb\r\nc", 2, "\r\n"),
        ("a\rb\rc", 1, "\r"),
        ("a\r\r\nb\r\r\n", 0, "\r\n"),
        ("a", 0, "\n"),
    ],
)
def test_a_line_is_inserted_with_the_line_ends_around_it(text, line, ending):
    document = Document.open("file:///a", "python", 1, text)
    assert Snapshot(document, Point(line, 0)).line_ending == ending


@pytest.mark.parametrize("size", [0, 3, 255, 256, 600, 2_000])
def test_the_changed_lines_are_all_that_differs(size):
    rng = random.Random(size)
    for _ in range(50):
        old = [f"{n}\n" for n in range(size)]
        new = old.copy()
        at = rng.randint(0, size)
        inserted = ["new\n"] * rng.randint(0, 3)
        new[at : at + rng.randint(0, 3)] = inserted
        first, old_end, new_end = changed_lines(old, new)
        assert old[:first] + new[first:new_end] + old[old_end:] == new
        assert new[first:new_end] == inserted
        assert changed_lines(new, old) == (first, new_end, old_end)


@pytest.mark.fuzz
@settings(max_examples=examples())
@given(texts, changes, st.sampled_from(Encoding))
def test_the_end_of_a_change_is_behind_its_text(text, change, encoding):
    before = Document.open("file:///a", "python", 1, joined(text))
    after = before.edit([change], 2, encoding)
    end = after.end_of(change, encoding)
    assert after.clamp(end) == end
    if change.start is None or "\r" in change.text + before.text:
        return
    start, end_before = (before.point(place, encoding) for place in (change.start, change.end))
    # No client sends an end before the start, or a place that is none.
    if start > end_before or before.position(start, encoding) != change.start:
        return
    offset = sum(map(len, before.lines[: start.line])) + start.column + len(change.text)
    assert sum(map(len, after.lines[: end.line])) + end.column == offset


def test_a_place_that_is_gone_is_the_nearest_there_is():
    document = Document.open("file:///a", "python", 1, "ab\ncd\r\n")
    assert document.clamp(Point(9, 9)) == Point(2, 0)
    assert document.clamp(Point(1, 9)) == Point(1, 2)
