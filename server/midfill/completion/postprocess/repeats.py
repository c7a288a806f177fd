"""Repeats: lines of a suggestion that are below the cursor already, also with other indentation.

Pure: text in, answers out. Each function judges the last of the lines so far.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from midfill.completion.postprocess import indentation
from midfill.completion.postprocess.brackets import opens_block_above
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import width
from midfill.completion.postprocess.tabs import may_open

# A line with a word and more is distinctive: unlike `else:` or `}`, a second one means copying.
_DISTINCTIVE = re.compile(r"\w\W++\w")
# The end of a statement, or of an element.
_ENDED = re.compile(r"(?:[;,)\]}]|</[\w-]+>|/>)\s*\Z")
# The end of a line whose statement continues below.
_GOES_ON = re.compile(r"(?:[=+\-*/%<>&|^~!?,.\\(\[{:]|\b(?:and|or|not|in|is))\s*\Z")
# The beginning of a line that continues a statement.
_CONTINUES = re.compile(r"\s*[.?&|+*/,:)\]}=<>-]")
# After a single line, the model's step of indentation is not known yet.
_COMMON_STEPS = (2, 4)
# A model that writes the same few lines this often will not stop.
_LONGEST_CYCLE = 4
_ENOUGH_CYCLES = 3


def is_distinctive(line: str) -> bool:
    """Return whether a line is distinctive, so that a repeat of it means copying."""
    return _DISTINCTIVE.search(line) is not None


def is_below_already(
    lines: Sequence[str],
    cursor: CursorContext,
    *,
    whole: str = "",
    nearby: bool = True,
    is_text: bool = False,
) -> bool:
    """Return whether the last line is the next one below, or, if distinctive, another one just below.

    Args:
        lines: the model's lines so far.
        cursor: where they go.
        whole: the last line with the text before it; by default the line alone.
        nearby: look further than the next line, too.
        is_text: the line is not code, so its indentation means nothing.
    """
    number = len(lines) - 1
    whole = (whole or lines[-1]).rstrip()
    below = cursor.next_line
    if not whole.strip():
        return False
    if whole == below:
        return True
    soon = _block_below(cursor) if cursor.is_code else cursor.nearby
    if nearby and number > 0 and is_distinctive(whole) and whole in soon:
        return True
    if not is_distinctive(whole):
        return number > 0 and not is_text and whole.strip() == below.strip() and _is_too_deep(lines, cursor)
    if number == 0:
        is_next = whole.strip() == below.strip() and not cursor.line_before.strip()
        return is_next and (is_text or _begins_as_deep(whole, cursor))
    candidates = [line for line in soon if line.strip() == whole.strip()]
    if not candidates or not (nearby or below in candidates):
        return False
    if is_text and below in candidates:
        return True
    return _is_as_deep([cursor.line_before + lines[0], *lines[1:]], candidates, cursor)


def retraced(lines: Sequence[str], cursor: CursorContext) -> int:
    """Count the lines at the end that copy two consecutive lines below; 0 if they do not.

    If these are the next two, they may be indented differently. After the beginning of a text, both must be
    distinctive.
    """
    last = len(lines) - 1
    if last < 1 or not lines[last].strip():
        return 0
    first = next((at for at in range(last - 1, -1, -1) if lines[at].strip()), -1)
    if first < 0 or not is_distinctive(lines[first]):
        return 0
    begins = not any(line.strip() for line in lines[:first]) and first == last - 1
    if not begins and not is_distinctive(lines[last]):
        return 0
    one, two = (lines[first] if first else cursor.line_before + lines[first]), lines[last]
    pairs = list(pairwise(cursor.nearby))
    is_next = any(
        (one.strip(), two.strip()) == (above.strip(), below.strip())
        and _sign(width(two) - width(one)) == _sign(width(below) - width(above))
        for above, below in pairs[:1]
    )
    if is_next or (begins and (one.rstrip(), two.rstrip()) in pairs):
        return last - first + 1
    return 0


def without_next_line(text: str, cursor: CursorContext) -> str:
    """Return the text up to where it continues with the next line below."""
    lines = (cursor.line_before + text).split("\n")
    at = next(
        (at for at, line in enumerate(lines) if line.strip() and line.rstrip() == cursor.next_line), None
    )
    return text if at is None else "\n".join(text.split("\n")[:at])


def _block_below(cursor: CursorContext) -> list[str]:
    """Return the lines just below that are in the next one's block, or in one around it.

    Deeper lines are in other blocks, which may well contain an equal line.
    """
    lines: list[str] = []
    for line in cursor.nearby:
        if not lines or width(line) <= width(lines[-1]):
            lines.append(line)
    return lines


def _begins_as_deep(whole: str, cursor: CursorContext) -> bool:
    """Return whether a first line belongs where the next one below is, whatever its indentation."""
    above, have = width(cursor.previous_line), width(whole)
    if _sign(have - above) == _sign(width(cursor.next_line) - above):
        return True
    is_typed = bool(cursor.line_before) and have == width(cursor.line_before)
    return not is_typed and not opens_block_above(cursor)


def _is_as_deep(lines: Sequence[str], below: Sequence[str], cursor: CursorContext) -> bool:
    """Return whether the last line, in the model's steps, is as deep as one of those below."""
    base = cursor.line_before if cursor.line_before.strip() else cursor.previous_line
    written = [line for line in lines if line.strip()]
    if cursor.line_before.strip():
        written = written[1:]
    if (sibling := _too_deep_after(written)) is not None:
        # The user began the first line; the sibling is not it.
        return any(width(line) == width(sibling) for line in below)
    around = [*cursor.above.split("\n"), cursor.line_before, *cursor.following]
    from_base, have, step = width(base), width(lines[-1]), width(indentation.unit(around))
    steps = {width(indentation.unit([base, *written]))}
    steps |= set(_COMMON_STEPS) if len(written) == 1 else {width(indentation.unit(written))}
    return any(
        Fraction(have, one) == Fraction(width(line), step)
        or Fraction(have - from_base, one) == Fraction(width(line) - from_base, step)
        for one in steps
        for line in below
    )


def _is_too_deep(lines: Sequence[str], cursor: CursorContext) -> bool:
    """Return whether the last line is too deep, and the next one below is where it belongs."""
    written = [line for line in (cursor.line_before + lines[0], *lines[1:]) if line.strip()]
    sibling = _too_deep_after(written)
    return sibling is not None and width(sibling) == width(cursor.next_line)


def _too_deep_after(written: Sequence[str]) -> str | None:
    """Return the line before the last one, if the last is deeper though that opens no block; else None."""
    if len(written) > 1 and width(written[-1]) > width(written[-2]) and _is_over(*written[-2:]):
        return written[-2]
    return None


def _is_over(line: str, following: str) -> bool:
    """Return whether a line ends a statement, so that the following one is not deeper."""
    if _ENDED.search(line):
        return True
    return not (may_open(line) or _GOES_ON.search(line) or _CONTINUES.match(following))


def repeated(lines: Sequence[str]) -> int:
    """Count the lines at the end that repeat the lines before them twice; 0 if they do not."""
    for size in range(2, min(_LONGEST_CYCLE, len(lines) // _ENOUGH_CYCLES) + 1):
        last = list(lines[-size:])
        if list(lines[-_ENOUGH_CYCLES * size :]) == _ENOUGH_CYCLES * last and any(map(is_distinctive, last)):
            return size * (_ENOUGH_CYCLES - 1)
    return 0


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
