"""`midfill serve`: the language server that editors start."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from midfill.cli.engine_choice import TEST_ENGINES, engine_factory, read_settings, with_engine
from midfill.cli.options import ADAPTER, ENGINE, MODEL
from midfill.errors import SettingsError
from midfill.system.file_errors import why_unwritable
from midfill.system.printable import LogFormatter

_LOG_LEVELS = ("debug", "info", "warning", "error")


@click.command()
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    help="Append the log to this file instead of writing it to stderr.",
)
@click.option(
    "--log-level",
    type=click.Choice(_LOG_LEVELS),
    default="warning",
    show_default=True,
    help="Least severe level that is logged.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Record the session to this file, for `midfill replay`. It contains source text.",
)
@MODEL
@ADAPTER
@ENGINE
def serve(
    log_file: Path | None,
    log_level: str,
    record: Path | None,
    model: str | None,
    adapter: str | None,
    engine_override: str | None,
) -> None:
    """Run the language server on stdin and stdout. Editors start it; see `midfill setup`.

    \b
    Examples:
      midfill serve
      midfill serve --log-file /tmp/midfill.log --log-level info
      midfill serve --record session.jsonl
    """
    # lsprotocol makes hundreds of classes; collecting garbage meanwhile takes a fifth of the start.
    gc.disable()
    from midfill.lsp.recording import Recorder
    from midfill.lsp.server import serve as serve_stdio
    from midfill.system.log_stream import unblocked

    gc.freeze()
    gc.enable()
    with unblocked(), _logging(log_file, log_level):
        settings = read_settings(model=model, adapter=adapter)
        if engine_override is not None and not engine_override.startswith(TEST_ENGINES):
            # The server reports where the model runs, so the settings have to say it.
            settings, engine_override = with_engine(settings, engine_override), None
        tap = Recorder(record).note if record is not None else None
        status = serve_stdio(settings, engine_factory(engine_override, survive=True), tap)
    # A forward pass that still runs on the engine's thread must not keep the process alive.
    os._exit(status)


@contextlib.contextmanager
def _logging(log_file: Path | None, log_level: str) -> Iterator[None]:
    """Log to a file or to stderr inside the `with`. Raises `SettingsError` if the file cannot be written."""
    from midfill.system.log_stream import Outlet, as_text

    outlet = None
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            # With O_NONBLOCK a named pipe without a reader is an error instead of a wait.
            outlet = Outlet(os.open(log_file, flags | getattr(os, "O_NONBLOCK", 0), 0o600))
        except OSError as error:
            raise SettingsError(f"Cannot write the log file {log_file}: {why_unwritable(error)}.") from error
    handler = logging.StreamHandler(sys.stderr if outlet is None else as_text(outlet))
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("midfill")
    logger.addHandler(handler)
    logger.setLevel(log_level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if outlet is not None:
            outlet.end()
