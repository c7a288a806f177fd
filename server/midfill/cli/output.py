"""Guard standard output: characters outside its encoding, a full disk, a closed pipe."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable

from midfill.cli.terminal import say


class OutputError(OSError):
    """Standard output cannot be written."""


class _Output(io.TextIOWrapper):
    """Standard output that replaces characters its encoding does not have, instead of raising."""

    def write(self, text: str, /) -> int:
        """Write the text. Raises `OutputError`."""
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error

    def flush(self) -> None:
        """Flush the buffer. Raises `OutputError`."""
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def guard(run: Callable[[], int]) -> int:
    """Run a command and return its exit status. An `OSError` is printed as one line, with status 1.

    A closed pipe, as in `midfill model list | head -1`, prints nothing.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        sys.stdout = _Output(
            stdout.buffer,
            stdout.encoding,
            "replace",
            line_buffering=stdout.line_buffering,
            write_through=stdout.write_through,
        )
    own = sys.stdout
    try:
        status = run()
        if own is not None:
            own.flush()
    except OSError as error:
        _explain(error)
        status = 1
    finally:
        if isinstance(own, _Output):
            _detach(own)
        sys.stdout = stdout
    return status


def _explain(error: OSError) -> None:
    if isinstance(error, OutputError):
        if error.errno == errno.EPIPE:
            return
        what = "Cannot write the output"
    else:
        what = f"Cannot use {error.filename}" if error.filename else "The operating system refused"
    with contextlib.suppress(OSError):
        say(f"midfill: {what}: {error.strerror or type(error).__name__}.", err=True)


def _detach(output: _Output) -> None:
    """Leave the descriptor to the interpreter, which would print an error at exit if it cannot flush it."""
    try:
        output.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output.fileno())
        os.close(null)
    output.detach()
