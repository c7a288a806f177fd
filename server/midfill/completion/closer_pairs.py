r"""Pair each opener of a suggestion with its closer: what an editor that closes brackets inserts by itself.

Clients get the pairs with each item, and need no rule of brackets and quotes. Strings count, so that a
bracket in `f("(")` closes nothing; a mark that begins no string, as in `don't`, opens nothing.

Pure: text in, offsets out. All texts have \n. Linear in the text's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_CLOSER_OF = {"(": ")", "[": "]", "{": "}", "<": ">"}
_QUOTES = "\"'`"
_STRINGS = (*_QUOTES, *(3 * quote for quote in _QUOTES))
# An escaped character is no token.
_TOKEN = re.compile(r"\\.|\"\"\"|'''|```|[\"'`()\[\]{}<>\n]", re.DOTALL)
_CLOSED = re.compile(r"\"\"\"|'''|```|.", re.DOTALL)
_STRING_PREFIX = re.compile(r"(?<!\w)[bBfFrRuU]{1,2}\Z")


def closer_pairs(text: str, closed: str = "") -> list[tuple[int, int]]:
    """Return the offset of each opener in `text` and that of its closer, by closer, the innermost first.

    An opener of -1 stands for one before the text: `closed` are the closers after the cursor that belong to
    such openers, and the text closes the first of them. A closer of `len(text)` comes after the text, which
    was cut before it. Pairs are disjoint or nested, but for those of a triple quote, which have one opener:
    the last of its quotes.
    """
    scan = _Scan(text)
    for mark in reversed(_CLOSED.findall(closed)):
        scan.push(_Open(-1, mark))
    tokens = [found for found in _TOKEN.finditer(text) if not found.group().startswith("\\")]
    closable = _closable(text, tokens)
    for found in tokens:
        scan.read(found.start(), found.group(), closable=found.start() in closable)
    scan.end(tokens[-1] if tokens else None)
    return sorted(scan.pairs, key=lambda pair: (pair[1], -pair[0]))


def _closable(text: str, tokens: list[re.Match[str]]) -> set[int]:
    """Return the offsets of the quotes after which a like one may close a string, on the same line."""
    found, closing = set(), set[str]()
    for token in reversed(tokens):
        mark, at = token.group(), token.start()
        if mark == "\n":
            closing &= {"`"}
        elif mark[0] in _QUOTES:
            if mark in closing:
                found.add(at)
            if _may_close(text, at + len(mark), mark):
                closing.add(mark[0])
    return found


def _may_close(text: str, end: int, mark: str) -> bool:
    """Return whether a quote that ends at `end` may close a string: not an apostrophe within a word."""
    return mark != "'" or not text[end : end + 1].isalnum()


def _may_open(text: str, at: int, mark: str) -> bool:
    """Return whether a quote may open a string: not an apostrophe after a word, but one after `rb`."""
    before = text[max(0, at - 3) : at]
    return mark != "'" or not before[-1:].isalnum() or _STRING_PREFIX.search(before) is not None


@dataclass(frozen=True, slots=True)
class _Open:
    """An opener at an offset, -1 if it is before the text, and the closer that it needs."""

    at: int
    closer: str


@dataclass(slots=True)
class _Scan:
    """The state of one pass over a text.

    Attributes:
        stack: the openers that are not closed yet, the innermost last.
        is_nested: no bracket was closed before one within it.
    """

    text: str
    stack: list[_Open] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    is_nested: bool = True
    # Where in the stack each closer is awaited; may name openers that are gone.
    _places: dict[str, list[int]] = field(default_factory=dict)

    def push(self, opened: _Open) -> None:
        """Add an opener within those that are open."""
        self._places.setdefault(opened.closer, []).append(len(self.stack))
        self.stack.append(opened)

    def read(self, at: int, mark: str, *, closable: bool) -> None:
        """Take the next token. `closable`: it is a quote that a later one on its line may close."""
        if mark in _CLOSER_OF:
            self.push(_Open(at, _CLOSER_OF[mark]))
        elif mark[0] in _QUOTES:
            self._quote(at, mark, closable=closable)
        elif mark == ">":
            # Not that of an arrow.
            if self.stack and self.stack[-1].closer == mark and self.text[at - 1 : at] not in {"-", "="}:
                self._close(at, len(self.stack) - 1)
        elif mark != "\n":
            place = self._place(mark)
            strings = [start for one in _STRINGS if (start := self._place(one)) is not None]
            # A string that is open hides the brackets around it.
            if place is not None and place > max(strings, default=-1):
                self._close(at, place)

    def end(self, last: re.Match[str] | None) -> None:
        """Pair what is still open with the text's end, and a quote whose string the end cuts."""
        size = len(self.text)
        if not self.is_nested:
            return
        for one in self.stack:
            if one.at >= 0 and one.closer != ">":
                self.pairs += [(one.at, size)] * len(one.closer)
        if last is not None and last.group() in _QUOTES:
            at = last.start()
            if _may_open(self.text, at, last.group()) and not any(at in pair for pair in self.pairs):
                self.pairs.append((at, size))

    def _place(self, closer: str) -> int | None:
        """Return where in the stack this closer is awaited, if the text can close it now."""
        places = self._places.get(closer, [])
        while places and (places[-1] >= len(self.stack) or self.stack[places[-1]].closer != closer):
            places.pop()
        if not places:
            return None
        # Of the openers before the text, the innermost is closed first.
        within = self.stack[places[-1] + 1 : places[-1] + 2]
        return None if within and within[0].at < 0 else places[-1]

    def _close(self, at: int, place: int) -> None:
        """Pair an opener of the stack with the closer at an offset; what is open within it has none."""
        one = self.stack[place]
        if one.closer not in _STRINGS:
            self.is_nested &= all(within.closer == ">" for within in self.stack[place + 1 :])
        del self.stack[place:]
        self.pairs += [(one.at, at + index) for index in range(len(one.closer))]

    def _quote(self, at: int, mark: str, *, closable: bool) -> None:
        place = self._place(mark)
        if place is None and len(mark) > 1 and self._place(mark[0]) is not None:
            # The end of a string, and an empty one.
            self._quote(at, mark[0], closable=False)
            self.pairs.append((at + 1, at + 2))
        elif place is not None and _may_close(self.text, at + len(mark), mark):
            self._close(at, place)
        elif place is None and len(mark) > 1:
            self.pairs.append((at, at + 1))
            self.push(_Open(at + 2, mark))
        elif place is None and closable and _may_open(self.text, at, mark):
            self.push(_Open(at, mark))
