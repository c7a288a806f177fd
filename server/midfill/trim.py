r"""Where a suggestion ends, and what of the model's text is worth inserting. Pure: text in, text out.

The model's text uses \n. `Place` says where it would go; a `Stopper` is asked after every token whether
enough has come; `clean` makes the final text or says why there is none. What stands in the middle of a
line is left to `midline`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from midfill import indentation, syntax
from midfill.brackets import CLOSERS, Reader, closes_outside
from midfill.indentation import lead, opens_block, width
from midfill.midline import bridged, end_of_line, fewest_errors, joint, without_overlap
from midfill.place import Place
from midfill.syntax import Delimiter, Outline, balance

_BLOCK_CLOSER = re.compile(r"\s*(?:[)\]}>]+[;,)\]}>]*|end|done|fi|esac)\s*\Z")
# A line with a word and some more in it is not there twice by chance, as `else:` or `}` is.
_TELLING = re.compile(r"\w.*\W.*\w")
_ENOUGH_REPEATS = 3
# Where a comment is all there is, it is one of these, should there be no grammar.
_JUMP = re.compile(r"\s*(?:return|raise|throw|break|continue|goto)\b")
_STATEMENT = re.compile(r"\s*[\w@$\"'`&*(\[]")
# Lines that belong to the statement before them, or can be jumped to.
_GOES_ON = re.compile(
    r"\s*(?:(?:else|elif|elsif|elseif|except|finally|catch|case|default|when|rescue|ensure|then|while)\b|\w+\s*:(?!\S))"
)
_DIRECTIVE = re.compile(r"\s*#\s*(?:if|else|elif|endif|define|undef|include|pragma|region|endregion)\b")
_FUNCTION = re.compile(r"\s*(?:async\s+)?def\b")
_COMMENT = re.compile(r"\s*(?:#(?!include|define|if|el|end|!|\[)|//|/\*|\*|--|<!--|%|;)")


class Stopper:
    """Says where a text that grows comes to its end.

    Only complete lines are judged, each once, and only by what stands before it: so more text never
    changes the answer.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._reader = Reader(place)
        self._num_judged = 0

    def end(self, text: str) -> int | None:
        """The length of `text` at which the suggestion ends, or None if more may come.

        `text` begins with what was given before.
        """
        place = self._place
        if place.tail and not place.invoked:
            return end_of_line(text, place)
        lines = text.split("\n")
        # The last piece is still being written.
        for number in range(self._num_judged, len(lines) - 1):
            judged = lines[: number + 1]
            end = self._end_at_rest(judged) if place.tail else self._end_of_block(judged)
            if end is not None:
                return end
            self._num_judged = number + 1
        return None

    def _end_at_rest(self, lines: list[str]) -> int | None:
        """Where a text of several lines leads to the rest of the cursor's line, or goes too far."""
        place, number = self._place, len(lines) - 1
        text = "\n".join(lines)
        start = len(text) - len(lines[-1])
        if (end := joint(text, start, place, self._reader)) is not None:
            return end
        repeats = number > 0 and (lines[-1].rstrip() == place.next_line or not "".join(lines[-2:]).strip())
        found = self._reader.read(text)
        if repeats or _is_fence(lines[-1], place, found, start) or closes_outside(found, start):
            return len(text[:start].rstrip()) if number else len(text)
        return len(text) if number + 1 == place.max_lines else None

    def _end_of_block(self, lines: list[str]) -> int | None:
        """Where the block that the cursor is in ends: at a dedent, at known text, at repetition."""
        text = "\n".join(lines)
        start = len(text) - len(lines[-1])
        block = _Block.around(self._place, next((line for line in lines if line.strip()), ""), lines[0])
        found = self._reader.read(text)
        if block.is_over_before(lines, found, start):
            return len(text[: 0 if block.retraces(lines) else start].rstrip(" \t\n"))
        if block.is_over_after(lines[-1], found, start) or len(lines) == self._place.max_lines:
            return len(text)
        return None


def stop(text: str, place: Place) -> int | None:
    """The length of `text` at which the suggestion ends, or None if more may come."""
    return Stopper(place).end(text)


def clean(
    text: str, place: Place, *, complete: bool, forbidden: Iterable[str] = ()
) -> tuple[str, str | None]:
    """The text to insert, or "" and the reason code why there is none.

    Args:
        text: what the model wrote.
        place: where it goes.
        complete: whether the model ended by itself or by `stop`; if not, it ran into its token limit,
            and half a last line is dropped when there are lines before it.
        forbidden: strings (sentinels) at which the text is cut, however the model spelled them.
    """
    for string in forbidden:
        text = text.partition(string)[0]
    if not text.strip():
        return "", "model-silent"
    if not complete and "\n" in text.strip("\n"):
        text = text[: text.rindex("\n")]
    end = stop(text + "\n", place)
    if place.tail and place.invoked:
        text = _indented(bridged(text, end, place, complete=complete), place)
    else:
        text = text if end is None else text[:end]
        if place.tail:
            text = without_overlap(text, place)
        else:
            limited = (end is None and not complete) or text.count("\n") + 1 >= place.max_lines
            text = _fitted(text.removeprefix(place.line_after), place, limited=limited)
        text = text.rstrip()
    text = "\n".join(_without_blanks(text.split("\n")))
    if not text.strip():
        return "", "repeats-text"
    if not place.invoked and _is_comment_only(text, place):
        return "", "comment-only"
    return text, None


def _without_blanks(lines: list[str]) -> list[str]:
    """Lines without blanks at their ends; those of the last belong to what follows."""
    return [line.rstrip(" \t") for line in lines[:-1]] + lines[-1:]


def _is_comment_only(text: str, place: Place) -> bool:
    """Whether a suggestion is nothing but comment, where the user is not writing one."""
    if _COMMENT.match(place.line_before or place.previous_line) or _COMMENT.match(place.line_before):
        return False
    found = Reader(place).read(text)
    start = 0
    for line in text.split("\n"):
        stripped = line.strip()
        first = start + len(lead(line))
        by_grammar = found.is_comment(first, first + len(stripped))
        if stripped and not by_grammar and not (not syntax.knows(place.language_id) and _COMMENT.match(line)):
            return False
        start += len(line) + 1
    return not found.within(0) and not place.line_before.strip()


# Blocks


@dataclass(frozen=True, slots=True)
class _Block:
    """The block that a suggestion of several lines belongs to.

    Attributes:
        place: where the suggestion goes.
        base: width of the indentation of its first line.
        opened: whether that line opens a block of its own; else the block is the one around it.
        headless: whether the lines below are the body of a block that nothing above opens.
        step: width of one step of indentation.
        floor: width of the indentation of the least indented line that the suggestion may have.
    """

    place: Place
    base: int
    opened: bool
    headless: bool
    step: int
    floor: int

    @staticmethod
    def around(place: Place, first: str, rest: str) -> _Block:
        """The block at a place, given the first line of code that came, and the rest of the cursor's line."""
        whole = place.line_before + (rest if place.line_before.strip() else first)
        opened = bool(place.line_before.strip()) and opens_block(whole)
        base = width(whole if whole.strip() else place.line_before)
        below = place.next_line
        headless = (
            not place.line_before.strip()
            and width(below) > base
            and _STATEMENT.match(below) is not None
            and not opens_block(place.previous_line)
        )
        step = indentation.unit(place.around)
        return _Block(place, base, opened, headless, width(step), _floor(place, base))

    def is_over_before(self, lines: list[str], found: Outline, start: int) -> bool:
        """Whether the last line, which begins at `start`, does not belong to the suggestion any more."""
        line, number, place = lines[-1], len(lines) - 1, self.place
        whole = line
        if number == 0:
            whole = (_lead_of_closer(line, place) or place.line_before + lead(line)) + line.lstrip(" \t")
        if self.retraces(lines) or (line.strip() and _stands_below(whole, place, telling=number > 0)):
            return True
        if _is_fence(line, place, found, start):
            return True
        if number and (self.headless or opens_block(line)) and line.strip() == place.next_line.strip():
            # The next line once more, at another indentation.
            return _TELLING.search(line) is not None
        if closes_outside(found, start):
            # The file has that closer already, if one as deep stands below.
            below = place.next_line
            return below.lstrip()[:1] in CLOSERS and width(below) >= width(whole)
        if number == 0:
            return False
        if not line.strip():
            return number > 1 and not lines[-2].strip()
        earlier = lines[max(0, number - _ENOUGH_REPEATS + 1) : number]
        if len(earlier) == _ENOUGH_REPEATS - 1 and all(one.strip() == line.strip() for one in earlier):
            return True
        return self._leaves(lines, found, start)

    def _leaves(self, lines: list[str], found: Outline, start: int) -> bool:
        """Whether the last line is indented as nothing in the block is, or can never be reached."""
        line, place = lines[-1], self.place
        column = width(line)
        if found.within(start) or column > self.base or _DIRECTIVE.match(line):
            return False
        if column < self.base:
            return column < self.floor
        if _BLOCK_CLOSER.fullmatch(line) or _GOES_ON.match(line):
            return False
        earlier = [one for one in lines[:-1] if one.strip()]
        jumped = (
            bool(earlier)
            and width(earlier[-1]) == self.base
            and len(earlier) > 1
            and _JUMP.match(earlier[-1])
        )
        if (self.opened and self.floor == self.base) or (
            jumped and not balance(found.delimiters, found.open)[0]
        ):
            return True
        return bool(_JUMP.match(line)) and _reaches_below(place, self.base)

    def retraces(self, lines: list[str]) -> bool:
        """Whether the model begins with two lines that stand below one after the other."""
        if len(lines) != 2 or not lines[1].strip() or not _TELLING.search(lines[0]):
            return False
        pair = [(self.place.line_before + lines[0]).rstrip(), lines[1].rstrip()]
        below = self.place.nearby
        return any(list(two) == pair for two in pairwise(below))

    def is_over_after(self, line: str, found: Outline, start: int) -> bool:
        """Whether the line, which begins at `start`, is the end of the block."""
        column = width(line)
        if self.headless and opens_block(line) and self.base <= column:
            # Its body stands below, if that is one step deeper.
            return width(self.place.next_line) == column + self.step
        # What the cursor's line opened is closed: a block by its own closer, or by a word such as `done`.
        closed = start > 0 and found.open and not balance(found.delimiters, found.open)[0]
        closes_own = (closed or self.opened) and column == self.base and _BLOCK_CLOSER.fullmatch(line)
        return bool(closes_own) or closes_outside(found, start)


def _floor(place: Place, base: int) -> int:
    """The least indented line that belongs to what the user asked for, where the block begins at `base`.

    The block; or all of the function that it is in, if nothing of that stands below yet.
    """
    if not place.invoked or place.language_id not in indentation.SIGNIFICANT:
        return base
    outer = base + 1
    for line in reversed([*place.above.split("\n"), place.line_before]):
        if line.strip() and width(line) < outer:
            outer = width(line)
            if _FUNCTION.match(line):
                return min(base, outer + 1) if width(place.next_line) <= outer else base
    return base


def _is_fence(line: str, place: Place, found: Outline, start: int) -> bool:
    """Whether a line ends a block of Markdown, which models learnt to write code in."""
    return place.language_id != "markdown" and line.lstrip().startswith("```") and not found.within(start)


def _reaches_below(place: Place, column: int) -> bool:
    """Whether the next line below is a statement of the same block."""
    below = place.next_line
    return width(below) == column and bool(_STATEMENT.match(below)) and not _GOES_ON.match(below)


def _stands_below(line: str, place: Place, *, telling: bool) -> bool:
    """Whether the model goes on with text of the file: with the next line, or a telling one soon after."""
    line = line.rstrip()
    if line == place.next_line:
        return bool(line)
    return telling and _TELLING.search(line) is not None and line in place.nearby


# Fitting it in


def _fitted(text: str, place: Place, *, limited: bool) -> str:
    """A text at the end of a line, or on a line of its own: indented and closed as the file needs it."""
    text = indentation.in_style(text, place.around)
    text = _indented(text, place).rstrip()
    text = _without_last_jump(text, place)
    if limited:
        text = _without_last_comments(text)
    return _settled(text, place, limited=limited)


def _indented(text: str, place: Place) -> str:
    """A text that begins a line, moved to the column where it belongs; "" if it belongs elsewhere."""
    if place.line_before.strip() or text[:1] in {"", "\n"}:
        return text
    blanks = _lead_of_closer(text, place)
    if blanks is not None and blanks.startswith(place.line_before):
        return blanks[len(place.line_before) :] + text.lstrip(" \t")
    if place.language_id not in indentation.SIGNIFICANT or Reader(place).read("").within(0):
        return text
    step = indentation.unit(place.around)
    wanted = indentation.wanted_width(place.line_before, text, place.previous_line, place.next_line, step)
    if wanted is None:
        return text
    if indentation.starts_anew(place.line_before + text):
        return ""
    return indentation.moved(text, place.line_before, wanted, step) or text


def _lead_of_closer(text: str, place: Place) -> str | None:
    """The blanks before the line whose bracket a text begins by closing; None if it does not."""
    if place.line_before.strip() or text.lstrip(" \t")[:1] not in CLOSERS:
        return None
    opened: list[Delimiter] = []
    found = syntax.outline(place.above, place.language_id)
    for one in found.delimiters if found is not None else ():
        if one.closer:
            opened.append(one)
        elif opened:
            opened.pop()
    if not opened or opened[-1].closer != text.lstrip(" \t")[0]:
        return None
    return lead(place.above[place.above.rfind("\n", 0, opened[-1].start) + 1 :])


def _without_last_jump(text: str, place: Place) -> str:
    """The text without a jump at its end that would keep the lines below from ever being reached."""
    head, newline, last = text.rpartition("\n")
    base = width(place.line_before + text) if not place.line_before.strip() else width(place.line_before)
    jumps = bool(newline) and width(last) == base and _JUMP.match(last) and _reaches_below(place, base)
    return head.rstrip() if jumps else text


def _without_last_comments(text: str) -> str:
    """The text without comments at its end, whose code did not come any more."""
    lines = text.split("\n")
    while len(lines) > 1 and (_COMMENT.match(lines[-1]) or not lines[-1].strip()):
        lines.pop()
    return "\n".join(lines)


def _settled(text: str, place: Place, *, limited: bool) -> str:
    """A text whose own brackets are closed, by itself or by what stands below.

    If it is not, it was cut, and is either closed here or ends before what it did not close. What leaves
    the fewest errors of syntax is taken; where that is no help, a text that ran into a limit is closed.
    """
    reader = Reader(place)
    missing = _missing(text, place, reader)
    lines = text.split("\n")
    heads = opens_block(lines[-1]) and width(place.next_line) > width(lines[-1])
    if not missing or heads:
        return text
    shorter = ""
    for number in range(len(lines) - 1, 0, -1):
        shorter = "\n".join(lines[:number]).rstrip()
        if not _missing(shorter, place, reader):
            break
    else:
        shorter = ""
    closed = text + missing
    repeats = "\n" in closed and closed.split("\n")[-1].rstrip() == place.next_line
    if repeats or _missing(closed, place, reader):
        # The closer stands below already; or it would not close, as where the text ends within a string.
        closed = ""
    candidates = [closed, shorter, text] if limited else [text, shorter, closed]
    return fewest_errors([one for one in candidates if one.strip()], place)


def _missing(text: str, place: Place, reader: Reader) -> str:
    """The closers of what a text opened itself, as they would be written behind it."""
    opened: list[Delimiter] = []
    for one in reader.read(text).delimiters:
        if one.closer:
            opened.append(one)
        elif opened:
            opened.pop()
    closers = ""
    for one in reversed(opened):
        begin = text.rfind("\n", 0, one.start) + 1
        line = text[begin:].partition("\n")[0]
        if line.rstrip().endswith(one.text) or one.text.isalpha():
            indent = lead(place.line_before + line) if begin == 0 else lead(line)
            closers += "\n" + indent + one.closer
        else:
            closers += one.closer
    return closers
