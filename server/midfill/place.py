"""The place that a suggestion goes to: as much of the text around it as is looked at when it is trimmed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from midfill.documents import Snapshot, content_length

_LINES_BELOW = 100
_AROUND = 20
# So many of them are searched for what the model repeats.
_NEARBY = 16
# Parsing takes about half a millisecond for so much, several times for each answer.
_CHARS_ABOVE = 2_500
_BEGINNING = re.compile(
    r"(?:(?:export|default|pub|public|private|protected|static|abstract|final|async|unsafe)\s+)*"
    r"(?:def|class|func|function|fun|fn|impl|struct|enum|interface|trait|module|namespace|type|const|let|var"
    r"|object|template|import|from|use|using|package)\b|[@#]\w"
)
# Of a longer line only the ends matter: its indentation, and what is next to the cursor.
_LONG_LINE = 2_000

MAX_LINES = 12
"""The most lines of a suggestion that nobody asked for; who asks gets twice as many."""


@dataclass(frozen=True, slots=True)
class Place:
    r"""Where the suggestion goes.

    Attributes:
        line_before: the current line up to the cursor.
        line_after: the rest of it.
        following: lines below, without terminators; enough to see what must not be repeated, and what parses.
        max_lines: the most lines a suggestion may have.
        above: lines above with their \n, enough to see which block the cursor is in.
        language_id: the editor's name of the language; "" where it is not known.
        invoked: the user asked for it. Then a suggestion in the middle of a line may have several lines.
    """

    line_before: str
    line_after: str
    following: tuple[str, ...] = ()
    max_lines: int = MAX_LINES
    above: str = ""
    language_id: str = ""
    invoked: bool = False

    @property
    def tail(self) -> str:
        """What stands behind the cursor, but for blanks."""
        return self.line_after.strip()

    @property
    def around(self) -> tuple[str, ...]:
        """The lines above and below, as many as tell how the file is indented."""
        return (*self.above.split("\n")[-_AROUND:], *self.following[:_AROUND])

    @property
    def nearby(self) -> list[str]:
        """The lines just below that are not blank, without blanks at their ends."""
        return [line.rstrip() for line in self.following[:_NEARBY] if line.strip()]

    @property
    def next_line(self) -> str:
        """The next line below that is not blank; "" if there is none."""
        return next(iter(self.nearby), "")

    @property
    def previous_line(self) -> str:
        """The last line above that is not blank; "" if there is none."""
        return next((line.rstrip() for line in reversed(self.above.split("\n")) if line.strip()), "")

    @staticmethod
    def of(snapshot: Snapshot, *, invoked: bool) -> Place:
        """The place of a cursor."""
        before, after = snapshot.line_before, snapshot.line_after
        if len(before) > _LONG_LINE:
            before = before[: _LONG_LINE // 2] + before[-_LONG_LINE // 2 :]
        return Place(
            before,
            after[:_LONG_LINE],
            tuple(snapshot.lines_after(_LINES_BELOW)),
            above=_above(snapshot),
            language_id=snapshot.document.language_id,
            invoked=invoked,
            max_lines=2 * MAX_LINES if invoked else MAX_LINES,
        )


def _above(snapshot: Snapshot) -> str:
    """Lines above the cursor's, as many as are cheap to parse, from the first that looks like a beginning."""
    lines, size = snapshot.document.lines, 0
    first = snapshot.cursor.line
    while first > 0 and size + len(lines[first - 1]) <= _CHARS_ABOVE:
        first -= 1
        size += len(lines[first])
    if first > 0:
        # Not in the middle of a string, if it can be helped.
        beginnings = (line for line in range(first, snapshot.cursor.line) if _BEGINNING.match(lines[line]))
        first = next(beginnings, first)
    return "".join(line[: content_length(line)] + "\n" for line in lines[first : snapshot.cursor.line])
