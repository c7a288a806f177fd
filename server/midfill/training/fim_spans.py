"""Draw the middles of FIM training examples from a text. Knows texts only; any thread.

The mixture of kinds follows what users request completions for, most often the rest of a line. Nodes come
from tree-sitter; without a grammar, blocks follow the indentation and nodes become rests of lines. Middles
begin in given lines, so that they can be drawn from a commit's additions as well as from a whole file.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from midfill.text.syntax import new_parser

if TYPE_CHECKING:
    from tree_sitter import Node

SHARES = {"line": 35, "node": 25, "block": 20, "random": 10, "inline": 5, "empty": 5}
"""Kinds of middles, in per cent: the rest of a line, a syntax node, the rest of a block, any characters, a
part of a line, nothing at all."""

MAX_CHARS = 700
_MIN_NODE_CHARS = 4
_MAX_BLOCK_LINES = 12
_MAX_INLINE_CHARS = 60
_TRIES = 8
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Span:
    """A middle: `text[start:end]`, and its kind, a key of `SHARES`."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A text to draw from.

    Attributes:
        text: the whole file.
        language_id: LSP language identifier.
        barred: lines, from 0, that no middle may contain.
    """

    text: str
    language_id: str
    barred: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def lines(self) -> list[tuple[int, int]]:
        """Offsets of the begin and end of each line, without its line end."""
        found, at = [], 0
        for line in self.text.split("\n"):
            found.append((at, at + len(line.removesuffix("\r"))))
            at += len(line) + 1
        return found

    @cached_property
    def nodes(self) -> dict[int, list[tuple[int, int]]]:
        """Syntax nodes of a suitable size (begin, end), by the line in which they begin."""
        parser = new_parser(self.language_id)
        found: dict[int, list[tuple[int, int]]] = {}
        if parser is None:
            return found
        data = self.text.encode("utf-8", "replace")
        # Bytes to characters; most files need no table.
        starts = None if data.isascii() else [i for i, byte in enumerate(data) if byte & 0xC0 != 0x80]
        pending: list[Node] = [parser.parse(data).root_node]
        while pending:
            node = pending.pop()
            pending += node.children
            start, end = node.start_byte, node.end_byte
            if starts is not None:
                start, end = _index(starts, start), _index(starts, end)
            if node.is_named and not node.has_error and _MIN_NODE_CHARS <= end - start <= MAX_CHARS:
                found.setdefault(node.start_point.row, []).append((start, end))
        return found

    def draw(self, kind: str, rows: Sequence[int], chooser: random.Random) -> Span | None:
        """Return a random middle of this kind that begins in one of the lines; None if none was found."""
        for _ in range(_TRIES):
            row = chooser.choice(rows)
            if row >= len(self.lines) or not self.text[slice(*self.lines[row])].strip():
                continue
            place = _DRAW[kind](self, row, chooser)
            if place is not None and self._is_open(*place):
                return Span(kind, *place)
        return None

    def _is_open(self, start: int, end: int) -> bool:
        if end - start > MAX_CHARS:
            return False
        if not self.barred:
            return True
        first = self.text.count("\n", 0, start)
        return not self.barred.intersection(range(first, first + self.text.count("\n", start, end) + 1))


def _index(starts: list[int], byte: int) -> int:
    return bisect.bisect_left(starts, byte)


def _line(source: Source, row: int, chooser: random.Random) -> tuple[int, int] | None:
    """Return a span from a word's begin, or from after its first letters, to the end of the line."""
    begin, end = source.lines[row]
    words = list(_WORD.finditer(source.text, begin, end))
    word = chooser.choice(words)
    inside = len(word.group()) >= 5 and chooser.random() < 0.3
    start = word.start() + (chooser.randint(1, 3) if inside else 0)
    stop = begin + len(source.text[begin:end].rstrip())
    return (start, stop) if start < stop else None


def _node(source: Source, row: int, chooser: random.Random) -> tuple[int, int] | None:
    places = source.nodes.get(row)
    return chooser.choice(places) if places else None if source.nodes else _line(source, row, chooser)


def _block(source: Source, row: int, chooser: random.Random) -> tuple[int, int] | None:
    """Return a span from a line's first word, or another one, to the end of the lines indented as deeply."""
    begin, end = source.lines[row]
    line = source.text[begin:end]
    depth = len(line) - len(line.lstrip())
    last = row
    for below in range(row + 1, min(row + _MAX_BLOCK_LINES, len(source.lines))):
        text = source.text[slice(*source.lines[below])]
        if text.strip():
            if len(text) - len(text.lstrip()) < depth:
                break
            last = below
    start = begin + depth
    if chooser.random() < 0.3 and (place := _line(source, row, chooser)):
        start = place[0]
    stop_begin, stop_end = source.lines[last]
    return start, stop_begin + len(source.text[stop_begin:stop_end].rstrip())


def _random(source: Source, row: int, chooser: random.Random) -> tuple[int, int] | None:
    begin, end = source.lines[row]
    start = chooser.randint(begin, end)
    size = min(int(chooser.expovariate(1 / 80)) + 1, MAX_CHARS)
    return start, min(start + size, len(source.text))


def _inline(source: Source, row: int, chooser: random.Random) -> tuple[int, int] | None:
    """Return a span of some words of a line, with code after them."""
    begin, end = source.lines[row]
    words = list(_WORD.finditer(source.text, begin, end))
    if len(words) < 3:
        return None
    first = chooser.randrange(len(words) - 2)
    last = chooser.randrange(first, len(words) - 1)
    start, stop = words[first].start(), words[last].end()
    return (start, stop) if stop - start <= _MAX_INLINE_CHARS else None


def _empty(source: Source, row: int, _chooser: random.Random) -> tuple[int, int] | None:
    """Return an empty span after a complete line."""
    begin, end = source.lines[row]
    at = begin + len(source.text[begin:end].rstrip())
    return at, at


_DRAW: dict[str, Callable[[Source, int, random.Random], tuple[int, int] | None]] = {
    "line": _line,
    "node": _node,
    "block": _block,
    "random": _random,
    "inline": _inline,
    "empty": _empty,
}
