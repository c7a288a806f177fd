"""Runaway lines: the model repeats a piece of text within one line and does not stop.

Pure: text in, offsets out. A line is judged at fixed columns, so that more text changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_COLUMNS = 16
_LONGEST_PERIOD = 64
# A repetition this long will not end; at the token limit a short one will not either.
_LONGEST = 96
_SHORTEST = 16
_MIN_REPEATS = 4
# Tables and arrays may be somewhat wider than those around.
_WIDER = 1.25
_RULER_WIDTH = 79
_WORD = re.compile(r"\w")
_LAST_WORD = re.compile(r"(?<!\w)\w+\Z")
# Text that introduces a repetition and is useless without it.
_DANGLING = re.compile(r"(?:[ \t]*(?:#+|//+|--|/\*+|<!--))?[ \t]*[\"'`]{0,3}\Z")
_SEPARATORS = " \t,|&+"
# Characters of rulers, underlined headings and table frames.
_RULER = re.compile(r"[-=*#~_+.:/\\|<>^%!\u2010-\u2015\u2500-\u259f\s]+")


class GrowingLine:
    """Detects whether a growing line runs away. Linear in the line.

    Args:
        around: the lines around it.
        before: the text before it on its line.
    """

    def __init__(self, around: Sequence[str], before: str = "") -> None:
        self._around = around
        self._before = before
        self._column = 0
        self._allowed = 0

    def cut(self, line: str) -> int | None:
        """Return how much of a runaway line is worth keeping; None if it does not run away.

        `line` must begin with the text of the previous call.
        """
        while self._column + _COLUMNS <= len(line):
            self._column += _COLUMNS
            if self._column < self._allowed:
                continue
            period = _period(line, self._column, _LONGEST)
            if period is None:
                continue
            alike = _alike(line[: self._column], period, self._around)
            self._allowed = int(_WIDER * max(alike, default=0))
            if self._column >= self._allowed:
                width = max(alike, default=_RULER_WIDTH) - len(self._before)
                return _cut(line[: self._column], period, width, self._before)
        return None


def cut_at_limit(line: str, around: Sequence[str]) -> int | None:
    """Return the same as `GrowingLine.cut` for a line that ended at the token limit."""
    period = _period(line, len(line), _SHORTEST)
    if period is None or _RULER.fullmatch(line, len(line) - period) or _alike(line, period, around):
        return None
    return _cut(line, period, 0)


def _period(line: str, end: int, longest: int) -> int | None:
    """Return the shortest period of a line up to `end`, if it repeats itself for long enough."""
    last = end - _SHORTEST
    if last < 0:
        return None
    tail = line[last:end]
    at = last
    while (at := line.rfind(tail, max(0, last - _LONGEST_PERIOD), at + _SHORTEST - 1)) >= 0:
        period = last - at
        size = max(longest, _MIN_REPEATS * period)
        if size <= end and line[end - size + period : end] == line[end - size : end - period]:
            return period
    return None


def _alike(line: str, period: int, around: Sequence[str]) -> list[int]:
    """Return the lengths of those lines around that have the same repetition."""
    piece = line[-_MIN_REPEATS * period :]
    return [len(one) for one in around if piece in one] if piece.strip() else []


def _cut(line: str, period: int, ruler_width: int, before: str = "") -> int:
    """Return how much of a line that ends in a repetition is worth keeping."""
    start = len(line) - period
    while start and line[start - 1] == line[start - 1 + period]:
        start -= 1
    piece = line[start : start + period]
    if piece.strip() and _RULER.fullmatch(piece):
        if _WORD.match((before + line[:start])[-1:]):
            # Dots after a word are not a ruler.
            return start
        # As wide as the others.
        return start + max(1, (ruler_width - start) // period) * period
    if _WORD.search(piece) and not re.fullmatch(r"\w+", piece):
        return len(line[: start + period].rstrip(_SEPARATORS))
    kept = line[:start]
    if piece.strip():
        kept = _LAST_WORD.sub("", kept, count=1)
    return len(_DANGLING.sub("", kept, count=1).rstrip())
