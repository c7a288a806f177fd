"""Find stop strings in an answer while it is generated, in time linear in the answer's length.

One automaton per string, that of Knuth, Morris and Pratt (1977). Pure; no HTTP, no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Pattern:
    """One stop string, and how much of it may have begun at the end of what was read."""

    text: str
    matched: int = 0
    borders: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # borders[n]: the longest proper beginning of text[: n + 1] that is also its end.
        self.borders = [0] * len(self.text)
        length = 0
        for at in range(1, len(self.text)):
            while length and self.text[at] != self.text[length]:
                length = self.borders[length - 1]
            length += self.text[at] == self.text[length]
            self.borders[at] = length

    def push(self, char: str) -> bool:
        """Read one character; return whether the text now ends with the stop string."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self.borders[self.matched - 1]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


class StopMatcher:
    """Reads an answer piece by piece.

    Args:
        texts: the stop strings; empty ones are ignored.

    Attributes:
        end: offset of the first match, in characters from the answer's beginning; None while there is none.
            Nothing may be read after a match.
        num_held: number of characters at the end that may be the beginning of a match.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.end: int | None = None
        self.num_held = 0
        self._patterns = [_Pattern(text) for text in texts if text]
        self._num_read = 0

    def push(self, piece: str) -> None:
        """Read a piece. If several strings are completed in it, the one that begins first counts."""
        starts = []
        for pattern in self._patterns:
            for at, char in enumerate(piece, start=self._num_read + 1):
                if pattern.push(char):
                    starts.append(at - len(pattern.text))
                    break
        self._num_read += len(piece)
        if starts:
            self.end = min(starts)
        self.num_held = max((pattern.matched for pattern in self._patterns), default=0)
