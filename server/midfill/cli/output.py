"""Standard output that cannot take everything: its encoding, a full disk, a reader that has left."""

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
    """Standard output; characters that its encoding does not know are replaced, where they would raise."""

    def write(self, text: str, /) -> int:
        """See `io.TextIOBase`. Raises `OutputError`."""
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error

    def flush(self) -> None:
        """See `io.IOBase`. Raises `OutputError`."""
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def guard(run: Callable[[], int]) -> int:
    """Run a command, which returns its exit status. An `OSError` becomes a sentence and status 1.

    Nothing is said if whoever reads the output has left, as in `midfill model list | head -1`.
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
            _give_back(own)
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


def _give_back(output: _Output) -> None:
    """Leave the descriptor to the interpreter, which would complain at its end of what cannot be written."""
    try:
        output.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())
        os.close(nowhere)
    output.detach()
