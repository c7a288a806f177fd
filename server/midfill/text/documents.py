r"""Documents as the editor has them: text, versions, and positions in the client's encoding.

A `Document` is an immutable value made of lines, each with its own terminator. Only \n, \r\n and \r end a
line, as the LSP specification says (`str.splitlines` knows more, and would shift every later line). An edit
makes a new `Document` and costs one copy of a list of references, so a `Snapshot` taken before an `await`
stays valid while the user types.

Columns inside midfill are code points. Only this module knows that clients count otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from midfill.text.languages import identify

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPLIT_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_BLOCK = 256
# Enough of the first line to find an interpreter in it.
_FIRST_LINE_CHARS = 200
_NEAR = 20
# From `_MANY` changes at once on, lines longer than `_LONG` characters are cut into pieces of `_PIECE`.
_MANY = 8
_LONG = 16_384
_PIECE = 4_096
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Encoding(StrEnum):
    """The unit of an LSP column; the values are the protocol's."""

    UTF8 = "utf-8"
    UTF16 = "utf-16"
    UTF32 = "utf-32"


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A position between two characters: zero-based line, and column in code points."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Change:
    """One content change as the client sent it.

    Attributes:
        text: the new text.
        start: (line, character) in the client's encoding; None if `text` is the whole document.
        end: likewise; None if `text` is the whole document.
    """

    text: str
    start: tuple[int, int] | None = None
    end: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One change: `lines[first:old_end]` of the previous version became `[first:new_end]` of this one."""

    lines: list[str]
    first: int
    old_end: int
    new_end: int


@dataclass(frozen=True)
class Document:
    """One version of one text.

    Attributes:
        language_id: midfill's identifier from `languages`, not the editor's.
        lines: never empty; only the last item has no terminator. Never changed in place.
        num_chars: length of the text in code points.
        sent_language: the identifier that the editor sent.
        edit_before: the change from the previous version, if that was one change of some lines.
    """

    uri: str
    language_id: str
    version: int
    lines: list[str]
    num_chars: int
    sent_language: str = ""
    edit_before: Edit | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def open(uri: str, language_id: str, version: int, text: str) -> Document:
        """Make the first version of a document. `language_id` may be any editor's identifier, or ""."""
        lines = split_lines(text)
        language = identify(language_id, uri, lines[0][:_FIRST_LINE_CHARS])
        return Document(uri, language, version, lines, _count(lines), language_id)

    @cached_property
    def text(self) -> str:
        """The whole text, exactly as the client has it."""
        return "".join(self.lines)

    @property
    def line_ending(self) -> str:
        r"""The terminator of the first line: "\n", "\r\n" or "\r"; "\n" in a document of one line."""
        first = self.lines[0]
        return first[content_length(first) :] or "\n"

    def edit(self, changes: Iterable[Change], version: int, encoding: Encoding) -> Document:
        """Return the document after changes, applied in order. Each sees the result of the one before.

        Versions are recorded, not checked: clients repeat them and go back, and the last text wins.
        """
        changes = list(changes)
        draft = _Draft(self.lines.copy(), self.num_chars, encoding, cuts=len(changes) >= _MANY)
        for change in changes:
            draft.apply(change)
        edit = Edit(self.lines, *draft.spliced) if len(changes) == 1 and draft.spliced else None
        return replace(
            self, lines=draft.finish(), num_chars=draft.num_chars, version=version, edit_before=edit
        )

    def changes_since(self, lines: Sequence[str]) -> tuple[int, int, int]:
        """Return the difference to the lines of an earlier version; see `changed_lines`.

        If one change led from the previous version to this one, that is used without comparing lines: a key
        costs no more in a long document than in a short one.
        """
        edit = self.edit_before
        if edit is not None and edit.lines is lines:
            return edit.first, edit.old_end, edit.new_end
        return changed_lines(lines, self.lines)

    def point(self, position: tuple[int, int], encoding: Encoding) -> Point:
        """Return the position of a client's (line, character), clamped into the document."""
        return locate(self.lines, position, encoding)

    def clamp(self, point: Point) -> Point:
        """Return the position, or the nearest one that this text has."""
        line = min(point.line, len(self.lines) - 1)
        return Point(line, min(point.column, len(self.lines[line].rstrip("\r\n"))))

    def end_of(self, change: Change, encoding: Encoding) -> Point:
        """Return the position after the text that the last change inserted."""
        start = Point(0, 0) if change.start is None else self.point(change.start, encoding)
        *above, last = split_lines(change.text)
        column = len(last) if above else start.column + len(last)
        return self.clamp(Point(start.line + len(above), column))

    def position(self, point: Point, encoding: Encoding) -> tuple[int, int]:
        """Return the client's (line, character) of a position."""
        return point.line, count_units(self.lines[point.line][: point.column], encoding)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document and the cursor's position in it, at one moment."""

    document: Document
    cursor: Point

    @property
    def line_before(self) -> str:
        """The current line up to the cursor."""
        return self.document.lines[self.cursor.line][: self.cursor.column]

    @property
    def line_after(self) -> str:
        """The rest of the current line, without its terminator."""
        line = self.document.lines[self.cursor.line]
        return line[self.cursor.column : content_length(line)]

    @property
    def line_ending(self) -> str:
        r"""The terminator of the cursor's line, or of the nearest line with one: "\n", "\r\n" or "\r"."""
        lines, at = self.document.lines, self.cursor.line
        near = [lines[at], *reversed(lines[max(0, at - _NEAR) : at]), *lines[at + 1 : at + 1 + _NEAR]]
        ends = [line[content_length(line) :] for line in near]
        # If other lines end otherwise, a single carriage return is an error.
        usual = (end for end in ends if "\n" in end)
        return next(usual, None) or next(filter(None, ends), "\n")

    def lines_after(self, max_lines: int) -> list[str]:
        """Return the lines below the cursor's line, without terminators."""
        below = self.document.lines[self.cursor.line + 1 : self.cursor.line + 1 + max_lines]
        return [line[: content_length(line)] for line in below]

    def insert(self, text: str, num_replaced: int = 0) -> Snapshot:
        """Return the snapshot with `text` inserted, and the cursor after it.

        The text replaces `num_replaced` characters after the cursor on its line.
        """
        line, column = self.cursor.line, self.cursor.column
        change = Change(text, (line, column), (line, column + num_replaced))
        document = self.document.edit([change], self.document.version, Encoding.UTF32)
        *above, last = split_lines(text)
        return Snapshot(document, Point(line + len(above), len(last) + (0 if above else column)))


def split_lines(text: str) -> list[str]:
    r"""Split after each \n, \r\n or \r, which stay. The last item has no terminator and may be "".

    Surrogate halves that edits have brought together become the character that the client sees.
    """
    if not text.isascii() and _SPLIT_PAIR.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if "\r" not in text:
        *full, last = text.split("\n")
        return [line + "\n" for line in full] + [last]
    full = _LINE.findall(text)
    return [*full, text[sum(map(len, full)) :]]


def content_length(line: str) -> int:
    """Return the length of a line without its terminator."""
    if line.endswith("\r\n"):
        return len(line) - 2
    return len(line) - line.endswith(("\n", "\r"))


def locate(lines: Sequence[str], position: tuple[int, int], encoding: Encoding) -> Point:
    """Return the position of a client's (line, character).

    As the specification says, a character past the end of a line means its end; likewise a line past the end
    means the end of the document. A unit inside a character means the position before it.
    """
    line, character = position
    if line < 0:
        return Point(0, 0)
    if line >= len(lines):
        return Point(len(lines) - 1, content_length(lines[-1]))
    text = lines[line]
    content = text[: content_length(text)]
    return Point(line, count_code_points(content, max(character, 0), encoding))


def count_code_points(text: str, units: int, encoding: Encoding) -> int:
    """Return the number of whole characters within the first `units` units of `text`."""
    if encoding is Encoding.UTF32 or text.isascii():
        return min(units, len(text))
    # A character has at least one unit, so text further to the right cannot matter.
    head = text[:units]
    if encoding is Encoding.UTF8:
        data = head.encode("utf-8", "surrogatepass")
        started = len(data[:units].translate(None, delete=_CONTINUATION_BYTES))
        cut = units < len(data) and 0x80 <= data[units] < 0xC0
        return started - cut
    data = head.encode("utf-16-le", "surrogatepass")
    if len(data) == 2 * len(head):
        return len(head)
    whole = len(data[: 2 * units].decode("utf-16-le", "surrogatepass"))
    cut = count_units(head[:whole], Encoding.UTF16) > units
    return whole - cut


def count_units(text: str, encoding: Encoding) -> int:
    """Return the number of units of the client's encoding in `text`."""
    if encoding is Encoding.UTF32 or text.isascii():
        return len(text)
    if encoding is Encoding.UTF8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def changed_lines(old: Sequence[str], new: Sequence[str]) -> tuple[int, int, int]:
    """Return the difference of two versions as one range: `old[first:old_end]` became `new[first:new_end]`.

    Lines that an edit left alone are the same objects, so comparing blocks of them costs little.
    """
    most = min(len(old), len(new))
    first = 0
    while first < most and old[first : first + _BLOCK] == new[first : first + _BLOCK]:
        first = min(first + _BLOCK, most)
    while first < most and old[first] == new[first]:
        first += 1
    old_end, new_end = len(old), len(new)
    while old_end - _BLOCK >= first <= new_end - _BLOCK and (
        old[old_end - _BLOCK : old_end] == new[new_end - _BLOCK : new_end]
    ):
        old_end, new_end = old_end - _BLOCK, new_end - _BLOCK
    while old_end > first < new_end and old[old_end - 1] == new[new_end - 1]:
        old_end, new_end = old_end - 1, new_end - 1
    return first, old_end, new_end


class _Draft:
    """The lines of a document while changes are applied to it.

    Editors send a change for each of a thousand cursors at once. With `cuts`, a long line is cut into pieces
    when it is first changed, so that another change of it costs one piece and not the line.
    """

    def __init__(self, lines: list[str], num_chars: int, encoding: Encoding, *, cuts: bool) -> None:
        self._lines = lines
        self.num_chars = num_chars
        self._encoding = encoding
        self._cuts = cuts
        # The range that the latest change of whole lines replaced: first, old end, new end.
        self.spliced: tuple[int, int, int] | None = None
        # By row. The item of `_lines` is out of date for these.
        self._long: dict[int, _LongLine] = {}

    def apply(self, change: Change) -> None:
        """Apply one change."""
        if change.start is None or change.end is None:
            self._long.clear()
            self._lines = split_lines(change.text)
            self.num_chars = _count(self._lines)
        elif not self._apply_within(change.text, change.start, change.end):
            self._apply_to_lines(change.text, change.start, change.end)

    def finish(self) -> list[str]:
        """Return the lines as they are now."""
        for row in list(self._long):
            self._mend(row)
        return self._lines

    def _mend(self, row: int) -> None:
        if (line := self._long.pop(row, None)) is not None:
            self._lines[row] = line.text

    def _apply_to_lines(self, text: str, start: tuple[int, int], end: tuple[int, int]) -> None:
        last_row = len(self._lines) - 1
        rows = [max(0, min(row, last_row)) for row, _ in (start, end)]
        for row in [row for row in self._long if min(rows) - 1 <= row <= max(rows)]:
            self._mend(row)
        lines = self._lines
        points = locate(lines, start, self._encoding), locate(lines, end, self._encoding)
        first, last, middle = _splice(lines, *points, text)
        self.num_chars += _count(middle) - _count(lines[first:last])
        lines[first:last] = middle
        self.spliced = first, last, first + len(middle)
        self._shift(last, len(middle) - (last - first))

    def _shift(self, row: int, distance: int) -> None:
        """Note that the lines from `row` on have moved."""
        if distance and self._long:
            self._long = {old + distance * (old >= row): line for old, line in self._long.items()}

    def _apply_within(self, text: str, start: tuple[int, int], end: tuple[int, int]) -> bool:
        """Apply a change within one long line. Returns False if the change is not that simple."""
        row = start[0]
        if not self._cuts or row != end[0] or not 0 <= row < len(self._lines):
            return False
        line = self._long.get(row)
        if line is None:
            if len(self._lines[row]) < _LONG:
                return False
            line = self._long[row] = _LongLine.of(self._lines[row], self._encoding)
        span = line.span(*sorted((start[1], end[1])))
        # Halves of a line end or of a character may meet here.
        meets = text.endswith("\r") or _SURROGATE.search(text or line.char_before(span))
        if meets or (not span.start and (text[:1] == "\n" or (not text and span.end == line.num_chars))):
            return False
        self.num_chars += len(text) - (span.end - span.start)
        *above, last = split_lines(text)
        if not above:
            line.replace(span, last)
            return True
        left, right = line.split(span, above[0], last)
        del self._long[row]
        self._lines[row : row + 1] = [*above, ""]
        self._shift(row + 1, len(above))
        for number, part in ((row, left), (row + len(above), right)):
            if part.num_chars < _LONG:
                self._lines[number] = part.text
            else:
                self._long[number] = part
        return True


@dataclass(frozen=True, slots=True)
class _LineRange:
    """A range of a long line: in characters, and as (number of the piece, characters within it)."""

    start: int
    end: int
    first: tuple[int, int]
    last: tuple[int, int]


class _LongLine:
    """A line in pieces, none of them empty unless it is the only one.

    Attributes:
        num_chars: without the terminator.
    """

    def __init__(self, pieces: list[str], units: list[int], ending: str, encoding: Encoding) -> None:
        self._pieces = pieces
        self._units = units
        self._ending = ending
        self._encoding = encoding
        self.num_chars = sum(map(len, pieces))

    @staticmethod
    def of(line: str, encoding: Encoding) -> _LongLine:
        """Cut a line into pieces."""
        length = content_length(line)
        pieces = _cut(line[:length])
        return _LongLine(pieces, [count_units(one, encoding) for one in pieces], line[length:], encoding)

    @property
    def text(self) -> str:
        """The whole line."""
        return "".join(self._pieces) + self._ending

    def span(self, start: int, end: int) -> _LineRange:
        """Return the range between two positions in the client's units."""
        (begin, first), (after, last) = self._find(start), self._find(end)
        return _LineRange(begin, after, first, last)

    def _find(self, units: int) -> tuple[int, tuple[int, int]]:
        units, chars = max(0, units), 0
        for number, size in enumerate(self._units):
            piece = self._pieces[number]
            if units <= size or number == len(self._units) - 1:
                within = count_code_points(piece, units, self._encoding)
                return chars + within, (number, within)
            units -= size
            chars += len(piece)
        raise AssertionError("a line has a piece")

    def char_before(self, span: _LineRange) -> str:
        """Return the character before a range; "" at the beginning of the line."""
        number, within = span.first
        return self._pieces[number][:within][-1:] or (self._pieces[number - 1][-1:] if number else "")

    def replace(self, span: _LineRange, text: str) -> None:
        """Replace a range by a text without line ends."""
        (first, start), (last, end) = span.first, span.last
        changed = self._pieces[first][:start] + text + self._pieces[last][end:]
        self.num_chars -= sum(map(len, self._pieces[first : last + 1]))
        del self._pieces[first : last + 1], self._units[first : last + 1]
        self._insert(first, changed)

    def split(self, span: _LineRange, before: str, after: str) -> tuple[_LongLine, _LongLine]:
        """Return the two resulting lines: up to a range, plus `before`; and `after` plus the rest."""
        (first, start), (last, end) = span.first, span.last
        length = content_length(before)
        left = _LongLine(self._pieces[:first], self._units[:first], before[length:], self._encoding)
        left._insert(len(left._pieces), self._pieces[first][:start] + before[:length])
        right = _LongLine(self._pieces[last + 1 :], self._units[last + 1 :], self._ending, self._encoding)
        right._insert(0, after + self._pieces[last][end:])
        return left, right

    def _insert(self, number: int, text: str) -> None:
        """Insert pieces of a text before another piece; an empty one only if there is no other."""
        new = _cut(text) if text or not self._pieces else []
        self._pieces[number:number] = new
        self._units[number:number] = [count_units(one, self._encoding) for one in new]
        self.num_chars += len(text)


def _cut(text: str) -> list[str]:
    """Cut a text into pieces, at least one."""
    if len(text) <= 2 * _PIECE:
        return [text]
    return [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]


def _count(lines: list[str]) -> int:
    return sum(map(len, lines))


def _splice(lines: list[str], start: Point, end: Point, text: str) -> tuple[int, int, list[str]]:
    """Return the half-open range of lines that an edit replaces, and the new lines."""
    if end < start:
        start, end = end, start
    first, last = start.line, end.line + 1
    changed = lines[first][: start.column] + text + lines[end.line][end.column :]
    # A line that ends in \r and now meets a \n becomes one with it.
    if first > 0 and changed.startswith("\n") and lines[first - 1].endswith("\r"):
        first -= 1
        changed = lines[first] + changed
    middle = split_lines(changed)
    if last < len(lines):
        # The changed part still ends in the terminator of its last line, so its last item is empty.
        middle.pop()
    return first, last, middle
