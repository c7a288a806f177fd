"""Comments in a suggestion, and around the cursor. By the grammar, or by the table of `notation`. Pure."""

from __future__ import annotations

from midfill.completion.postprocess.brackets import OutlineReader
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.text import notation, syntax


def num_comments(text: str, cursor: CursorContext) -> int:
    """Count the lines at the end of a text that are blank, or comments that the text itself begins."""
    if cursor.is_prose:
        return 0
    comments = [(start, end) for start, end in OutlineReader(cursor).comments(text) if start >= 0]
    lines = text.split("\n")
    end = len(text)
    for number, line in enumerate(reversed(lines)):
        start = end - len(line.lstrip())
        if line.strip() and not any(
            first <= start and start + len(line.strip()) <= last for first, last in comments
        ):
            return number
        if number == len(lines) - 1 and _is_first_line(line, cursor):
            return number
        end -= len(line) + 1
    return len(lines)


def _is_first_line(line: str, cursor: CursorContext) -> bool:
    """Return whether a line names an interpreter, which only the first line of a file can do."""
    return line.startswith("#!") and not (cursor.farther + cursor.above + cursor.line_before)


def follows_comment(cursor: CursorContext) -> bool:
    """Return whether the user is writing a comment: before the cursor, or on the last non-blank line."""
    text = (cursor.above + cursor.line_before).rstrip()
    line = cursor.line_before.strip() or cursor.previous_line.strip()
    if not line:
        return False
    # For the cursor's line its end counts; a line above is a comment from its beginning on.
    row = len(text) - len(line)
    at = len(text) - 1 if cursor.line_before.strip() else row
    if syntax.knows(cursor.language_id):
        # A comment that ends with its line is complete once the line is.
        found = syntax.outline(text + "\n", cursor.language_id, row)
        spans = [(row + start, row + end) for start, end, kind in found.opaque if kind] if found else []
    else:
        spans = [(start, end) for start, end, kind in notation.comments(text, cursor.language_id) if kind]
    # A mark after an unterminated quote does not begin a comment.
    return any(start <= at < end and text[row:start].count('"') % 2 == 0 for start, end in spans)
