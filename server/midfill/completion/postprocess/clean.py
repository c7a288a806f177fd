"""Cleans a suggestion: the part of the model's text that is worth inserting, as the file needs it. Pure.

The model's text is as `normalized` gives it, and `CursorContext` says where it goes. `clean` makes the final
text or returns the reason why there is none; `stop` finds the end of a text, `midline` what fits in the
middle of a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from midfill.completion.postprocess import indentation, repetition
from midfill.completion.postprocess.brackets import OutlineReader, indent_of_closer, opens_block_above
from midfill.completion.postprocess.comments import follows_comment, num_comments
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import indent_of, opens_block, width
from midfill.completion.postprocess.midline import bridged, fewest_errors, repeats, without_overlap
from midfill.completion.postprocess.repeats import without_next_line
from midfill.completion.postprocess.stop import DANGLING, JUMP, Stopper, reaches_below, stop
from midfill.completion.reasons import Reason
from midfill.text.syntax import Delimiter

_QUOTED = re.compile(r"""\\.|"[^"]*"|'[^']*'|`[^`]*`""")
_QUOTE = re.compile(r"[\"'`]")


def clean(
    text: str, cursor: CursorContext, *, complete: bool, forbidden: Iterable[str] = ()
) -> tuple[str, Reason | None]:
    """Return the text to insert; or "" and the reason why nothing is left of it.

    Args:
        text: the model's text.
        cursor: where it goes.
        complete: the model or `stop` ended the text; if not, it reached the token limit, and an incomplete
            last line is dropped if there are lines before it.
        forbidden: strings (sentinels) at which the text is cut, in whatever tokens the model spelled them.
    """
    if not text.strip():
        # None: the model itself ended here.
        return "", Reason.MODEL_SILENT if stop(text, cursor) is None else Reason.BLANK_LINES
    cut = None if complete else _cut_at_limit(text, cursor)
    if cut is not None and not text[:cut].strip():
        return "", Reason.REPEATS_ITSELF
    whole, why = _whole_lines(text[:cut], complete=complete, forbidden=forbidden)
    if why is not None:
        return "", why
    text, why = _worth_inserting(whole, cursor, complete=complete, ran_away=cut is not None)
    if not (cursor.tail and cursor.invoked):
        text = text.rstrip()
    text = "\n".join(_without_blanks(text.split("\n")))
    if not text.strip():
        return "", why
    if not cursor.invoked and _is_comment_only(text, cursor):
        return "", Reason.COMMENT_ONLY
    return text, None


def _cut_at_limit(text: str, cursor: CursorContext) -> int | None:
    """Return the offset at which to cut a one-line text that repeated itself up to the token limit."""
    if "\n" in text.strip("\n"):
        # Its last line is dropped in any case.
        return None
    start = text.rfind("\n") + 1
    cut = repetition.cut_at_limit(text[start:], cursor.around)
    return None if cut is None else start + cut


def before_unsafe(text: str, cursor: CursorContext) -> str:
    """Return a text that was cut at an unsafe character, without its incomplete last line if better."""
    if "\n" not in text.strip("\n"):
        return text
    return fewest_errors([text, text[: text.rindex("\n")]], cursor)


def _whole_lines(text: str, *, complete: bool, forbidden: Iterable[str]) -> tuple[str, Reason | None]:
    """Return the model's whole lines before any sentinel; if they are blank, also the reason."""
    for string in forbidden:
        text = text.partition(string)[0]
    if not text.strip():
        return "", Reason.SPECIAL_TOKEN
    if not complete and "\n" in text.strip("\n"):
        text = text[: text.rindex("\n")]
    return text, None if text.strip() else Reason.TOKEN_LIMIT


def _worth_inserting(
    text: str, cursor: CursorContext, *, complete: bool, ran_away: bool
) -> tuple[str, Reason]:
    """Return the part of a text that is the suggestion, and the reason in case it is blank."""
    stopper = Stopper(cursor)
    end = stopper.end(text + "\n")
    ran_away = ran_away or stopper.why is Reason.REPEATS_ITSELF
    if not text[:end].strip():
        return "", _why_at_once(text, end, cursor, stopper.why)
    if cursor.tail and cursor.invoked:
        bridge, why = _indented(bridged(text, end, cursor, complete=complete), cursor)
        if not bridge.strip() and not text.partition("\n")[0].strip() and not repeats(text[:end], cursor):
            return bridge, Reason.OTHER_LINE
        return bridge, why or Reason.REPEATS_TEXT
    if cursor.tail:
        return without_overlap(text[:end], cursor), Reason.REPEATS_TEXT
    limited = (end is None and not complete) or text[:end].count("\n") + 1 >= cursor.max_lines or ran_away
    text = text[:end].removeprefix(cursor.line_after)
    if ran_away and not (text := _without_useless_line(text, cursor)).strip():
        return "", Reason.REPEATS_ITSELF
    text, why = _fitted_in(text, cursor, limited=limited)
    return text, Reason.REPEATS_ITSELF if ran_away else why


def _without_useless_line(text: str, cursor: CursorContext) -> str:
    """Return the text without its last line, if that line is useless without the part that was cut."""
    shorter, _, last = text.rpartition("\n")
    if not cursor.is_code:
        return text
    is_open = _QUOTE.search(_QUOTED.sub("", last)) is not None
    # A ruler may end with characters that are operators elsewhere.
    is_ruler = last.endswith(3 * last[-1:])
    return shorter if is_open or (DANGLING.search(last) and not is_ruler) else text


def _without_blanks(lines: list[str]) -> list[str]:
    """Return the lines without blanks at their ends; those of the last line belong to what follows."""
    return [line.rstrip(" \t") for line in lines[:-1]] + lines[-1:]


def _why_at_once(text: str, end: int | None, cursor: CursorContext, why: Reason) -> Reason:
    """Return the rule by which a text ends before its first word."""
    if cursor.tail and not cursor.invoked:
        return Reason.BLANK_LINES if text[end:].startswith("\n") else Reason.REPEATS_TEXT
    return why


def _is_comment_only(text: str, cursor: CursorContext) -> bool:
    """Return whether a suggestion is nothing but comment although the user is not writing one."""
    if cursor.line_before.strip() or num_comments(text, cursor) != text.count("\n") + 1:
        return False
    return not follows_comment(cursor)


# Fitting the text into the file


def _fitted_in(text: str, cursor: CursorContext, *, limited: bool) -> tuple[str, Reason]:
    """Return a text at the end of a line, or on its own line, indented and closed as the file needs it.

    Also the reason in case it is blank.
    """
    moved, why = _indented(text, cursor)
    if moved.strip() and moved != text:
        # In its new column it may be what is below already.
        stopper = Stopper(cursor)
        moved = moved[: stopper.end(moved + "\n")]
        why = why if moved.strip() else stopper.why
    text = moved.rstrip()
    if not text.strip() or cursor.is_prose:
        return text, why or Reason.BLANK_LINES
    if not (text := _without_last_jump(text, cursor)).strip():
        return "", Reason.UNREACHABLE
    if limited and not (text := _without_last_comments(text, cursor)).strip():
        return "", Reason.COMMENT_ONLY
    return _balanced(text, cursor, limited=limited), Reason.BLANK_LINES


def _indented(text: str, cursor: CursorContext) -> tuple[str, Reason | None]:
    """Return a text that begins a line, moved to the column where it belongs.

    "" if it belongs elsewhere, or is there already; then also the reason.
    """
    if cursor.line_before.strip() or text[:1] in {"", "\n"} or cursor.is_prose:
        return text, None
    if OutlineReader(cursor).read("").within(0):
        return text, None
    blanks = indent_of_closer(text, cursor)
    if blanks is not None and blanks.startswith(cursor.line_before):
        return blanks[len(cursor.line_before) :] + text.lstrip(" \t"), None
    if cursor.language_id not in indentation.SIGNIFICANT:
        return text, None
    step = indentation.unit(cursor.around)
    previous = cursor.previous_line
    if opens_block(previous) and not opens_block_above(cursor):
        # The line ends with a comment.
        previous = previous.rstrip("".join(indentation.OPENING))
    wanted = indentation.wanted_width(cursor.line_before, text, previous, cursor.next_line, step)
    if wanted is None:
        return text, None
    if indentation.starts_anew(cursor.line_before + text):
        return "", Reason.TOP_LEVEL
    moved = indentation.moved(text, cursor.line_before, wanted, step)
    return (text if moved is None else without_next_line(moved, cursor)), Reason.REPEATS_TEXT


def _without_last_jump(text: str, cursor: CursorContext) -> str:
    """Return the text without a jump at its end that would make the lines below unreachable."""
    head, newline, last = text.rpartition("\n")
    base = width(cursor.line_before + text) if not cursor.line_before.strip() else width(cursor.line_before)
    jumps = bool(newline) and width(last) == base and JUMP.match(last) and reaches_below(cursor, base)
    if not jumps or not cursor.has_jumps or OutlineReader(cursor).read(text).within(len(head) + 1):
        return text
    return head.rstrip()


def _without_last_comments(text: str, cursor: CursorContext) -> str:
    """Return the text without comments at its end, whose code the model did not write any more.

    Comments stay if the user is writing one, or asked and got nothing else.
    """
    lines = text.split("\n")
    number = num_comments(text, cursor)
    if not number or follows_comment(cursor) or (cursor.invoked and number == len(lines)):
        return text
    return "\n".join(lines[: len(lines) - number])


def _balanced(text: str, cursor: CursorContext, *, limited: bool) -> str:
    """Return a text whose own brackets are closed, by itself or by the text below.

    A text that leaves brackets open was cut: it is either closed here, or ends before the part with the open
    bracket. The candidate with the fewest syntax errors wins; of equal ones, a closed text if a limit cut it.
    """
    reader = OutlineReader(cursor)
    missing = _missing(text, cursor, reader)
    lines = text.split("\n")
    heads = opens_block(lines[-1]) and width(cursor.next_line) > width(lines[-1])
    if not missing or heads:
        return text
    shorter = ""
    for number in range(len(lines) - 1, 0, -1):
        shorter = "\n".join(lines[:number]).rstrip()
        if not _missing(shorter, cursor, reader):
            break
    else:
        shorter = ""
    closed = text + missing
    repeats = "\n" in closed and closed.split("\n")[-1].rstrip() == cursor.next_line
    if repeats or _missing(closed, cursor, reader):
        # The closer is below already, or does not close, as in a text that ends within a string.
        closed = ""
    candidates = [closed, shorter, text] if limited else [text, shorter, closed]
    return fewest_errors([one for one in candidates if one.strip()], cursor)


def _missing(text: str, cursor: CursorContext, reader: OutlineReader) -> str:
    """Return the closers of the brackets that a text leaves open, as they would be written after it."""
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
            indent = indent_of(cursor.line_before + line) if begin == 0 else indent_of(line)
            closers += "\n" + indent + one.closer
        else:
            closers += one.closer
    return closers
