"""The text around the cursor, as far as postprocessing looks at it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from midfill.text import notation
from midfill.text.documents import Snapshot, content_length
from midfill.text.syntax import openings

_LINES_BELOW = 100
NUM_AROUND = 20
# Number of non-blank lines below that are searched for text that the model repeats.
_NEARBY = 16
# Parsing this many characters takes about half a millisecond, several times for each answer.
_CHARS_ABOVE = 2_500
# The beginning of a long string is searched this far up; most of the text is searched, not parsed.
_CHARS_FARTHER = 12_000
_QUOTES = ("'", '"')
# The key, or dash, and the sign of a block scalar in YAML.
_SCALAR = re.compile(r"(?:.*[:\-?]\s+|\s*)(?:[!&]\S+\s+)*[|>][-+\d]*\s*(?:#.*)?\Z")
_SCRIPT = re.compile(r"</?(?:script|style)\b")
_BEGINNING = re.compile(
    r"(?:(?:export|default|pub|public|private|protected|static|abstract|final|async|unsafe)\s+)*"
    r"(?:def|class|func|function|fun|fn|impl|struct|enum|interface|trait|module|namespace|type|const|let|var"
    r"|object|template|import|from|use|using|package)\b|[@#]\w"
)
# In longer lines only the ends matter: the indentation, and the text next to the cursor.
_LONG_LINE = 2_000

MAX_LINES = 12
"""Maximum number of lines of an automatic suggestion; twice as many if the user asks."""


@dataclass(frozen=True, slots=True)
class CursorContext:
    r"""The text around the cursor.

    Attributes:
        line_before: the current line up to the cursor.
        line_after: the rest of the line.
        following: lines below, without terminators: enough to find repeated text, and to parse.
        max_lines: the maximum number of lines of a suggestion.
        above: lines above with their \n: enough to see which block the cursor is in.
        farther: lines above `above`: enough to see which string or comment the cursor is in.
        whole: there are no lines above these.
        language_id: the document's language; "" if it is not known.
        invoked: the user asked. Then a suggestion in the middle of a line may have several lines.
    """

    line_before: str
    line_after: str
    following: tuple[str, ...] = ()
    max_lines: int = MAX_LINES
    above: str = ""
    language_id: str = ""
    invoked: bool = False
    farther: str = ""
    whole: bool = True

    @property
    def is_prose(self) -> bool:
        """Whether all lines of the file are prose; in YAML, whether the cursor is in a block scalar."""
        if "yaml" in self.language_id.lower():
            return _is_in_scalar(self)
        return notation.is_prose(self.language_id)

    @property
    def is_code(self) -> bool:
        """Whether lines here are code: neither prose, nor the text of a markup document."""
        if not notation.is_markup(self.language_id):
            return not self.is_prose
        above = list(_SCRIPT.finditer(self.farther + self.above + self.line_before))
        if above:
            return not above[-1].group().startswith("</")
        below = _SCRIPT.search("\n".join((self.line_after, *self.following)))
        return below is not None and below.group().startswith("</")

    @property
    def has_jumps(self) -> bool:
        """Whether `return` and similar statements leave a block here."""
        return notation.of(self.language_id).jumps and self.is_code

    @property
    def tail(self) -> str:
        """The text after the cursor on its line, without surrounding blanks."""
        return self.line_after.strip()

    @property
    def around(self) -> tuple[str, ...]:
        """The lines above, at and below the cursor that show how the file is indented."""
        here = self.line_before + self.line_after if self.line_before.strip() else ""
        return (*self.above.split("\n")[-NUM_AROUND:-1], here, *self.following[:NUM_AROUND])

    @property
    def nearby(self) -> list[str]:
        """The non-blank lines just below, without trailing blanks."""
        return [line.rstrip() for line in self.following[:_NEARBY] if line.strip()]

    @property
    def next_line(self) -> str:
        """The next non-blank line below; "" if there is none."""
        return next(iter(self.nearby), "")

    @property
    def previous_line(self) -> str:
        """The last non-blank line above; "" if there is none."""
        return next((line.rstrip() for line in reversed(self.above.split("\n")) if line.strip()), "")

    @staticmethod
    def of(snapshot: Snapshot, *, invoked: bool) -> CursorContext:
        """Return the text around a snapshot's cursor."""
        before, after = snapshot.line_before, snapshot.line_after
        if len(before) > _LONG_LINE:
            before = before[: _LONG_LINE // 2] + before[-_LONG_LINE // 2 :]
        farther, above, whole = _above(snapshot)
        return CursorContext(
            before,
            after[:_LONG_LINE],
            tuple(snapshot.lines_after(_LINES_BELOW)),
            above=above,
            language_id=snapshot.document.language_id,
            invoked=invoked,
            max_lines=2 * MAX_LINES if invoked else MAX_LINES,
            farther=farther,
            whole=whole,
        )


def _is_in_scalar(cursor: CursorContext) -> bool:
    """Return whether a line above, with less indentation than the cursor's, begins a block scalar in YAML."""
    column = _width(cursor.line_before)
    if not cursor.line_before.strip():
        column = max(column, _width(cursor.next_line), 1)
    for line in reversed((cursor.farther + cursor.above).split("\n")):
        if line.strip() and _width(line) < column:
            if _SCALAR.fullmatch(line):
                return True
            column = _width(line)
    return False


def _width(line: str) -> int:
    """Return the number of spaces at the beginning of a line."""
    return len(line) - len(line.lstrip(" "))


def _above(snapshot: Snapshot) -> tuple[str, str, bool]:
    """Return (farther, above, whole): the lines above the cursor's that are cheap to parse, and those before.

    `above` begins with the first line that looks like a beginning, and not in the middle of a string.
    """
    lines, cursor = snapshot.document.lines, snapshot.cursor.line
    first = _first(lines, cursor, _CHARS_ABOVE)
    if first == 0:
        return "", _joined(lines[:cursor]), True
    begin = _first(lines, first, _CHARS_FARTHER)
    farther = _joined(lines[begin:first])
    start = first
    for _, closer, _ in openings(farther, snapshot.document.language_id, whole=begin == 0):
        if closer in _QUOTES:
            # They are too frequent to tell.
            continue
        # If it does not end in the window, the cursor is inside it, or it is not a string.
        ends = (row for row in range(first, cursor) if closer.strip() in lines[row])
        start = max(start, next(ends, first - 1) + 1)
    beginnings = (line for line in range(start, cursor) if _BEGINNING.match(lines[line]))
    start = next(beginnings, start)
    return farther + _joined(lines[first:start]), _joined(lines[start:cursor]), begin == 0


def _first(lines: Sequence[str], end: int, num_chars: int) -> int:
    """Return the first of the lines before `end` that have at most `num_chars` characters together."""
    first, size = end, 0
    while first > 0 and size + len(lines[first - 1]) <= num_chars:
        first -= 1
        size += len(lines[first])
    return first


def _joined(lines: Sequence[str]) -> str:
    return "".join(line[: content_length(line)] + "\n" for line in lines)
