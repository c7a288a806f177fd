"""The command line. Heavy modules are imported by the commands that need them, never before."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill import __version__
from midfill.cli import bench_load as _bench_load  # noqa: F401 - registers `midfill bench load`
from midfill.cli import bench_soak as _bench_soak  # noqa: F401 - registers `midfill bench soak`
from midfill.cli import output
from midfill.cli import train as _train  # noqa: F401 - registers commands of `midfill adapter`
from midfill.cli.adapter import adapter
from midfill.cli.bench import bench
from midfill.cli.engine import engine
from midfill.cli.evaluate import evaluate
from midfill.cli.model import model
from midfill.cli.setup import setup
from midfill.cli.shared import (
    ADAPTER,
    JSON,
    MODEL,
    SCRIPT,
    TEST_ENGINES,
    engine_maker,
    read_engine,
    read_settings,
    with_progress,
)
from midfill.cli.terminal import say, terminal
from midfill.errors import MidfillError, SettingsError
from midfill.system.printable import LogFormatter

if TYPE_CHECKING:
    from midfill.engine.api import Engine
    from midfill.settings import Settings

_LOG_LEVELS = ("debug", "info", "warning", "error")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  midfill demo",
)
@click.version_option(__version__, message="midfill %(version)s")
def cli() -> None:
    """Fill-in-the-middle code completion on your own machine, for editors that speak LSP."""


def main() -> None:
    """Run the command line: what goes wrong is one sentence and a status, never a traceback."""
    sys.exit(output.guard(_run))


def _run() -> int:
    try:
        # Without the standalone mode, click returns the status of `Exit` instead of raising it.
        return cli(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        return 130
    except MidfillError as error:
        say(f"midfill: {error}", err=True)
        return 1


@cli.command()
@click.option(
    "--log-file", type=click.Path(path_type=Path), help="Append the log to this file, not to stderr."
)
@click.option("--log-level", type=click.Choice(_LOG_LEVELS), default="warning", show_default=True)
@click.option(
    "--record", type=click.Path(path_type=Path), help="For `midfill replay`; the file contains source text."
)
@MODEL
@ADAPTER
@SCRIPT
def serve(
    log_file: Path | None,
    log_level: str,
    record: Path | None,
    model: str | None,
    adapter: str | None,
    script: str | None,
) -> None:
    """Run the language server on stdin and stdout. Editors start it.

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
        if script is not None and not script.startswith(TEST_ENGINES):
            # The server wants to know who runs the model, not only to ask it.
            settings, script = read_engine(settings, script), None
        tap = Recorder(record).note if record is not None else None
        status = serve_stdio(settings, engine_maker(script), tap)
    # A forward pass that still runs on the engine's thread must not hold the process.
    os._exit(status)


# "-:3:1" is a place in stdin, not an option.
@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("where", metavar="FILE:LINE:COL")
@click.option("--language", metavar="ID", help="Language identifier, if the file's name does not tell.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), help="Most tokens of the suggestion.")
@click.option("--explain", "explained", is_flag=True, help="Show the prompt, the stages and the filters too.")
@MODEL
@ADAPTER
@JSON
@SCRIPT
def complete(
    where: str,
    language: str | None,
    max_tokens: int | None,
    explained: bool,
    model: str | None,
    adapter: str | None,
    as_json: bool,
    script: str | None,
) -> None:
    """Complete at one place of a file and print the text to insert.

    LINE and COL count from 1; COL is the place before that character. With - for FILE the text comes
    from stdin; a bare - completes at its end.

    \b
    Examples:
      midfill complete src/app.py:42:17
      midfill complete src/app.py:42:17 --explain
      git show HEAD:src/app.py | midfill complete -:42:17 --language python --json
      printf 'def add(a, b):\\n    return' | midfill complete - --language python
    """
    from midfill.text.documents import Snapshot

    document, cursor = _read_place(where, language)
    settings = read_settings(model=model, adapter=adapter, max_new_tokens=max_tokens)
    answer, info = asyncio.run(_complete_once(settings, engine_maker(script), Snapshot(document, cursor)))
    explanation = info.pop("explanation")
    if as_json:
        click.echo(json.dumps(info | ({"explanation": explanation} if explained else {})))
    elif explained:
        from midfill.completion.explanation import describe

        say(describe(explanation))
    elif answer:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Its line ends are those of the file, and no others.
            sys.stdout.reconfigure(newline="")
        click.echo(answer)
    else:
        raise MidfillError(f"No suggestion: {info['message']}")


@cli.command()
@MODEL
@JSON
def demo(model: str | None, as_json: bool) -> None:
    """Show ghost text from the real server and the real model on sample files.

    Fetches the model first if it is not here yet.

    \b
    Examples:
      midfill demo
      midfill demo --model qwen2.5-coder-1.5b --json
    """
    from midfill.cli import demo as play
    from midfill.models import fetch, store

    begun = time.monotonic()
    settings = read_settings(model=model)
    if store.find(settings.model) is None:
        with_progress(f"fetching {settings.model}", lambda report: fetch.pull(settings.model, report))
    console = None if as_json else terminal()
    suggestions = asyncio.run(play.run(console, {"model": settings.model}))
    seconds = time.monotonic() - begun
    if console is None:
        click.echo(json.dumps(play.summary(settings.model, suggestions, seconds)))
    else:
        console.print(
            f"{settings.model}, {seconds:.1f} s in all. Put midfill into your editor:", style="bold"
        )
        for editor, line in play.EDITOR_LINES:
            console.print(f"  {editor:8} ", style="cyan", end="")
            console.print(line, soft_wrap=True)
    if not all(suggestion.text for suggestion in suggestions):
        raise MidfillError("Not every sample got a suggestion: run `midfill doctor`.")


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check versions, device, memory, model and cache, and measure the model's speed for a second."""
    from midfill.cli.doctor import examine

    checks = asyncio.run(examine(engine_maker(None)))
    if as_json:
        click.echo(json.dumps({"checks": [check.as_dict() for check in checks]}))
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for check in checks:
            say(
                f"{click.style(check.status.ljust(8), fg=colours[check.status])}{check.name:10} {check.found}"
            )
            if check.remedy:
                say(f"{'':18} -> {check.remedy}")
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)


@cli.command()
@JSON
def status(as_json: bool) -> None:
    """Show the model in use, and how many of its suggestions were accepted and stayed.

    The counts are kept on this machine, by model and language, without any text. They are written by
    running servers every half minute. `count_feedback = false` switches them off.

    \b
    Examples:
      midfill status
      midfill status --json
    """
    from midfill.completion import calibrations
    from midfill.completion.stats import acceptance as feedback
    from midfill.models import store
    from midfill.settings import config_path

    settings = read_settings()
    counts_path = feedback.counts_path()
    counts = feedback.read(counts_path)
    found = store.find(settings.model)
    judged = calibrations.in_use(settings.model)
    result = {
        "version": __version__,
        "model": settings.model,
        "model_path": str(found.path) if found else None,
        "adapter": settings.adapter,
        "settings": str(config_path()),
        "calibration": judged.calibration.source or None,
        "counts_file": str(counts_path),
        "counts": feedback.as_dict(counts),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    here = result["model_path"] or f"not on this machine: run `midfill model pull {settings.model}`"
    say(f"midfill {__version__}\nmodel     {settings.model} ({here})")
    say(f"settings  {result['settings']}\ngate      {calibrations.describe(judged)}")
    say(f"counts    {counts_path}\n")
    terminal().print(feedback.table(counts))


@cli.command()
@click.argument("recording", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--command", metavar="CMD", help="The server to start, e.g. 'midfill serve --model NAME'.")
@click.option(
    "--speed",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="So many times as fast as it was recorded; 0 waits for answers only.",
)
@JSON
def replay(recording: Path, command: str | None, speed: float, as_json: bool) -> None:
    """Play a session that `midfill serve --record` wrote, and compare the answers.

    Ends with status 1 if an answer differs from the recorded one.

    \b
    Example:
      midfill replay session.jsonl --speed 0
    """
    from midfill.lsp import recording as sessions

    result = asyncio.run(sessions.replay(recording, command, speed))
    say(json.dumps(result) if as_json else sessions.describe(result))
    if result["different"]:
        raise click.exceptions.Exit(1)


for _group in (model, engine, adapter, bench, evaluate, setup):
    cli.add_command(_group)


async def _complete_once(settings: Settings, make: Callable[[Settings], Engine], snapshot: Any) -> Any:
    from midfill.completion.answer import Trigger
    from midfill.completion.completer import Completer
    from midfill.completion.explanation import explain
    from midfill.completion.reasons import REASONS
    from midfill.fim.probing import identify

    engine = make(settings)
    try:
        await engine.start(lambda _message, _share: None)
        completer = Completer(settings.model_copy(update={"prefetch": False}))
        completer.use(engine, await identify(engine, settings.family))
        answer = await completer.complete(snapshot, Trigger.INVOKED)
        info = {
            "text": answer.text,
            "source": answer.source,
            "reason": answer.reason,
            "message": REASONS[answer.reason] if answer.reason else None,
            "latency_ms": round(answer.latency_ms, 1),
            "prompt_tokens": answer.num_prompt,
            "generated_tokens": answer.num_generated,
            "model": engine.model.name,
            "explanation": explain(answer, engine.model.tokenizer),
        }
        return answer.text, info
    finally:
        await engine.close()


def _read_place(where: str, language: str | None) -> Any:
    """FILE:LINE:COL to a document and a place in it."""
    from midfill.text.documents import Document, Encoding, Point
    from midfill.text.languages import language_id

    name, _, position = where.partition(":") if where.startswith("-") else _split_place(where)
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise MidfillError(f"Cannot read {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MidfillError(f"{name} is not text in UTF-8.") from error
    uri = "untitled:stdin" if name == "-" else Path(name).resolve().as_uri()
    document = Document.open(uri, language or language_id(name), 0, text)
    if not position and name == "-":
        last = len(document.lines) - 1
        return document, Point(last, len(document.lines[last]))
    line, _, column = position.partition(":")
    if not (line.isdecimal() and column.isdecimal() and int(line) and int(column)):
        raise MidfillError(
            f"{where!r} is not FILE:LINE:COL, for example src/app.py:42:17 (both count from 1)."
        )
    if int(line) > len(document.lines):
        raise MidfillError(f"{name} has {len(document.lines)} lines, so there is no line {line}.")
    return document, document.point((int(line) - 1, int(column) - 1), Encoding.UTF32)


def _split_place(where: str) -> tuple[str, str, str]:
    """Split at the last two colons: a Windows path has one of its own."""
    parts = where.rsplit(":", 2)
    return (parts[0], ":", ":".join(parts[1:])) if len(parts) == 3 else (where, "", "?")


@contextlib.contextmanager
def _logging(log_file: Path | None, log_level: str) -> Iterator[None]:
    """While this lasts, log to a file or to stderr. Raises `SettingsError` if the file cannot be written."""
    from midfill.system.log_stream import Outlet, as_text

    outlet = None
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            # A named pipe that nobody reads is an error then, and not waited for.
            outlet = Outlet(os.open(log_file, flags | getattr(os, "O_NONBLOCK", 0), 0o600))
        except OSError as error:
            raise SettingsError(f"Cannot write the log file {log_file}: {error.strerror}.") from error
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
