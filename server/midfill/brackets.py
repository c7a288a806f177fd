"""The brackets, strings and comments of a suggestion, by the grammar or by a scan that knows quotes.

Pure: text in, offsets out. What a grammar knows is asked of `syntax`; without one the scan has to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from midfill import syntax
from midfill.place import Place
from midfill.syntax import Delimiter, Outline, balance

_OPENERS = {"(": ")", "[": "]", "{": "}"}
CLOSERS = frozenset(_OPENERS.values())
_QUOTES = "\"'`"


@lru_cache(maxsize=8)
def _outline(above: str, text: str, language_id: str) -> Outline | None:
    """Several questions are asked of one text, each by a reader of its own."""
    growing = syntax.Growing.of(above, language_id)
    return None if growing is None else growing.outline(text)


class Reader:
    """What brackets, strings and comments a suggestion has, by the grammar or by a scan."""

    def __init__(self, place: Place) -> None:
        self._before = place.line_before
        self._above, self._language_id = place.above, place.language_id
        self._growing = syntax.Growing.of(place.above, place.language_id)
        self._is_new = True

    def read(self, text: str) -> Outline:
        """The outline of `text`; its `open` are the closers that the cursor's line still awaits."""
        whole = self._before + text
        if self._growing is None:
            found = None
        elif self._is_new:
            found = _outline(self._above, whole, self._language_id)
        else:
            found = self._growing.outline(whole)
        self._is_new = False
        if found is None:
            found = Outline((), tuple(scan(whole)), ())
        size = len(self._before)
        earlier = tuple(one for one in found.delimiters if one.start < size)
        return Outline(
            balance(earlier)[0],
            tuple(one.shifted(-size) for one in found.delimiters if one.start >= size),
            tuple((start - size, end - size, comment) for start, end, comment in found.opaque),
        )


def scan(text: str) -> Iterator[Delimiter]:
    """The brackets of a text outside of quotes, for languages without a grammar."""
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
    """Closers without an opener, and openers and quotes without a closer, of one line."""
    awaited, unmatched = balance(tuple(scan(line)))
    quote = previous = ""
    for char in line:
        if char in _QUOTES and previous != "\\" and quote in {"", char}:
            quote = "" if quote else char
        previous = char
    return len(awaited) + len(unmatched) + bool(quote)


def closes_outside(found: Outline, start: int) -> bool:
    """Whether what follows `start` closes what was opened above the cursor's line."""
    return any(one.start >= start for one in balance(found.delimiters, found.open)[1])
