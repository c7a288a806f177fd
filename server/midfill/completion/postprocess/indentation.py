"""Indentation: how a file is indented, and where a line of a suggestion belongs. Pure: text in, text out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

_BLANKS = re.compile(r"[ \t]*")
OPENING = ("{", "(", "[", ":", "=>", "->")
_TAB = 8
_DEFAULT_UNIT = "    "
# One line of the other kind in this many is taken for an aligned one.
_MAJORITY = 2
_ASTERISK = re.compile(r" *\*")
# Lines that continue the statement above, whatever their indentation.
_CONTINUES = re.compile(r"[.?&|+*/,:)\]}=<>-]")
# Statements that begin something at the top level of a file, never inside a function.
_TOP_LEVEL = re.compile(r"(?:#|@|if __name__\b|(?:async\s+)?def\b|class\b|import\b|from\b|```)")
# Languages in which indentation determines the block of a line.
SIGNIFICANT = frozenset({"python"})


def indent_of(line: str) -> str:
    """Return the blanks that a line begins with."""
    match = _BLANKS.match(line)
    return match.group() if match else ""


def width(line: str) -> int:
    """Return the width of a line's indentation, in columns."""
    return len(indent_of(line).expandtabs(_TAB))


def opens_block(line: str) -> bool:
    """Return whether a line ends so that the next one belongs deeper."""
    return line.rstrip().endswith(OPENING)


def kind(lines: Iterable[str]) -> str:
    r"""Return the character that the lines are indented by, "\t" or " ", if nearly all agree; else ""."""
    # The asterisks of a comment are one space to the right of its indentation.
    leads = [indent_of(line) for line in lines if line.strip() and not _ASTERISK.match(line)]
    tabs = sum(each.startswith("\t") for each in leads)
    blanks = sum(each.startswith(" ") for each in leads)
    if tabs > _MAJORITY * blanks:
        return "\t"
    return " " if blanks > _MAJORITY * tabs else ""


def unit(lines: Iterable[str]) -> str:
    r"""Return one step of the lines' indentation: "\t", or some spaces."""
    lines = [line for line in lines if line.strip()]
    leads = [indent_of(line) for line in lines]
    if any(each.startswith("\t") for each in leads) and kind(lines) != " ":
        return "\t"
    widths = [len(each) for each in leads if not each.startswith("\t")]
    steps = Counter(two - one for one, two in pairwise(widths) if two - one > 1)
    if not steps:
        # Only steps outwards: one line may end several blocks.
        steps = Counter(one - two for one, two in pairwise(widths) if one - two > 1)

    def fits(step: int) -> tuple[int, int, int]:
        # Text in comments and continued lines is indented in other ways, but less often.
        return steps[step], sum(each % step == 0 for each in widths), -step

    return " " * max(steps, key=fits) if steps else _DEFAULT_UNIT


def moved(text: str, before: str, wanted: int, step: str) -> str | None:
    """Return the text, which follows the blanks `before` on a line, moved to the column `wanted`.

    None if the cursor is already to the right of that column.
    """
    lines = text.split("\n")
    shift = wanted - width(before + lines[0])
    have = width(before)
    if wanted < have:
        return None
    first = _blanks(wanted, step)[len(before) :] if step == "\t" else " " * (wanted - have)
    size = width(step)

    def follows(line: str) -> bool:
        # After a first line that is off the grid, lines on the grid are where they belong.
        return bool(line.strip()) and (shift % size == 0 or width(line) % size != 0)

    rest = [
        _blanks(max(0, width(line) + shift), step) + line.lstrip(" \t") if follows(line) else line
        for line in lines[1:]
    ]
    return "\n".join([first + lines[0].lstrip(" \t"), *rest])


def wanted_width(before: str, text: str, previous: str, following: str, step: str) -> int | None:
    """Return the column where a suggestion that begins a line belongs; None if it cannot be determined.

    Args:
        before: the blanks before the cursor.
        text: the suggestion.
        previous: the nearest non-blank line above; "" if there is none.
        following: the nearest one below.
        step: one step of indentation.
    """
    first, *rest = text.split("\n")
    have, above, below = width(before + first), width(previous), width(following)
    size = width(step)
    if previous.endswith((",", "\\")) and have > above:
        # It continues a line above.
        return None
    if opens_block(previous) and not previous.lstrip().startswith("#"):
        inner = below if below > above else above + size
        if below == inner < have:
            # Deeper than the block below.
            return inner
        return inner if have < inner and (have <= above or have % size) else None
    if have % size and have != above:
        # The user is typing towards the next step.
        return have + size - have % size
    outer = min(above, below) if following else 0
    if previous and have < outer:
        # Unless it opens the block that the line below is in.
        heads = any(opens_block(line) and width(line) < below for line in (before + first, *rest))
        return None if heads else outer
    plausible = {above, below, 0} if following else {above, 0}
    typed = width(before)
    if not before and previous and have > above and have != below:
        # Nothing above opens a block that the text could be in.
        return None if _CONTINUES.match(first.lstrip()) else above
    if first[:1] in {" ", "\t"} and have > above and have not in plausible and typed in plausible - {0}:
        return None if _CONTINUES.match(first.lstrip()) else typed
    return None


def starts_anew(first: str) -> bool:
    """Return whether a line of Python begins something that belongs at the top level of a file."""
    return _TOP_LEVEL.match(first) is not None


def _blanks(columns: int, step: str) -> str:
    if step == "\t":
        return "\t" * (columns // _TAB) + " " * (columns % _TAB)
    return " " * columns
