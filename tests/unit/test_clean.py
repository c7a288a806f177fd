from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from midfill.completion.postprocess.brackets import scan
from midfill.completion.postprocess.clean import clean
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.stop import Stopper, stop
from midfill.text.syntax import balance

CODE = """if x: ( ) [ ] { } " ' ` # // \\ foo(a, b) return raise else: end do def f(): class A: x = 1 , é 𝄞"""
SPACE = [
    "\t",
    " ",
    "    ",
    "\n    ",
    "\n        ",
    "\n",
    "\n\n",
    "}\n",
    "{\n",
    "/*",
    "*/",
    '\n"""\n',
    "`",
    "<<EOF\n",
    "EOF\n",
    "# ",
]
WORDS = st.sampled_from([*CODE.split(), *SPACE])
TEXT = st.lists(WORDS, max_size=24).map("".join)
LINE = TEXT.map(lambda text: text.replace("\n", " "))
LANGUAGES = st.sampled_from(
    [
        "python",
        "javascript",
        "go",
        "ruby",
        "shellscript",
        "markdown",
        "sql",
        "vue",
        "yaml",
        "rust",
        "plaintext",
        "",
    ]
)


@st.composite
def places(draw, tail=LINE):
    above = draw(TEXT)
    return CursorContext(
        draw(LINE),
        draw(tail),
        tuple(draw(TEXT).split("\n")),
        max_lines=draw(st.integers(1, 8)),
        above=above + "\n" if above else "",
        language_id=draw(LANGUAGES),
        invoked=draw(st.booleans()),
    )


def cleaned(text, cursor, *, complete=True):
    return clean(text, cursor, complete=complete, forbidden=("<|sentinel|>",))[0]


@settings(deadline=None)
@given(places(), TEXT, TEXT)
def test_more_text_never_changes_where_a_suggestion_ends(cursor, text, more):
    end = stop(text, cursor)
    if end is not None:
        assert 0 <= end <= len(text)
        assert stop(text + more, cursor) == end


@settings(deadline=None)
@given(places(), TEXT)
def test_a_stopper_that_is_asked_for_each_character_says_what_one_says_that_is_asked_once(cursor, text):
    stopper = Stopper(cursor)
    for size in range(len(text) + 1):
        end = stopper.end(text[:size])
        assert end == stop(text[:size], cursor)
        if end is not None:
            break


@settings(deadline=None)
@given(places(tail=st.just("")), TEXT)
# Moved to the next step of indentation, it is the next line again, which it was not at the cursor.
@example(CursorContext(" ", "", ("x:if",), max_lines=1, language_id="python"), "x:if")
def test_cleaning_twice_is_cleaning_once(cursor, text):
    once = cleaned(text, cursor)
    # The closers of a text that was cut at its last line come on top.
    assume(once.count("\n") < cursor.max_lines)
    assert not once or cleaned(once, cursor) == once


@settings(deadline=None)
@given(places(), TEXT, st.booleans())
def test_a_suggestion_has_neither_too_many_lines_nor_blanks_at_the_ends_of_lines(cursor, text, complete):
    lines = cleaned(text, cursor, complete=complete).split("\n")
    assert all(line == line.rstrip() for line in lines[:-1])
    assert cursor.line_after.strip() or lines[-1] == lines[-1].rstrip()
    if cursor.tail and not cursor.invoked:
        assert len(lines) == 1


@settings(deadline=None)
@given(places(tail=st.just("")), TEXT, st.booleans())
def test_a_suggestion_does_not_repeat_the_next_line(cursor, text, complete):
    lines = cleaned(text, cursor, complete=complete).split("\n")
    assert cursor.next_line not in lines[1:] or not cursor.next_line


@settings(deadline=None)
@given(places(), TEXT)
def test_sentinels_never_come_back(cursor, text):
    for middle in (text, text + "<|sentinel|>" + text, "<|sentinel|>" + text):
        assert "<|sentinel|>" not in cleaned(middle, cursor)


@settings(deadline=None)
@given(
    st.text(alphabet="ab(), ", max_size=12),
    st.text(alphabet="), ;", max_size=5),
    st.text(alphabet="ab(), ", max_size=12),
)
def test_brackets_of_a_line_are_not_worse_balanced_than_without_the_suggestion_or_with_all_of_it(
    before, after, text
):
    def imbalance(line):
        awaited, unmatched = balance(tuple(scan(line)))
        return len(awaited) + len(unmatched)

    if after.strip():
        kept = cleaned(text, CursorContext(before, after))
        assert text.startswith(kept.rstrip())
        worst = max(imbalance(before + after), imbalance(before + text + after))
        assert imbalance(before + kept + after) <= worst
