"""Tabs or spaces: the indentation of the model's lines, converted to that of the lines around the cursor."""

from __future__ import annotations

import re

from midfill.completion.postprocess import indentation
from midfill.completion.postprocess.brackets import enclosing
from midfill.completion.postprocess.cursor_context import NUM_AROUND, CursorContext
from midfill.completion.postprocess.indentation import indent_of, kind, opens_block
from midfill.text import syntax

# Languages whose formatter always uses tabs.
_ALWAYS_TABS = frozenset({"go", "go.mod"})
# Numbers of spaces that may be one step.
_STEPS = frozenset({2, 3, 4, 8})
# Languages in which a step is often two spaces.
_NARROW = re.compile(
    r"(?:java|type)script|[jt]sx?\b|json|ruby|lua|html|vue|svelte|astro|s?css|less|sass|xml|scala|dart|elixir|r\b|yaml"
)
_RULE = re.compile(r"[^\s#][^=#]*:(?!=|:=)")
_DIRECTIVE = re.compile(r"-?(?:if|else|endif|include|sinclude|define|endef|override|export|unexport|vpath)")
_MAKEFILE = re.compile(r"(?:gnu)?make(?:file)?\b|automake\b")
_OPENING_WORD = re.compile(
    r"\s*(?:if|elif|elseif|elsif|else|for|foreach|while|until|repeat|do|case|when|switch|try|begin|rescue|ensure|catch"
    r"|(?:local\s+)?function|def|class|module|sub|proc)\b"
)
_LAST_OPENING_WORD = re.compile(r"\b(?:then|do|else|begin|try|repeat|of|in|where)(?:\s*\|[^|]*\|)?\s*\Z")
# An element, or a template block, whose end follows on its own line.
_OPENING_TAG = re.compile(
    r"\s*<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr)\b)(?:\w[^<>]*|.*<\w[^<>]*)?"
    r"(?<![/=-])>\s*\Z|\s*>\s*\Z|\s*\{\{?[#:]\w[^{}]*\}\}?\s*\Z"
    r"|\s*\{%-?\s*(?:if|for|block|macro|with|call|filter|else|elif)\b[^%]*%\}\s*\Z"
)
_LAST_WORD_OF_ONE_LINE = re.compile(r"(?:[;}]|\b(?:end|fi|done|esac))\s*\Z")
_OUTWARDS = re.compile(
    r"[)\]}]|</|\{\{?[/:]|\{%-?\s*(?:end|else|elif)|(?:else|elif|elsif|elseif|except|finally|catch|rescue|ensure|end|fi|done|esac|until)\b"
)
# Labels that some write in the column of the line that opens the block.
_LABEL = re.compile(r"(?:case|default)\b|(?:public|private|protected)\s*:")
_JUMP = re.compile(r"\s*(?:return|raise|throw|break|continue|goto)\b")


def opens(line: str) -> bool:
    """Return whether a line ends with a bracket, a colon, a word or a tag that opens a block."""
    if opens_block(line) or _LAST_OPENING_WORD.search(line) is not None:
        return True
    return _OPENING_TAG.match(line) is not None


def may_open(line: str) -> bool:
    """Return whether a line opens a block, or begins with a word that does unless the line ends it."""
    if opens(line):
        return True
    return not _LAST_WORD_OF_ONE_LINE.search(line) and _OPENING_WORD.match(line) is not None


def _kind(cursor: CursorContext) -> str:
    r"""Return the character to indent lines by: "\t", " ", or "" to leave them as they are."""
    inside = enclosing(cursor)
    if inside is not None:
        opener, *lines = (inside.above + cursor.line_before).split("\n")
        lines = [line for line in (*lines[:-1], *inside.rest.split("\n")[1:-1]) if line.strip()]
        return kind(lines or [opener])
    found = kind(cursor.around)
    if not found and "\t" in {line[:1] for line in cursor.around}:
        # Text in strings and comments does not show the indentation of code.
        found = kind(_code_around(cursor))
    if (
        found == "\t"
        and cursor.is_prose
        and indent_of(cursor.line_before or cursor.previous_line)[:1] != "\t"
    ):
        return ""
    if not found and "yaml" in cursor.language_id.lower():
        return " "
    if not found and cursor.language_id in _ALWAYS_TABS:
        # No line is indented yet.
        return "\t"
    return found


def _code_around(cursor: CursorContext) -> tuple[str, ...]:
    """Return those lines around the cursor that do not begin within a string or a comment."""
    rest = (cursor.line_before + cursor.line_after, *cursor.following)
    whole = cursor.above + "\n".join(rest)
    found = syntax.outline(whole, cursor.language_id)
    if found is None:
        return cursor.around
    lines, start = [], 0
    for line in whole.split("\n"):
        lines.append("" if found.within(start) else line)
        start += len(line) + 1
    at = len(lines) - len(rest)
    here = lines[at] if cursor.line_before.strip() else ""
    return (*lines[max(0, at - NUM_AROUND) : at], here, *lines[at + 1 : at + 1 + NUM_AROUND])


class Tabs:
    """Converts the indentation of lines, one after the other.

    A line is judged only by the lines above it, so that released text never has to be changed.
    """

    def __init__(self, cursor: CursorContext) -> None:
        language = cursor.language_id.lower()
        self._kind = _kind(cursor)
        self._unit = (
            "  " if "yaml" in language and not kind(cursor.around) else indentation.unit(cursor.around)
        )
        self._is_makefile = _MAKEFILE.match(language) is not None
        self._is_narrow = _NARROW.match(language) is not None
        self._step = 0

    @property
    def needs_word(self) -> bool:
        """Whether a line's indentation depends on its first word."""
        return self._is_makefile or (self._kind == "\t" and not self._step)

    def indented(self, blanks: str, rest: str, previous: str, before: str) -> str:
        """Return the indentation to write for a line.

        Args:
            blanks: the model's indentation.
            rest: the line after it, at least its first word.
            previous: the previous non-blank line, as it is in the file.
            before: blanks before the cursor on the same line.
        """
        if self._is_makefile:
            return self._recipe(blanks, rest, previous, before)
        if self._kind == " ":
            return blanks.replace("\t", self._unit)
        if self._kind != "\t" or " " in before:
            return blanks
        tabs = blanks[: len(blanks) - len(blanks.lstrip("\t"))]
        if "\t" in blanks[len(tabs) :] or (tabs and not opens(previous)):
            # Spaces after tabs are alignment, unless a block has been opened.
            return blanks
        return tabs + self._by_tabs(blanks[len(tabs) :], rest, previous, len(before + tabs))

    def _recipe(self, blanks: str, rest: str, previous: str, before: str) -> str:
        in_recipe = previous.startswith("\t") or _RULE.match(previous) is not None
        if before or "\t" in blanks or not in_recipe or previous.endswith("\\") or _DIRECTIVE.match(rest):
            return blanks
        return "\t"

    def _by_tabs(self, blanks: str, rest: str, previous: str, num_tabs: int) -> str:
        depth = _depth(rest, previous) - num_tabs
        if len(blanks) < min(_STEPS) or (num_tabs and depth <= 0):
            return blanks
        if not self._step:
            # An asterisk of a comment is one or two spaces to the right of its indentation.
            behind = (1, 0, 2) if rest.startswith("*") else (0,)
            is_certain = opens(previous) and _LABEL.match(rest) is None
            steps = (self._guessed(len(blanks) - more, depth, is_certain) for more in behind)
            self._step = next(filter(None, steps), 0) or _usual_step(len(blanks))
        if not self._step:
            return blanks
        return "\t" * (len(blanks) // self._step) + " " * (len(blanks) % self._step)

    def _guessed(self, size: int, depth: int, is_certain: bool) -> int:
        """Return how many spaces the model writes for a tab if `size` are `depth` tabs; 0 if unknown."""
        step = size // depth if depth > 0 and size % depth == 0 else 0
        if step == 2 and size % 4 == 0 and not self._is_narrow and not is_certain:
            # Prefer one step outwards, which no line announces.
            return 4
        return step if step in _STEPS else 0


def _usual_step(size: int) -> int:
    """Return the most common step that divides a number of spaces; 0 if none does."""
    return next((step for step in (4, 2, 3) if size % step == 0), 0)


def _depth(rest: str, previous: str) -> int:
    """Return how many tabs the line after `previous` probably begins with."""
    depth = len(previous) - len(previous.lstrip("\t"))
    opened = may_open(previous)
    outwards = _OUTWARDS.match(rest) is not None or (not opened and _JUMP.match(previous) is not None)
    return max(0, depth + opened - outwards)
