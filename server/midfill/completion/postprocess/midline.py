"""Suggestions in the middle of a line: where they join the rest of that line. Pure: text in, text out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from midfill.completion.postprocess import indentation
from midfill.completion.postprocess.brackets import CLOSERS, OutlineReader, imbalance, scan
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import indent_of, opens_block, width
from midfill.completion.postprocess.repeats import is_below_already
from midfill.text import syntax
from midfill.text.syntax import balance

_MOST_ALIKE = 12
_LONGEST_LIKENESS = 100
_WORD = re.compile(r"\w")
# Auto-closed brackets, and characters that may follow them. Longer runs of closers do not occur; for each of
# them the line is read.
_MOST_SHARED = 16
_CLOSING_TAIL = re.compile(r"[\s)\]}>\"'`,;:]+")


def end_of_line(text: str, cursor: CursorContext) -> int | None:
    """Return where a one-line text ends: at a bracket that the file closes itself, or at the line's end."""
    newline = text.find("\n")
    line = text if newline < 0 else text[:newline]
    tail = cursor.line_after.lstrip()
    # A bracket opened before the cursor is being closed, and the file closes it already.
    closers = [one.start for one in balance(tuple(scan(line)))[1]]
    # The brackets that the rest of the line leaves open come first.
    spare = len(balance(tuple(scan(cursor.line_before)))[0]) - len(balance(tuple(scan(tail)))[1])
    closing = next(iter(closers[max(0, spare) :]), None)
    if closing is not None and tail.startswith(line[closing]):
        return closing
    return None if newline < 0 else newline


def joint(text: str, start: int, cursor: CursorContext, reader: OutlineReader) -> int | None:
    """Return where the line of `text` at `start` joins the rest of the cursor's line."""
    tail = cursor.tail
    for one in balance(reader.read(text).delimiters)[1]:
        if one.start >= start and tail.startswith(one.text):
            return one.start
    line = text[start:].rstrip()
    if not line.endswith(tail) or _CLOSING_TAIL.fullmatch(tail):
        return None
    return start + len(line) - len(tail)


def bridged(text: str, end: int | None, cursor: CursorContext, *, complete: bool) -> str:
    """Return the part of a text that connects to the rest of the cursor's line.

    If the model wrote that rest itself, the suggestion ends before it. Otherwise the candidates are: all of
    the text; its first line; some lines, after which the rest of the line gets its own line; the text before
    a part that begins like the rest. The first candidate with the fewest syntax errors wins.
    """
    cut = text if end is None else text[:end]
    if end is not None and _begins(text[end:], cursor.tail):
        return _before_rest(cut, cursor.line_after)
    lines = cut.split("\n")
    candidates = list(_before_the_same(cut, cursor))
    if end is None and complete:
        # A line end after a single line is that of the cursor's line.
        candidates.append(cut if "\n" in cut.rstrip("\n") else cut.rstrip("\n"))
    candidates.append(without_overlap(lines[0], cursor))
    candidates = [_before_rest(candidate, cursor.line_after) for candidate in candidates]
    candidates += _on_lines_of_their_own(lines, cursor)
    candidates += _before_the_like(cut, cursor)
    return fewest_errors([text for text in candidates if text.strip() and not repeats(text, cursor)], cursor)


def repeats(text: str, cursor: CursorContext) -> bool:
    """Return whether one of the text's lines is the next line below."""
    lines = text.split("\n")
    whole = cursor.line_before + lines[0]
    return is_below_already(lines[:1], cursor, whole=whole, nearby=False) or any(
        is_below_already(lines[: number + 1], cursor, nearby=False) for number in range(1, len(lines))
    )


def _before_the_same(text: str, cursor: CursorContext) -> Iterator[str]:
    """Yield the text before the rest of the line, if the model wrote that rest and continued."""
    at = text.find(cursor.tail)
    if at > 0 and _WORD.search(cursor.tail):
        yield text[:at]


def _before_the_like(text: str, cursor: CursorContext) -> Iterator[str]:
    """Yield the text before each part that begins like the rest of the line, the longest match first."""
    tail = cursor.tail[:_LONGEST_LIKENESS]

    def likeness(at: int) -> int:
        return next(
            (size for size in range(len(tail)) if text[at + size : at + size + 1] != tail[size]), len(tail)
        )

    starts = [match.start() for match in re.finditer(re.escape(tail[0]), text) if match.start()]
    yield from (text[:at] for at in sorted(starts, key=likeness, reverse=True)[:_MOST_ALIKE])


def _begins(text: str, tail: str) -> bool:
    """Return whether a text begins with the rest of the line, or with its first closer."""
    return text.startswith(tail) or (tail[0] in CLOSERS and text.startswith(tail[0]))


def _before_rest(text: str, line_after: str) -> str:
    """Return the text without those blanks at its end that are after the cursor already."""
    blanks = indent_of(line_after)
    if not blanks:
        return text
    last = text[text.rfind("\n") + 1 :]
    if "\n" in text and not last.strip():
        return text[: len(text) - min(len(last), len(blanks))]
    return text.rstrip(" \t")


def _on_lines_of_their_own(lines: list[str], cursor: CursorContext) -> Iterator[str]:
    """Yield the first one, two, three ... lines, with the rest of the cursor's line moved to its own line."""
    below, blanks = cursor.next_line, indent_of(cursor.line_after)
    step = indentation.unit(cursor.around)
    column = width(below) - (width(step) if opens_block(cursor.tail) else 0)
    if not below or column < width(blanks):
        return
    # A suggestion has at most this many lines; each is parsed.
    for number, line in enumerate(lines[: cursor.max_lines]):
        whole = line if number else cursor.line_before + line
        if line.strip() and (not opens_block(line) or column > width(whole)):
            text = "\n".join(lines[: number + 1]).rstrip()
            yield text + "\n" + indent_of(below)[: column - width(blanks)]


def fewest_errors(candidates: list[str], cursor: CursorContext) -> str:
    """Return the first of the candidates that leave the fewest syntax errors."""
    if len(candidates) < 2:
        return candidates[0] if candidates else ""

    return min(candidates, key=lambda text: _damage(text, cursor))


def _damage(text: str, cursor: CursorContext) -> tuple[int, int]:
    """Return how many lines before the end the parser gives up, and the number of the grammar's errors."""
    above = cursor.above + cursor.line_before
    whole = "\n".join((above + text + cursor.line_after, *cursor.following))
    first = syntax.first_error(whole, cursor.language_id)
    unread = 0
    if first is not None:
        # An error above the cursor's line does not depend on the text.
        unread = whole.count("\n") + 1 - max(first, above.count("\n"))
    return unread, syntax.count_errors(whole, cursor.language_id) or 0


def without_overlap(text: str, cursor: CursorContext) -> str:
    """Drop the end of `text` if it is after the cursor already.

    An equal end may also belong to the text, as the bracket of `len(names)` before a `)` does: dropping it
    would leave more brackets open on the line than before, so it stays.
    """
    tail = cursor.line_after.rstrip()
    # The rest of the line may close brackets that were opened further up.
    num_above = len(balance(tuple(scan(cursor.line_before + tail)))[1])

    def left_open(kept: str) -> int:
        return abs(imbalance(cursor.line_before + kept + tail) - num_above)

    best, least = text, left_open(text)
    for length in range(min(len(text), len(tail)), 0, -1):
        if length > _MOST_SHARED and length < len(tail):
            continue
        shared = tail[:length]
        whole = length == len(tail) and length > 1
        if text.endswith(shared) and (whole or _CLOSING_TAIL.fullmatch(shared)):
            kept = text[: len(text) - length]
            # Of equally good cuts, the longest; and any cut rather than none.
            if (found := left_open(kept)) < least or (best is text and found == least):
                best, least = kept, found
    return best
