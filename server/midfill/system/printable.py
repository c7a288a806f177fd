"""Texts of others where people read them: terminals, logs and editors.

A server's error message, a model's name or a file's name may hold escape sequences that command a terminal,
characters that turn the direction of writing, or line ends that fake a line of a log. They are spelled out
here. Suggestions are another matter: they go into a file as they are, or not at all. Any thread.
"""

from __future__ import annotations

import logging
import re
from types import TracebackType

_MAX_CHARS = 200
_LINE_ENDS = re.compile(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")


def shown(text: str, max_chars: int = _MAX_CHARS) -> str:
    """Return a text as one printable line of at most that many characters."""
    # What is cut off need not be looked at; spelling out takes up to ten characters for one.
    line = one_line(text[: max_chars + 1])
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def one_line(text: str) -> str:
    """Return a text as one printable line, however long."""
    return printable(_LINE_ENDS.sub(" ", text))


def printable(text: str) -> str:
    """Return a text with its lines and tabs, and whatever else is not printable spelled out."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() or mark in "\n\t" else mark.encode("unicode_escape").decode()
        for mark in text.replace("\r\n", "\n")
    )


class LogFormatter(logging.Formatter):
    """Writes a record as one printable line, and a traceback, if there is one, below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """See `logging.Formatter`."""
        return one_line(super().formatMessage(record))

    def formatException(  # noqa: N802 - the library's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """See `logging.Formatter`."""
        return printable(super().formatException(ei))
