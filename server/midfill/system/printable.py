"""Make untrusted texts safe to show in terminals, logs and editors.

A server's error message, a model's name or a file's name may contain escape sequences for a terminal,
bidirectional controls, or line ends that fake a line of the log. Such characters are escaped here. For texts
that are code, `text.characters.escaped` is used instead: it keeps everything that source code may contain,
such as no-break spaces, and escapes invisible characters that are printable by Unicode and could hide code,
such as variation selectors, which messages keep for their emoji. Any thread.
"""

from __future__ import annotations

import logging
import re
from types import TracebackType

_MAX_CHARS = 200
_LINE_ENDS = re.compile(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")


def shown(text: str, max_chars: int = _MAX_CHARS) -> str:
    """Return a text as one printable line of at most `max_chars` characters."""
    # Cut first, since escaping makes up to ten characters of one.
    line = one_line(text[: max_chars + 1])
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def one_line(text: str) -> str:
    """Return a text as one printable line of any length."""
    return printable(_LINE_ENDS.sub(" ", text))


def printable(text: str) -> str:
    """Return a text with line feeds and tabs kept, and all other unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() or mark in "\n\t" else mark.encode("unicode_escape").decode()
        for mark in text.replace("\r\n", "\n")
    )


class LogFormatter(logging.Formatter):
    """Formats a record as one printable line, followed by its traceback, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message as one printable line."""
        return one_line(super().formatMessage(record))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Return the traceback as printable lines."""
        return printable(super().formatException(ei))
