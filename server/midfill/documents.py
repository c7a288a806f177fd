r"""Documents as the editor sees them: text, versions, and positions in the client's encoding.

A `Document` is an immutable value made of its lines, each with its own terminator. Only \n, \r\n and
\r end a line, as the LSP specification says (`str.splitlines` knows more, and would shift every later
line). An edit makes a new `Document` and costs one copy of a list of references, so a `Snapshot` taken
before an `await` stays true while the user types on.

Columns inside midfill are code points. Only this module knows that clients count otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from midfill.languages import identify

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_SPLIT_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_BLOCK = 256
# As much of it as may say what runs the file.
_FIRST_LINE_CHARS = 200
_NEAR = 20
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Encoding(StrEnum):
    """What one unit of an LSP column is; the values are the protocol's own."""

    UTF8 = "utf-8"
    UTF16 = "utf-16"
    UTF32 = "utf-32"


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A place between two characters: zero-based line, and column in code points."""

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


@dataclass(frozen=True)
class Document:
    """One version of one text.

    Attributes:
        language_id: as `languages` calls it, whatever the editor does.
        lines: never empty; only the last item has no terminator. Never changed in place.
        num_chars: length of the text in code points.
        sent_language: the identifier that the editor has sent.
    """

    uri: str
    language_id: str
    version: int
    lines: list[str]
    num_chars: int
    sent_language: str = ""

    @staticmethod
    def open(uri: str, language_id: str, version: int, text: str) -> Document:
        """Make the first version of a document. `language_id` may be any editor's, or ""."""
        lines = split_lines(text)
        language = identify(language_id, uri, lines[0][:_FIRST_LINE_CHARS])
        return Document(uri, language, version, lines, _count(lines), language_id)

    @cached_property
    def text(self) -> str:
        """The whole text, exactly as the client has it."""
        return "".join(self.lines)

    @property
    def line_ending(self) -> str:
        r"""What ends the first line: "\n", "\r\n" or "\r"; "\n" in a document of one line."""
        first = self.lines[0]
        return first[content_length(first) :] or "\n"

    def edit(self, changes: Iterable[Change], version: int, encoding: Encoding) -> Document:
        """Apply changes in order. Each sees the result of the one before, as the protocol says.

        Versions are recorded, not checked: clients repeat them and go back, and the last text wins.
        """
        lines, num_chars = self.lines.copy(), self.num_chars
        for change in changes:
            if change.start is None or change.end is None:
                lines = split_lines(change.text)
                num_chars = _count(lines)
            else:
                start = locate(lines, change.start, encoding)
                end = locate(lines, change.end, encoding)
                first, last, middle = _splice(lines, start, end, change.text)
                num_chars += _count(middle) - _count(lines[first:last])
                lines[first:last] = middle
        return replace(self, lines=lines, num_chars=num_chars, version=version)

    def point(self, position: tuple[int, int], encoding: Encoding) -> Point:
        """The place of a client's (line, character), clamped into the document."""
        return locate(self.lines, position, encoding)

    def clamp(self, point: Point) -> Point:
        """The place, or the nearest one that this text has."""
        line = min(point.line, len(self.lines) - 1)
        return Point(line, min(point.column, len(self.lines[line].rstrip("\r\n"))))

    def end_of(self, change: Change, encoding: Encoding) -> Point:
        """The place behind the text that a change, the last one made, has put in."""
        start = Point(0, 0) if change.start is None else self.point(change.start, encoding)
        *above, last = split_lines(change.text)
        column = len(last) if above else start.column + len(last)
        return self.clamp(Point(start.line + len(above), column))

    def position(self, point: Point, encoding: Encoding) -> tuple[int, int]:
        """The client's (line, character) of a place."""
        return point.line, count_units(self.lines[point.line][: point.column], encoding)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document and the place of the cursor in it, at one moment."""

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
        r"""What ends the cursor's line, or else the nearest line that ends: "\n", "\r\n" or "\r"."""
        lines, at = self.document.lines, self.cursor.line
        near = [lines[at], *reversed(lines[max(0, at - _NEAR) : at]), *lines[at + 1 : at + 1 + _NEAR]]
        ends = [line[content_length(line) :] for line in near]
        # Where others end their lines otherwise, a carriage return alone is a fault.
        usual = (end for end in ends if "\n" in end)
        return next(usual, None) or next(filter(None, ends), "\n")

    def lines_after(self, max_lines: int) -> list[str]:
        """The lines below the cursor's line, without terminators."""
        below = self.document.lines[self.cursor.line + 1 : self.cursor.line + 1 + max_lines]
        return [line[: content_length(line)] for line in below]

    def insert(self, text: str, num_replaced: int = 0) -> Snapshot:
        """What it becomes when `text` is inserted at the cursor: the cursor is behind it then.

        `num_replaced` characters behind the cursor, of its line, make room for it.
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
    """The length of a line without its terminator."""
    if line.endswith("\r\n"):
        return len(line) - 2
    return len(line) - line.endswith(("\n", "\r"))


def locate(lines: Sequence[str], position: tuple[int, int], encoding: Encoding) -> Point:
    """The place of a client's (line, character).

    As the specification says, a character past the end of a line means its end; likewise a line past
    the end means the end of the document. A unit inside a character means the place before it.
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
    """How many whole characters lie within the first `units` units of `text`."""
    if encoding is Encoding.UTF32 or text.isascii():
        return min(units, len(text))
    # A character is at least one unit, so what lies further to the right cannot matter.
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
    """How many units of the client's encoding `text` takes."""
    if encoding is Encoding.UTF32 or text.isascii():
        return len(text)
    if encoding is Encoding.UTF8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def changed_lines(old: Sequence[str], new: Sequence[str]) -> tuple[int, int, int]:
    """What differs between two versions, as one range: `old[first:old_end]` became `new[first:new_end]`.

    Lines that an edit left alone are the same objects, so that comparing blocks of them costs little.
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


def _count(lines: list[str]) -> int:
    return sum(map(len, lines))


def _splice(lines: list[str], start: Point, end: Point, text: str) -> tuple[int, int, list[str]]:
    """Which lines an edit replaces, as a half-open range, and by which."""
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
