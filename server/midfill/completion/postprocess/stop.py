"""Stop rules: where a suggestion ends, asked after every token. Pure: text in, offsets out.

The model's text is as `normalized` gives it, and `CursorContext` says where it goes. `midline` judges texts
in the middle of a line; `clean` makes the final text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from midfill.completion.postprocess import indentation, repetition
from midfill.completion.postprocess.brackets import (
    CLOSERS,
    OutlineReader,
    closes_outside,
    code_above,
    enclosing,
    indent_of_closer,
    opens_block_above,
)
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import indent_of, opens_block, width
from midfill.completion.postprocess.midline import end_of_line, joint
from midfill.completion.postprocess.repeats import is_below_already, is_distinctive, repeated, retraced
from midfill.completion.postprocess.tabs import may_open
from midfill.completion.reasons import Reason
from midfill.text import notation
from midfill.text.syntax import Outline, balance

_BLOCK_CLOSER = re.compile(r"\s*(?:[)\]}>]+[;,)\]}>]*|end|done|fi|esac)\s*\Z")
_WORD_CLOSER = re.compile(r"\s*(?:(?:end|fi|done|esac|endif|endfor|endwhile)\b\W*|</[\w.:-]+>)\s*\Z")
_HEAD = re.compile(
    r"\b(?:if|unless|case|when|while|until|for|do|begin|then|else|try|def|class|module|function|fn)\b|<(\w+)\b(?!.*</\1)"
)
_ENOUGH_REPEATS = 3
JUMP = re.compile(r"\s*(?:return|raise|throw|break|continue|goto)\b")
_STATEMENT = re.compile(r"\s*[\w@$\"'`&*(\[]")
# Lines that continue the statement before them, or are jump targets.
_GOES_ON = re.compile(
    r"\s*(?:[)\]}]*\s*(?:else|elif|elsif|elseif|except|finally|catch|while)\b"
    r"|(?:case|default|when|rescue|ensure|then)\b|\w+\s*:(?!\S))"
)
DANGLING = re.compile(r"(?:[=+\-*/%<>&|^~!?,.(\[{]|[\"\']\s*:)\s*\Z")
# An item of a YAML list, which may stand in the column of its key.
_ITEM = re.compile(r"\s*-(?:\s|\Z)")
_DIRECTIVE = re.compile(r"\s*#\s*(?:if|else|elif|endif|define|undef|include|pragma|region|endregion)\b")
_FENCE = re.compile(r"\W*(?:```|~~~)")
_FUNCTION = re.compile(r"\s*(?:async\s+)?def\b")


class Stopper:
    """Finds the end of a growing text.

    Only complete lines are judged, each once and only by the text before it, so more text never changes the
    answer. A line that repeats itself is judged before it is complete, at fixed columns.

    Attributes:
        why: the rule that ended the text.
    """

    def __init__(self, cursor: CursorContext) -> None:
        self._cursor = cursor
        self._reader = OutlineReader(cursor)
        self._lines: list[str] = []
        self._start = 0
        self._growing = repetition.GrowingLine(cursor.around, cursor.line_before)
        self._found: int | None = None
        self.why = Reason.BLANK_LINES

    def end(self, text: str) -> int | None:
        """Return the length of `text` at which the suggestion ends, or None if more may come.

        `text` must begin with the text of the previous call.
        """
        if self._found is None:
            self._found = self._end(text)
        return self._found

    def _end(self, text: str) -> int | None:
        cursor = self._cursor
        if cursor.tail and not cursor.invoked:
            end = end_of_line(text, cursor)
            cut = self._end_of_repetition(text[:end])
            return end if cut is None else cut
        # The last piece is not a complete line yet.
        while (newline := text.find("\n", self._start)) >= 0:
            if (end := self._end_of_repetition(text[self._start : newline])) is not None:
                return end
            self._lines.append(text[self._start : newline])
            end = self._end_at_rest(self._lines) if cursor.tail else self._end_of_block(self._lines)
            if end is not None:
                return end
            self._start = newline + 1
            self._growing = repetition.GrowingLine(cursor.around)
        return self._end_of_repetition(text[self._start :])

    def _end_of_repetition(self, line: str) -> int | None:
        """Return the end of the useful part of the newest line, if that line repeats itself without end."""
        cut = self._growing.cut(line)
        if cut is None:
            return None
        self.why = Reason.REPEATS_ITSELF
        return self._start + cut

    def _end_at_rest(self, lines: list[str]) -> int | None:
        """Return where a multi-line text joins the rest of the cursor's line, or goes too far."""
        cursor, number = self._cursor, len(lines) - 1
        text = "\n".join(lines)
        start = len(text) - len(lines[-1])
        if (end := joint(text, start, cursor, self._reader)) is not None:
            self.why = Reason.REPEATS_TEXT
            return end
        found = self._reader.read(text)
        if number > 0 and is_below_already(lines, cursor, nearby=False):
            self.why = Reason.REPEATS_TEXT
        elif number > 0 and not "".join(lines[-2:]).strip():
            self.why = Reason.BLANK_LINES
        elif _is_fence(lines[-1], cursor, found, start):
            self.why = Reason.CODE_FENCE
        elif not cursor.is_prose and closes_outside(found, start):
            self.why = Reason.CLOSES_BLOCK
        else:
            return len(text) if number + 1 == cursor.max_lines else None
        return len(text[:start].rstrip()) if number else len(text)

    def _end_of_block(self, lines: list[str]) -> int | None:
        """Return where the cursor's block ends: at a dedent, at text that is below, or at a repetition."""
        text = "\n".join(lines)
        start = len(text) - len(lines[-1])
        found = self._reader.read(text)
        if num_repeated := repeated([self._cursor.line_before + lines[0], *lines[1:]]):
            self.why = Reason.REPEATS_ITSELF
            return len("\n".join(lines[:-num_repeated]).rstrip(" \t\n"))
        if num_retraced := retraced(lines, self._cursor):
            self.why = Reason.REPEATS_TEXT
            return len("\n".join(lines[:-num_retraced]).rstrip(" \t\n"))
        first = next((line for line in lines if line.strip()), "")
        is_text = found.within(0) or found.ends_comment(len(lines[0]))
        block = _Block.around(self._cursor, first, lines[0], is_text=is_text)
        if (why := block.is_over_before(lines, found, start)) is not None:
            self.why = why
            return len(text[:start].rstrip(" \t\n"))
        if block.is_over_after(lines[-1], found, start) or len(lines) == self._cursor.max_lines:
            return len(text)
        return None


def stop(text: str, cursor: CursorContext) -> int | None:
    """Return the length of `text` at which the suggestion ends, or None if more may come."""
    return Stopper(cursor).end(text)


@dataclass(frozen=True, slots=True)
class _Block:
    """The block that a suggestion of several lines belongs to.

    Attributes:
        cursor: where the suggestion goes.
        base: width of the indentation of its first line.
        opened: that line opens a block; else the block is the one around it.
        body_without_header: the lines below are the body of a block that nothing above opens.
        step: width of one step of indentation.
        min_indent: the smallest width of indentation that a line of the suggestion may have.
        is_text: the cursor is in text that is not code: a string, a comment, a file of prose.
    """

    cursor: CursorContext
    base: int
    opened: bool
    body_without_header: bool
    step: int
    min_indent: int
    is_text: bool

    @staticmethod
    def around(cursor: CursorContext, first: str, rest: str, *, is_text: bool) -> _Block:
        """Return the block at a cursor, given the first line of code, and the rest of the cursor's line."""
        whole = cursor.line_before + (rest if cursor.line_before.strip() else first)
        is_text = is_text or not cursor.is_code
        opened = not is_text and bool(cursor.line_before.strip()) and opens_block(whole)
        base = width(whole if whole.strip() else cursor.line_before)
        if is_text and (begun := enclosing(cursor)) is not None:
            # A line after a string belongs in the column where the string begins.
            base = begun.column
        elif (begun_above := _comment_ended(cursor)) is not None:
            base = width(begun_above)
        below = cursor.next_line
        body_without_header = (
            not is_text
            and not cursor.line_before.strip()
            and width(below) > base
            and _STATEMENT.match(below) is not None
            and not opens_block_above(cursor)
        )
        step = indentation.unit(cursor.around)
        return _Block(
            cursor, base, opened, body_without_header, width(step), _min_indent(cursor, base), is_text
        )

    def is_over_before(self, lines: list[str], found: Outline, start: int) -> Reason | None:
        """Return the reason why the last line, from `start` on, is not part of the suggestion; else None."""
        line, number, cursor = lines[-1], len(lines) - 1, self.cursor
        is_text = cursor.is_prose or found.within(start)
        whole = line
        if number == 0:
            column = None if is_text else indent_of_closer(line, cursor)
            whole = (cursor.line_before + indent_of(line) if column is None else column) + line.lstrip(" \t")
        if is_below_already(lines, cursor, whole=whole, is_text=is_text):
            return Reason.REPEATS_TEXT
        if _is_fence(line, cursor, found, start):
            return Reason.CODE_FENCE
        closes_as_below = number and not is_text and self._closes_as_below(line, found)
        if closes_as_below or _closes_nothing(lines, cursor, whole):
            return Reason.CLOSES_BLOCK
        if (
            number
            and (self.body_without_header or opens_block(line))
            and line.strip() == cursor.next_line.strip()
        ):
            # The next line again, with another indentation.
            return Reason.REPEATS_TEXT if is_distinctive(line) else None
        if not cursor.is_prose and closes_outside(found, start):
            # The file has that closer already, if one that is as deep is below.
            below = cursor.next_line
            stands = below.lstrip()[:1] in CLOSERS and width(below) >= width(whole)
            return Reason.CLOSES_BLOCK if stands else None
        if number == 0:
            return None
        if not line.strip():
            return Reason.BLANK_LINES if number > 1 and not lines[-2].strip() else None
        earlier = lines[max(0, number - _ENOUGH_REPEATS + 1) : number]
        if len(earlier) == _ENOUGH_REPEATS - 1 and all(one.strip() == line.strip() for one in earlier):
            return Reason.REPEATS_TEXT
        return None if is_text else self._leaves(lines, found)

    def _closes_as_below(self, line: str, found: Outline) -> bool:
        """Return whether a line closes what the cursor's line opened, as the next line below does too."""
        below = self.cursor.next_line
        is_same = line.strip().rstrip(",;") == below.strip().rstrip(",;") and width(below) == self.base
        closes = is_same and bool(found.open) and _BLOCK_CLOSER.fullmatch(line) is not None
        return closes and not balance(found.delimiters, found.open)[0]

    def _leaves(self, lines: list[str], found: Outline) -> Reason | None:
        """Return the reason why the last line leaves the block: its indentation, or it is unreachable."""
        line, cursor = lines[-1], self.cursor
        column = width(line)
        if column > self.base or (_DIRECTIVE.match(line) and "#" not in notation.of(cursor.language_id).line):
            return None
        if column < self.base:
            return Reason.OUTSIDE_BLOCK if column < self.min_indent else None
        if not cursor.is_code or _BLOCK_CLOSER.fullmatch(line) or _GOES_ON.match(line):
            return None
        # In languages without header lines, a colon opens a block only if deeper lines follow.
        opened = self.opened and (cursor.has_jumps or any(width(one) > self.base for one in lines[1:] if one))
        if opened and self.min_indent == self.base and not _ITEM.match(line):
            return Reason.OUTSIDE_BLOCK
        if not cursor.has_jumps:
            return None
        earlier = [at for at, one in enumerate(lines[:-1]) if one.strip()]
        jumped = (
            len(earlier) > 1
            and width(lines[earlier[-1]]) == self.base
            and JUMP.match(lines[earlier[-1]])
            and not found.within(sum(len(one) + 1 for one in lines[: earlier[-1]]))
        )
        if jumped and not balance(found.delimiters, found.open)[0]:
            return Reason.UNREACHABLE
        return Reason.UNREACHABLE if JUMP.match(line) and reaches_below(cursor, self.base) else None

    def is_over_after(self, line: str, found: Outline, start: int) -> bool:
        """Return whether the line, which begins at `start`, is the last of the block."""
        if self.cursor.is_prose:
            return False
        column = width(line)
        if found.within(start):
            return closes_outside(found, start)
        if self.body_without_header and opens_block(line) and self.base <= column:
            # Its body is below, if that is one step deeper.
            return width(self.cursor.next_line) == column + self.step
        # A block that the cursor's line opened is closed by its own closer, or by a word such as `done`.
        closed = start > 0 and found.open and not balance(found.delimiters, found.open)[0]
        closes_own = (closed or self.opened) and column == self.base and _BLOCK_CLOSER.fullmatch(line)
        if closes_own:
            return True
        # As in `} else {`, where one block ends and the next begins.
        return closes_outside(found, start) and not (opens_block(line) and _GOES_ON.match(line))


def _closes_nothing(lines: list[str], cursor: CursorContext, whole: str) -> bool:
    """Return whether the last line closes a block where none begins, and the next line closes that block.

    For words and tags; brackets are matched.
    """
    below, column = cursor.next_line, width(whole)
    if not _WORD_CLOSER.fullmatch(whole) or whole.strip() != below.strip() or width(below) >= column:
        return False
    if cursor.is_prose or (cursor.line_before.strip() and len(lines) == 1):
        return False
    above = [*cursor.above.split("\n"), *([cursor.line_before + lines[0], *lines[1:-1]] if lines[1:] else [])]
    outer = next((line for line in reversed(above) if line.strip() and width(line) <= column), "")
    # A line that continues, or has such a word anywhere, may have begun a block.
    return width(outer) < column or not (
        may_open(outer) or _HEAD.search(outer) or DANGLING.search(outer.rstrip(">"))
    )


def _comment_ended(cursor: CursorContext) -> str | None:
    """Return the line that begins the comment which ends at the cursor; None if it is the cursor's."""
    before = cursor.line_before.strip()
    if not before.endswith("*/") or "/*" in before:
        return None
    return next((line for line in reversed(cursor.above.split("\n")) if "/*" in line), None)


def _min_indent(cursor: CursorContext, base: int) -> int:
    """Return the smallest indentation of lines that belong to the suggestion, for a block at `base`.

    That of the block; or of the function around it, if no part of the function is below yet; or of a
    makefile's recipe.
    """
    if cursor.language_id == "makefile" and cursor.previous_line.startswith("\t"):
        return min(base, width("\t"))
    if not cursor.invoked or cursor.language_id not in indentation.SIGNIFICANT:
        return base
    outer = base + 1
    for line in reversed((*code_above(cursor), cursor.line_before)):
        if line.strip() and width(line) < outer:
            outer = width(line)
            if _FUNCTION.match(line):
                return min(base, outer + 1) if width(cursor.next_line) <= outer else base
    return base


def _is_fence(line: str, cursor: CursorContext, found: Outline, start: int) -> bool:
    """Return whether a line ends a Markdown code block, in which models have learned to write code."""
    if not line.lstrip().startswith(("```", "~~~")) or not cursor.is_code or found.within(start):
        return False
    # If the file has fences, in comments or elsewhere, they are part of it.
    return not any(_FENCE.match(one) for one in cursor.around)


def reaches_below(cursor: CursorContext, column: int) -> bool:
    """Return whether the next line below is a statement of the same block."""
    below = cursor.next_line
    return width(below) == column and bool(_STATEMENT.match(below)) and not _GOES_ON.match(below)
