r"""Where a suggestion ends, and what of the model's text is worth inserting. Pure: text in, text out.

The model's text uses \n. `Place` says where it would go; `stop` is asked after every token whether
enough has come; `clean` makes the final text or says why there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_INDENT = re.compile(r"[ \t]*")
_OPENERS = {"(": ")", "[": "]", "{": "}"}
_CLOSERS = frozenset(_OPENERS.values())
_QUOTES = "\"'`"
# What an editor inserts by itself behind the cursor, and what may stand behind it.
_CLOSING_TAIL = re.compile(r"[\s)\]}>\"'`,;:]+")
_BLOCK_CLOSER = re.compile(r"\s*(?:[)\]}>]+[;,)\]}>]*|end|done|fi|esac)\s*\Z")
# A line with a word and some more in it is not there twice by chance, as `else:` or `}` is.
_TELLING = re.compile(r"\w.*\W.*\w")
_ENOUGH_REPEATS = 3
_BLOCK_OPENING = ("{", "(", "[", ":", "=>", "->")


@dataclass(frozen=True, slots=True)
class Place:
    r"""Where the suggestion goes.

    Attributes:
        line_before: the current line up to the cursor.
        line_after: the rest of it. Anything but blanks there makes a suggestion of one line.
        following: lines below, without terminators; enough to see what must not be repeated.
        max_lines: the most lines a suggestion may have.
    """

    line_before: str
    line_after: str
    following: tuple[str, ...] = ()
    max_lines: int = 12

    @property
    def single_line(self) -> bool:
        """In the middle of a line, a suggestion is the rest of that line and no more."""
        return bool(self.line_after.strip())

    @property
    def next_line(self) -> str:
        """The next line below that is not blank; "" if there is none."""
        return next((line.rstrip() for line in self.following if line.strip()), "")


def stop(text: str, place: Place) -> int | None:
    """The length of `text` at which the suggestion ends, or None if more may come.

    Only complete lines are judged, so the answer never changes when more text comes.
    """
    if place.single_line:
        return _end_of_single_line(text, place.line_after)
    return _end_of_block(text, place)


def clean(
    text: str, place: Place, *, complete: bool, forbidden: Iterable[str] = ()
) -> tuple[str, str | None]:
    """The text to insert, or "" and the reason code why there is none.

    Args:
        text: what the model wrote.
        place: where it goes.
        complete: whether the model ended by itself or by `stop`; if not, it ran into its token limit,
            and half a last line is dropped when there are lines before it.
        forbidden: strings (sentinels) at which the text is cut, however the model spelled them.
    """
    for string in forbidden:
        text = text.partition(string)[0]
    if not text.strip():
        return "", "model-silent"
    if not complete and "\n" in text.strip("\n"):
        text = text[: text.rindex("\n")]
    end = stop(text + "\n", place)
    text = text if end is None else text[:end]
    if place.single_line:
        text = _without_overlap(text, place)
    elif place.line_after and text.startswith(place.line_after):
        text = text[len(place.line_after) :]
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n")).rstrip("\n")
    return (text, None) if text.strip() else ("", "repeats-text")


@dataclass(frozen=True, slots=True)
class _Brackets:
    """What a text leaves open and closes too much.

    Attributes:
        unmatched: where the first closer without an opener stands; None if there is none.
        imbalance: closers without an opener, and openers and quotes without a closer.
        open: the closers that are still to come, outermost first.
    """

    unmatched: int | None
    imbalance: int
    open: tuple[str, ...]


def _brackets(text: str, before: tuple[str, ...] = ()) -> _Brackets:
    """What `text` does to brackets, where the closers `before` were still to come."""
    depth = list(before)
    unmatched = None
    closed = 0
    quote = previous = ""
    for index, char in enumerate(text):
        if quote:
            if char == quote and previous != "\\":
                quote = ""
        elif char in _QUOTES:
            quote = char
        elif char in _OPENERS:
            depth.append(_OPENERS[char])
        elif char in _CLOSERS:
            if depth:
                depth.pop()
            else:
                closed += 1
                unmatched = index if unmatched is None else unmatched
        previous = char
    return _Brackets(unmatched, closed + len(depth) + bool(quote), tuple(depth))


def _end_of_single_line(text: str, line_after: str) -> int | None:
    newline = text.find("\n")
    line = text if newline < 0 else text[:newline]
    tail = line_after.lstrip()
    # A bracket that was opened before the cursor is being closed, and the file closes it already.
    closing = _brackets(line).unmatched
    if closing is not None and tail.startswith(line[closing]):
        return closing
    return None if newline < 0 else newline


def _without_overlap(text: str, place: Place) -> str:
    """Drop the end of `text` that stands behind the cursor already.

    What is the same may also belong to the text, as the bracket of `len(names)` before a `)` does:
    then dropping it would leave the line with more open than before, and it stays.
    """
    tail = place.line_after.rstrip()

    def imbalance(kept: str) -> int:
        return _brackets(place.line_before + kept + tail).imbalance

    best, least = text, imbalance(text)
    for length in range(min(len(text), len(tail)), 0, -1):
        shared = tail[:length]
        whole = length == len(tail) and length > 1
        if text.endswith(shared) and (whole or _CLOSING_TAIL.fullmatch(shared)):
            kept = text[: len(text) - length]
            # Of cuts that are as good, the longest; and any cut rather than none.
            if (found := imbalance(kept)) < least or (best is text and found == least):
                best, least = kept, found
    return best


def _end_of_block(text: str, place: Place) -> int | None:
    """Where the block that the cursor is in ends: at a dedent, at known text, at repetition."""
    lines = text.split("\n")
    block = _Block.around(place, lines[0])
    end = 0
    # The last piece is still being written.
    for number, line in enumerate(lines[:-1]):
        if block.is_over_before(lines, number):
            return len(text[:end].rstrip(" \t\n"))
        end += len(line)
        if block.is_over_after(line, text[:end]) or number + 1 == place.max_lines:
            return end
        end += 1
    return None


@dataclass(frozen=True, slots=True)
class _Block:
    """The block that a suggestion of several lines belongs to.

    Attributes:
        place: where the suggestion goes.
        base: width of the indentation of its first line.
        opened: whether that line opens a block of its own; else the block is the one around it.
        closers: those that the cursor's line still awaits.
    """

    place: Place
    base: int
    opened: bool
    closers: tuple[str, ...]

    @staticmethod
    def around(place: Place, first: str) -> _Block:
        """The block at a place, given the first line that the model wrote."""
        whole = place.line_before + first
        opened = bool(place.line_before.strip()) and whole.rstrip().endswith(_BLOCK_OPENING)
        base = _width(whole if whole.strip() else place.line_before)
        return _Block(place, base, opened, _brackets(place.line_before).open)

    def is_over_before(self, lines: list[str], number: int) -> bool:
        """Whether a line does not belong to the suggestion any more."""
        line = lines[number]
        whole = self.place.line_before + line if number == 0 else line
        if line.strip() and _stands_below(whole, self.place):
            return True
        if self._closes_outside(line, "\n".join(lines[: number + 1])):
            # The file has that closer already, if one as deep stands below.
            below = self.place.next_line
            return below.lstrip()[:1] in _CLOSERS and _width(below) >= _width(whole)
        if number == 0:
            return False
        if not line.strip():
            return number > 1 and not lines[number - 1].strip()
        width = _width(line)
        if width < self.base or (self.opened and width == self.base and not _BLOCK_CLOSER.fullmatch(line)):
            return True
        earlier = lines[max(0, number - _ENOUGH_REPEATS + 1) : number]
        return len(earlier) == _ENOUGH_REPEATS - 1 and all(one.strip() == line.strip() for one in earlier)

    def is_over_after(self, line: str, text: str) -> bool:
        """Whether `line`, the last one of `text`, is the end of the block."""
        closes_own = self.opened and _width(line) == self.base and _BLOCK_CLOSER.fullmatch(line)
        return bool(closes_own) or self._closes_outside(line, text)

    def _closes_outside(self, line: str, text: str) -> bool:
        """Whether `text`, and `line` at its end, closes what was opened above the cursor's line."""
        return not _CLOSERS.isdisjoint(line) and _brackets(text, self.closers).unmatched is not None


def _stands_below(line: str, place: Place) -> bool:
    """Whether the model goes on with text of the file: with the next line, or a telling one soon after."""
    line = line.rstrip()
    if line == place.next_line:
        return bool(line)
    return _TELLING.search(line) is not None and line in {below.rstrip() for below in place.following}


def _width(line: str) -> int:
    match = _INDENT.match(line)
    return len(match.group().expandtabs(8)) if match else 0
