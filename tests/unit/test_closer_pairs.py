"""The closers of a suggestion that an editor inserts by itself, as clients get them with each item."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midfill.completion.answer import Answer
from midfill.completion.closer_pairs import closer_pairs
from midfill.lsp.items import inline_item
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot
from profiles import examples

OPENERS, CLOSERS = "([{", ")]}"
PAIR_OF = dict(zip(OPENERS, CLOSERS, strict=True))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("(a, [b])", [(4, 6), (0, 7)]),
        ("f(a)(b)", [(1, 3), (4, 6)]),
        ("plain", []),
        # One of the text before it is closed: no opener of the text.
        ("a) + (b)", [(5, 7)]),
        ("Vec<Box<T>>", [(7, 9), (3, 10)]),
        ("f(a < b)", [(1, 7)]),
        ("Fn<A -> B>", [(2, 9)]),
        ('say("a", "b")', [(4, 6), (9, 11), (3, 12)]),
        ('f("(")', [(2, 4), (1, 5)]),
        (r'f("\")", b)', [(2, 6), (1, 10)]),
        ("f(r'[', b)", [(3, 5), (1, 9)]),
        ('f("a", \'"\')', [(2, 4), (7, 9), (1, 10)]),
        ("don't (see 'x')", [(11, 13), (6, 14)]),
        ("f<'a>(x: &'a T)", [(1, 4), (5, 14)]),
        ("`a\n${b}`", [(4, 6), (0, 7)]),
        # A quote whose line ends opens nothing.
        ('a" (b\n"c")', [(6, 8), (3, 9)]),
        ("[ :) ]", [(0, 5)]),
        # Closed by the other one: nothing of the inner one is certain.
        ("([)", [(0, 2)]),
        # The third quote is closed by three.
        ('"""doc\nmore"""', [(0, 1), (2, 11), (2, 12), (2, 13)]),
        ('"a"""', [(0, 2), (3, 4)]),
        # Cut before their closers, which come after the text.
        ("f([a], b", [(2, 4), (1, 8)]),
        ('f("a b', [(2, 6), (1, 6)]),
        ('"""a', [(0, 1), (2, 4), (2, 4), (2, 4)]),
        ('f("a b (', [(7, 8), (1, 8)]),
        ("don't", []),
        ("a < b", []),
    ],
)
def test_pairs_of_a_text(text, pairs):
    assert closer_pairs(text) == pairs


@pytest.mark.parametrize(
    ("text", "closed", "pairs"),
    [
        ("self):\n    x", ")", [(-1, 4)]),
        ("a], (c))", "])", [(-1, 1), (4, 6), (-1, 7)]),
        ('hello");', '")', [(-1, 5), (-1, 6)]),
        ('a) b", c)', '")', [(-1, 4), (-1, 8)]),
        ("String>()", ">", [(-1, 6), (7, 8)]),
        ('doc\nmore"""\n', '"""', [(-1, 8), (-1, 9), (-1, 10)]),
        # The first is closed first, and those that the text does not close come after it.
        ("a) ]", "])", [(-1, 3)]),
        ('x" + y)', ')"', [(-1, 6)]),
        ("values", ")", []),
        ("don't'", "'", [(-1, 5)]),
    ],
)
def test_pairs_of_closers_after_the_cursor(text, closed, pairs):
    assert closer_pairs(text, closed) == pairs


def by_depth(text, closed):
    """Where a text closes what `closed` closes, by counting brackets: all there is to know without quotes."""
    offsets, depth = [], 0
    for at, char in enumerate(text):
        if len(offsets) < len(closed) and not depth and char == closed[len(offsets)]:
            offsets.append(at)
        elif char in OPENERS:
            depth += 1
        elif char in CLOSERS:
            depth = max(0, depth - 1)
    return offsets


def shifted(pairs, by):
    return [(opener + by, closer + by) for opener, closer in pairs]


def joined(parts):
    text, pairs = "", []
    for part, inner in parts:
        pairs += shifted(inner, len(text))
        text += part
    return text, pairs


def bracketed(opener, inside):
    text, pairs = inside
    return opener + text + PAIR_OF[opener], [*shifted(pairs, 1), (0, len(text) + 1)]


def quoted(quote, text):
    return " " + quote + text + quote, [(1, len(text) + 2)]


def texts(in_strings):
    """Texts with nested brackets and strings, and the pairs that they were made of."""
    plain = st.sampled_from(["ab", ", ", " + ", "\n    ", "é🙂", "."]).map(lambda text: (text, []))
    string = st.builds(quoted, st.sampled_from("\"'"), st.text(in_strings, max_size=4))
    apart = st.just((" ", []))
    return st.recursive(
        st.one_of(plain, st.tuples(string, apart).map(joined)),
        lambda inner: st.builds(bracketed, st.sampled_from(OPENERS), st.lists(inner, max_size=4).map(joined)),
        max_leaves=12,
    )


def awaited(pairs, num_typed):
    """The closers that stand after the cursor if each opener was closed as it was typed."""
    return [
        closer for opener, closer in sorted(pairs, key=lambda pair: pair[1]) if opener < num_typed <= closer
    ]


@settings(max_examples=examples(4))
@given(st.lists(texts("ab ")).map(joined), st.data())
def test_pairs_agree_with_the_depth_of_brackets(made, data):
    text, _ = made
    cut = data.draw(st.integers(0, len(text)))
    standing = awaited(closer_pairs(text), cut)
    closed = "".join(text[at] for at in standing)
    # Typed up to here, the rest closes what the editor has closed.
    assert [at - cut for at in standing] == by_depth(text[cut:], closed)
    # Asked for here, the same closers are replaced.
    replaced = [closer for opener, closer in closer_pairs(text[cut:], closed) if opener < 0]
    assert replaced == by_depth(text[cut:], closed)


@settings(max_examples=examples(4))
@given(st.lists(texts("ab ()[]{")).map(joined))
def test_brackets_in_strings_change_nothing(made):
    text, pairs = made
    found = closer_pairs(text)
    # Within strings there may be more.
    assert set(pairs) <= set(found)
    assert sorted(found, key=lambda pair: (pair[1], -pair[0])) == found


@settings(max_examples=examples(4))
@given(st.text("ab (){}[]<>\"'`\\\n-", max_size=40), st.text(")]}>\"'`", max_size=4))
def test_pairs_of_any_text_are_nested(text, closed):
    pairs = closer_pairs(text, closed)
    assert all(-1 <= opener < closer <= len(text) for opener, closer in pairs)
    for num_typed in range(len(text) + 1):
        standing = [pair for pair in pairs if pair[0] < num_typed <= pair[1]]
        assert [opener for opener, _ in standing] == sorted((one for one, _ in standing), reverse=True)
    replaced = [text[closer] for opener, closer in pairs if opener < 0]
    assert closed.startswith("".join(replaced))


def item(text, after="", num_replaced=0, selected=None, line_ending="\n"):
    document = Document.open("file:///a", "python", 1, f"x{after}{line_ending}end")
    snapshot = Snapshot(document, Point(0, 1))
    answer = Answer(text.replace("\n", line_ending), num_replaced)
    return inline_item(snapshot, answer, Encoding.UTF16, selected, None)


def test_an_item_has_the_pairs_of_its_text():
    assert item("🙂(a)")["data"] == {"closers": [[1, 3]]}
    assert item("plain")["data"] == {"closers": []}


def test_an_item_has_the_closers_that_it_replaces():
    assert item("a) + (b)", ") tail", 1)["data"] == {"closers": [[-1, 1], [5, 7]]}
    # This one stays where it is.
    assert item("a", ")")["data"] == {"closers": []}


def test_offsets_count_line_ends_once():
    assert item("\n(\n)", line_ending="\r\n")["data"] == {"closers": [[1, 3]]}


def test_an_item_that_extends_a_selected_one_counts_from_its_beginning():
    selected = Change("xy\r\n", (0, 0), (0, 1))
    assert item("(a) b)", ")", 1, selected)["data"] == {"closers": [[3, 5], [-1, 8]]}
