"""Brackets, strings and comments of a suggestion, by the grammar or by a scan that knows quotes.

Pure: text in, offsets out. `syntax` asks the grammar; without a grammar the scan is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import indent_of, opens_block, width
from midfill.text import notation, syntax
from midfill.text.syntax import Delimiter, Outline, balance

_OPENERS = {"(": ")", "[": "]", "{": "}"}
CLOSERS = frozenset(_OPENERS.values())
_QUOTES = "\"'`"
# Each is parsed once, at half a millisecond, if the string or comment around the cursor never ends in the
# file.
_MOST_OPENINGS = 3


@lru_cache(maxsize=8)
def _outline(above: str, text: str, language_id: str) -> Outline | None:
    """Cached: several readers ask several questions about one text."""
    growing = syntax.Growing.of(above, language_id)
    return None if growing is None else growing.outline(text)


@dataclass(frozen=True, slots=True)
class _EnclosingText:
    """The multi-line string or comment that the cursor is in.

    Attributes:
        above: the lines above the cursor's, from about its first line on.
        closer: its closing mark, without blanks around.
        rest: its part after the cursor, closing mark included.
        comment: it is a comment.
        column: width of the indentation of its first line.
    """

    above: str
    closer: str
    rest: str
    comment: bool
    column: int


def enclosing(cursor: CursorContext) -> _EnclosingText | None:
    """Return the multi-line string or comment that the cursor is in, judged by the text above and below.

    None in code, and in languages without a grammar.
    """
    if not syntax.knows(cursor.language_id):
        return None
    above = cursor.farther + cursor.above
    openings = syntax.openings(above + cursor.line_before, cursor.language_id, whole=cursor.whole)
    return _enclosing(
        above,
        cursor.line_before,
        "\n".join((cursor.line_after, *cursor.following)),
        cursor.language_id,
        tuple(openings[:_MOST_OPENINGS]),
    )


@lru_cache(maxsize=8)
def _enclosing(
    above: str, before: str, below: str, language_id: str, openings: tuple[tuple[int, str, bool], ...]
) -> _EnclosingText | None:
    if not openings:
        return None
    # First with the text down to the file's end, then as if it ended at the cursor: the file may not end it.
    for end in ("", *(closer for _, closer, _ in openings)):
        text = "\n" + end + "\n" if end else below
        # The nearer the beginning, the less there is to read.
        begin = above.rfind("\n", 0, openings[-1][0]) + 1
        found = syntax.enclosing(above[begin:] + before, text, language_id)
        if found is not None:
            closers = [closer.strip() for _, closer, _ in openings]
            closer = next((one for one in closers if found.rest.rstrip().endswith(one)), "")
            head = above[above.rfind("\n", 0, max(0, begin + found.start - 1)) + 1 :]
            begins = openings[0][0] if len(openings) == 1 else begin + found.start
            line = (above + before)[(above + before).rfind("\n", 0, begins) + 1 :]
            return _EnclosingText(head, closer, found.rest, found.comment, width(line))
    return None


class OutlineReader:
    """Reads the brackets, strings and comments of a suggestion, by the grammar or by a scan."""

    def __init__(self, cursor: CursorContext) -> None:
        self._before = cursor.line_before
        self._language_id = cursor.language_id
        self._around = enclosing(cursor)
        self._above = cursor.above if self._around is None else self._around.above
        self._growing = syntax.Growing.of(self._above, cursor.language_id)
        self._is_new = True
        self._awaited: frozenset[str] | None = None

    def read(self, text: str) -> Outline:
        """Return the outline of `text`; its `open` are the closers that the cursor's line still needs."""
        whole = self._before + text
        if self._around is not None and self._stays_inside(text, self._around):
            return Outline((), (), ((-len(whole) - 1, len(text) + 1, self._around.comment),))
        if self._growing is None:
            spans = notation.comments(self._above + whole, self._language_id)
            begin = len(self._above)
            opaque = tuple((start - begin, end - begin, kind) for start, end, kind in spans if end > begin)
            found: Outline | None = Outline((), tuple(self._scanned(whole, opaque)), opaque)
        elif self._is_new:
            found = _outline(self._above, whole, self._language_id)
        else:
            found = self._growing.outline(whole)
        self._is_new = False
        if found is None:
            found = Outline((), tuple(self._scanned(whole, ())), ())
        size = len(self._before)
        earlier = tuple(one for one in found.delimiters if one.start < size)
        return Outline(
            balance(earlier)[0],
            tuple(one.shifted(-size) for one in found.delimiters if one.start >= size),
            tuple((start - size, end - size, comment) for start, end, comment in found.opaque),
        )

    def _scanned(self, text: str, opaque: tuple[tuple[int, int, bool], ...]) -> Iterator[Delimiter]:
        """Yield the brackets of a text without a grammar, except characters that are not brackets there.

        Those are in comments, or closers that nothing opened, as in `1)` or `:)`; but a closer at the
        beginning of a line counts, since its opener may be above the window.
        """
        spans = Outline((), (), opaque)
        found = tuple(one for one in scan(text) if not spans.within(one.start))
        unmatched = {one.start for one in balance(found)[1]}
        if unmatched and self._awaited is None:
            self._awaited = frozenset(balance(tuple(scan(self._above)))[0])
        for one in found:
            line = text[text.rfind("\n", 0, one.start) + 1 : one.start]
            if one.start not in unmatched or one.text in (self._awaited or ()) or not line.strip(" \t)]};,"):
                yield one

    def _stays_inside(self, text: str, around: _EnclosingText) -> bool:
        """Return whether the text has not ended the string or comment that the cursor is in."""
        before = self._before[max(0, len(self._before) - len(around.closer) + 1) :]
        if around.closer and around.closer not in before + text:
            return True
        head = self._above + self._before
        found = syntax.enclosing(head + text, around.rest, self._language_id)
        return found is not None and found.start < len(head)

    def comments(self, text: str) -> list[tuple[int, int]]:
        """Return the comments of a text, an unterminated one included."""
        found = self.read(text)
        for at, closer, comment in notation.openings(text, self._language_id):
            if comment and not found.within(at):
                found = self.read(text + closer)
                break
        return [(start, end) for start, end, comment in found.opaque if comment]


def code_above(cursor: CursorContext) -> tuple[str, ...]:
    """Return the lines above the cursor's without comments; "" for lines that begin within a string."""
    return _code(cursor.above, cursor.language_id)


@lru_cache(maxsize=8)
def _code(text: str, language_id: str) -> tuple[str, ...]:
    if syntax.knows(language_id):
        outline = syntax.outline(text, language_id)
        spans = outline.opaque if outline is not None else ()
    else:
        spans = tuple(notation.comments(text, language_id))
    lines, start = [], 0
    for line in text.split("\n"):
        end = start + len(line)
        inside = any(first < start < last for first, last, _ in spans)
        comment = min((first for first, _, kind in spans if kind and start <= first < end), default=end)
        lines.append("" if inside else line[: comment - start].rstrip())
        start = end + 1
    return tuple(lines)


def opens_block_above(cursor: CursorContext) -> bool:
    """Return whether the last non-blank line above is code after which the next line belongs deeper."""
    row = len(cursor.above.rstrip().split("\n")) - 1
    return opens_block(cursor.previous_line) and opens_block(code_above(cursor)[row])


def scan(text: str) -> Iterator[Delimiter]:
    """Yield the brackets of a text outside of quotes, for languages without a grammar."""
    quote = previous = ""
    for index, char in enumerate(text):
        if quote:
            if char == "\n" or (char == quote and previous != "\\"):
                quote = ""
        elif char in _QUOTES:
            quote = char
        elif char in _OPENERS or char in CLOSERS:
            yield Delimiter(index, index + 1, char, _OPENERS.get(char, ""))
        previous = char


def imbalance(line: str) -> int:
    """Count the closers without opener, and the openers and quotes without closer, of one line."""
    awaited, unmatched = balance(tuple(scan(line)))
    quote = previous = ""
    for char in line:
        if char in _QUOTES and previous != "\\" and quote in {"", char}:
            quote = "" if quote else char
        previous = char
    return len(awaited) + len(unmatched) + bool(quote)


def closes_outside(found: Outline, start: int) -> bool:
    """Return whether the text from `start` on closes a bracket that was opened above the cursor's line."""
    return any(one.start >= start for one in balance(found.delimiters, found.open)[1])


def indent_of_closer(text: str, cursor: CursorContext) -> str | None:
    """Return the indentation of the line whose bracket the text closes first; None if it begins otherwise."""
    if cursor.line_before.strip() or text.lstrip(" \t")[:1] not in CLOSERS:
        return None
    opened: list[Delimiter] = []
    found = syntax.outline(cursor.above, cursor.language_id)
    for one in found.delimiters if found is not None else ():
        if one.closer:
            opened.append(one)
        elif opened:
            opened.pop()
    if not opened or opened[-1].closer != text.lstrip(" \t")[0]:
        return None
    return indent_of(cursor.above[cursor.above.rfind("\n", 0, opened[-1].start) + 1 :])
