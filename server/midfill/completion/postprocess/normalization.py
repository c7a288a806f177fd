r"""Normalizes the model's text, piece by piece, to the conventions of the file that it is for.

Line ends become \n; lines are indented by tabs or spaces as the lines around the cursor are; a single space
before the model's first word is dropped; the text ends at the first character that is not safe to show.
Released text never changes, so that it can be judged, shown and compared with what the user types while it
grows. Linear in the text. Pure.
"""

from __future__ import annotations

import re

from midfill.completion.postprocess import indentation
from midfill.completion.postprocess.brackets import enclosing
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.indentation import indent_of, width
from midfill.completion.postprocess.tabs import Tabs, opens
from midfill.text.characters import safe_length

_LINE_ENDS = re.compile(r"\r+\n?")
# A line's indentation is released once its first word is complete.
_FIRST_WORD = re.compile(r"[ \t]*(?:\w+\W|[^\w\s])")
# Languages in which a line's first character is a column by itself, or lines are aligned with those above.
_IN_COLUMNS = frozenset(
    {
        *("diff", "patch", "git-diff", "cobol", "fortran-fixed", "fortranfixedform", "asm", "tsv", "csv"),
        *(
            "lisp",
            "commonlisp",
            "emacs-lisp",
            "elisp",
            "lisp-interaction",
            "scheme",
            "racket",
            "clojure",
            "fennel",
        ),
        *("haskell", "purescript", "elm", "agda", "idris", "ocaml", "sml", "lean", "lean4"),
    }
)
# A line that begins or follows a line that ends with one of these may be aligned with something.
_ALIGNED = re.compile(r"[.?&|+*/,:)\]}=<>-]")
_GOES_ON = (",", "\\", "(", "[", "{", "+", "-", "*", "/", "=", "and", "or", ".", "|", "&", ":")


def normalized(text: str, cursor: CursorContext) -> str:
    """Return all of a model's text as text of the file."""
    whole = Normalizer(cursor)
    whole.push(text)
    whole.finish()
    return whole.text


class Normalizer:
    """Normalizes a growing text.

    Attributes:
        text: the text released so far.
        is_altered: released text differs from what the model wrote.
        is_cut: an unsafe character has come; nothing is released any more.
    """

    def __init__(self, cursor: CursorContext) -> None:
        self.text = ""
        self.is_altered = False
        self.is_cut = False
        self._cursor = cursor
        self._around = cursor.around
        self._step = max(2, width(indentation.unit(self._around)))
        self._new: list[str] = []
        self._is_first = True
        self._line = cursor.line_before
        self._previous = cursor.previous_line
        # The beginning of a line whose indentation cannot be decided yet.
        self._begin: str | None = None if cursor.line_before.strip() else ""
        self._returns = ""
        self._near: str | None = None
        self._tabs: Tabs | None = None
        self._is_shifted = False

    def push(self, piece: str) -> None:
        """Take more of the model's text."""
        if self.is_cut:
            return
        piece = self._with_newlines(self._returns + piece)
        if not (piece.isascii() and piece.isprintable()):
            size = safe_length(piece, self._nearby(), (self._begin or "") or self.text[-1:])
            self.is_cut = size < len(piece)
            piece = piece[:size]
        first, *lines = piece.split("\n")
        self._append(first)
        for line in lines:
            self._end_line()
            self._append(line)
        if self.is_cut:
            self._returns = ""
            self.finish()
        self._flush()

    def finish(self) -> None:
        """Release the text that waits for more."""
        returns, self._returns = self._returns, ""
        for _ in returns:
            self._end_line()
        if self._begin and self._begin.strip():
            self._release()
        self._flush()

    def _flush(self) -> None:
        self.text += "".join(self._new)
        self._new.clear()

    def _with_newlines(self, piece: str) -> str:
        r"""Return the piece with \n for line ends; carriage returns at its end wait for the next piece."""
        if "\r" not in piece:
            return piece
        self.is_altered = True
        kept = piece.rstrip("\r")
        self._returns = piece[len(kept) :]
        # Of those before a line feed, one is part of it and the others are errors.
        return _LINE_ENDS.sub(lambda end: "\n" * (1 if "\n" in end.group() else len(end.group())), kept)

    def _nearby(self) -> str:
        if self._near is None:
            cursor = self._cursor
            self._near = "\n".join((*self._around, cursor.line_before, cursor.line_after))
        return self._near

    def _append(self, part: str) -> None:
        if self._begin is None:
            self._let_through(part)
            return
        self._begin += part
        if not self._begin.strip():
            return
        if self._begin[0] not in " \t" or not self._needs_word() or _FIRST_WORD.match(self._begin):
            self._release()

    def _end_line(self) -> None:
        if self._begin:
            if self._begin.strip():
                self._release()
            else:
                self._let_through(self._begin)
        if self._line.strip():
            self._previous = self._line
        self._new.append("\n")
        self._line, self._begin = "", ""
        self._is_first = False

    def _let_through(self, part: str) -> None:
        self._new.append(part)
        self._line += part

    def _release(self) -> None:
        """Release the beginning of a line, indented as the file is."""
        begin, self._begin = self._begin or "", None
        blanks = indent_of(begin)
        if blanks:
            rest = begin[len(blanks) :]
            blanks = self._without_stray(blanks, rest)
            written = self._converter().indented(blanks, rest, self._previous, self._line) + rest
            self.is_altered |= written != begin
            begin = written
        self._let_through(begin)

    def _converter(self) -> Tabs:
        if self._tabs is None:
            self._tabs = Tabs(self._cursor)
        return self._tabs

    def _needs_word(self) -> bool:
        return self._converter().needs_word

    def _without_stray(self, blanks: str, rest: str) -> str:
        """Return a line's indentation without a single stray space to a column that no other line has."""
        cursor, column = self._cursor, width(self._line + blanks)
        if column % self._step != 1 or rest.startswith("*") or cursor.language_id in _IN_COLUMNS:
            return blanks
        significant = cursor.language_id in indentation.SIGNIFICANT
        if self._is_first:
            if not significant and opens(cursor.previous_line):
                # A step may be one space.
                return blanks
            lines = (line for line in self._around if line.strip() and not line.lstrip().startswith("*"))
            columns = {width(line) for line in lines}
            previous = cursor.previous_line
            expected = width(previous) + self._step * opens(previous)
            if blanks.endswith(" ") and column not in columns and (blanks == " " or column == expected + 1):
                self._is_shifted = True
                return blanks[:-1]
        elif self._is_shifted or (significant and self._steps_in_by_one(column, rest)):
            return blanks.removesuffix(" ")
        return blanks

    def _steps_in_by_one(self, column: int, rest: str) -> bool:
        """Return whether a line of Python is one space deeper than the line above for no reason."""
        previous = self._previous.rstrip()
        return (
            column == width(previous) + 1
            and not previous.endswith(_GOES_ON)
            and not _ALIGNED.match(rest)
            and enclosing(self._cursor) is None
        )
