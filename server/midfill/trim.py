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
        text = _without_overlap(text, place.line_after)
    elif place.line_after and text.startswith(place.line_after):
        text = text[len(place.line_after) :]
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n")).rstrip("\n")
    return (text, None) if text.strip() else ("", "repeats-text")


@dataclass(frozen=True, slots=True)
class _Brackets:
    """What a text opens and closes: the first closer without an opener, and whether anything is open."""

    unmatched: int | None
    open: bool


def _brackets(text: str) -> _Brackets:
    depth: list[str] = []
    unmatched = None
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
            elif unmatched is None:
                unmatched = index
        previous = char
    return _Brackets(unmatched, bool(depth or quote))


def _end_of_single_line(text: str, line_after: str) -> int | None:
    newline = text.find("\n")
    line = text if newline < 0 else text[:newline]
    tail = line_after.lstrip()
    # A bracket that was opened before the cursor is being closed, and the file closes it already.
    closing = _brackets(line).unmatched
    if closing is not None and tail.startswith(line[closing]):
        return closing
    return None if newline < 0 else newline


def _without_overlap(text: str, line_after: str) -> str:
    """Drop the end of `text` that stands behind the cursor already."""
    tail = line_after.rstrip()
    for length in range(min(len(text), len(tail)), 0, -1):
        shared = tail[:length]
        if not text.endswith(shared):
            continue
        whole = length == len(tail) and length > 1
        kept = text[: len(text) - length]
        # Closers that belong to what the text itself opened stay.
        if (whole or _CLOSING_TAIL.fullmatch(shared)) and not _brackets(kept).open:
            return kept
    return text


def _end_of_block(text: str, place: Place) -> int | None:
    """Where the block that the cursor is in ends: at a dedent, at known text, at repetition."""
    lines = text.split("\n")
    first = place.line_before + lines[0]
    base = _width(first if first.strip() else place.line_before)
    # On an empty line the block is the one around it; else the one that this line opens.
    opened = bool(place.line_before.strip()) and first.rstrip().endswith(_BLOCK_OPENING)
    end = 0
    seen: list[str] = []
    # The last piece is still being written.
    for number, line in enumerate(lines[:-1]):
        full = place.line_before + line if number == 0 else line
        if line.strip() and _repeats_below(full, place):
            return max(end - 1, 0)
        if number > 0:
            if not line.strip():
                if seen and not seen[-1].strip():
                    return _before_blank(text, end)
            elif _leaves_block(line, base, opened=opened):
                if opened and _width(line) == base and _BLOCK_CLOSER.fullmatch(line):
                    return end + len(line)
                return _before_blank(text, end)
            if len(seen) >= _ENOUGH_REPEATS - 1 and _same(seen[-(_ENOUGH_REPEATS - 1) :], line):
                return max(end - 1, 0)
        seen.append(line)
        end += len(line) + 1
        if len(seen) >= place.max_lines:
            return end - 1
    return None


def _leaves_block(line: str, base: int, *, opened: bool) -> bool:
    width = _width(line)
    return width < base or (opened and width == base)


def _before_blank(text: str, end: int) -> int:
    """The length of `text[:end]` without the blank lines at its end."""
    return len(text[:end].rstrip(" \t\n")) if text[:end].strip() else 0


def _same(earlier: list[str], line: str) -> bool:
    return bool(line.strip()) and all(other.strip() == line.strip() for other in earlier)


def _repeats_below(line: str, place: Place) -> bool:
    """Whether a line says what the next line of the file says."""
    return bool(place.next_line) and line.rstrip() == place.next_line


def _width(line: str) -> int:
    match = _INDENT.match(line)
    return len(match.group().expandtabs(8)) if match else 0
