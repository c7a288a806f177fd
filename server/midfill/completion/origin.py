r"""Positions in a text, and what later texts have inserted there.

Knows texts and positions, nothing of models, suggestions or LSP. All texts have \n. Runs on the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from midfill.text.documents import Document, Point, Snapshot

_MAX_INSERTED_CHARS = 4_000


class HashedText:
    """A document with the digests of its line ranges; each digest is computed once."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._digests: dict[tuple[int, int], int] = {}

    def digest(self, start: int, end: int) -> int:
        """Return a number that stands for the lines from `start` up to `end`, which is excluded.

        Cheap: Python keeps the hash of each unchanged line.
        """
        if (digest := self._digests.get((start, end))) is None:
            digest = self._digests[start, end] = hash(tuple(self.document.lines[start:end]))
        return digest


@dataclass(frozen=True, slots=True)
class Origin:
    """A position in a text, and of that text what must stay the same. Keeps at most two of its lines.

    Attributes:
        before, after: the line up to the position, and the rest of the line with its terminator.
        above, below: digests of all lines above and below.
        num_lines, num_chars: size of the whole text.
    """

    uri: str
    line: int
    before: str
    after: str
    above: int
    below: int
    num_lines: int
    num_chars: int

    @staticmethod
    def of(snapshot: Snapshot) -> Origin:
        """Return the origin for a snapshot's cursor."""
        document, cursor = snapshot.document, snapshot.cursor
        text = HashedText(document)
        line, num_lines = document.lines[cursor.line], len(document.lines)
        return Origin(
            document.uri,
            cursor.line,
            line[: cursor.column],
            line[cursor.column :],
            text.digest(0, cursor.line),
            text.digest(cursor.line + 1, num_lines),
            num_lines,
            document.num_chars,
        )

    def inserted(self, text: HashedText, cursor: Point | None = None) -> tuple[str, str] | None:
        """Return what a later text has at this position, before and after the cursor.

        None if the texts differ anywhere else. Without a cursor, everything inserted counts as before it.
        """
        document = text.document
        grown = len(document.lines) - self.num_lines
        size = document.num_chars - self.num_chars
        if grown < 0 or not 0 <= size <= _MAX_INSERTED_CHARS or document.uri != self.uri:
            return None
        last = self.line + grown
        if cursor is not None and not self.line <= cursor.line <= last:
            return None
        # If both ends are in place, the text between them has the right size.
        lines = document.lines[self.line : last + 1]
        if not lines[0].startswith(self.before) or not lines[-1].endswith(self.after):
            return None
        if grown == 0 and len(lines[0]) < len(self.before) + len(self.after):
            return None
        if text.digest(0, self.line) != self.above:
            return None
        if text.digest(last + 1, len(document.lines)) != self.below:
            return None
        whole = "".join(lines)
        whole = whole[len(self.before) : len(whole) - len(self.after)]
        split = len(whole)
        if cursor is not None:
            split = sum(map(len, lines[: cursor.line - self.line])) + cursor.column - len(self.before)
            if not 0 <= split <= len(whole):
                return None
        return _with_newlines(whole[:split]), _with_newlines(whole[split:])


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
