"""The command line. Heavy modules are imported by the commands that need them, never before."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from midfill import __version__
from midfill.errors import MidfillError, SettingsError

if TYPE_CHECKING:
    from midfill.engine import Engine, Progress
    from midfill.settings import Settings

T = TypeVar("T")

_LOG_LEVELS = ("debug", "info", "warning", "error")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
_MODEL = click.option("--model", metavar="NAME", help="Use this model instead of the one in your settings.")
_ADAPTER = click.option(
    "--adapter", metavar="DIR", help="Use this LoRA adapter (a folder in PEFT format, safetensors only)."
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  midfill demo",
)
@click.version_option(__version__, message="midfill %(version)s")
def cli() -> None:
    """Fill-in-the-middle code completion on your own machine, for any LSP editor."""


def main() -> None:
    """Run the command line: errors of ours are one sentence and status 1, never a traceback."""
    try:
        # Without the standalone mode, click returns the status of `Exit` instead of raising it.
        sys.exit(cli(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except MidfillError as error:
        click.echo(f"midfill: {error}", err=True)
        sys.exit(1)


@cli.command()
@click.option(
    "--log-file", type=click.Path(path_type=Path), help="Append the log to this file, not to stderr."
)
@click.option("--log-level", type=click.Choice(_LOG_LEVELS), default="warning", show_default=True)
@click.option(
    "--record", type=click.Path(path_type=Path), help="For `midfill replay`; the file contains source text."
)
@_MODEL
@_ADAPTER
@click.option("--engine", "script", hidden=True, help="For tests: scripted:FILE.")
def serve(  # noqa: PLR0913 - one parameter for each option
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
    from midfill.server import serve as serve_stdio

    _set_up_logging(log_file, log_level)
    settings = _settings(model=model, adapter=adapter)
    from midfill.recording import Recorder

    tap = Recorder(record).note if record is not None else None
    status = serve_stdio(settings, _engine_maker(script), tap)
    logging.shutdown()
    # A forward pass that still runs on the engine's thread must not hold the process.
    os._exit(status)


# "-:3:1" is a place in stdin, not an option.
@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("where", metavar="FILE:LINE:COL")
@click.option("--language", metavar="ID", help="Language identifier, if the file's name does not tell.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), help="Most tokens of the suggestion.")
@_MODEL
@_ADAPTER
@_JSON
@click.option("--engine", "script", hidden=True, help="For tests: scripted:FILE.")
def complete(  # noqa: PLR0913 - one parameter for each option
    where: str,
    language: str | None,
    max_tokens: int | None,
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
      git show HEAD:src/app.py | midfill complete -:42:17 --language python --json
      printf 'def add(a, b):\\n    return' | midfill complete - --language python
    """
    from midfill.documents import Snapshot

    document, cursor = _read_place(where, language)
    settings = _settings(model=model, adapter=adapter, max_new_tokens=max_tokens)
    answer, info = asyncio.run(_complete_once(settings, _engine_maker(script), Snapshot(document, cursor)))
    if as_json:
        click.echo(json.dumps(info))
    elif answer:
        click.echo(answer)
    else:
        raise MidfillError(f"No suggestion: {info['message']}")


@cli.command()
@_MODEL
@_JSON
def demo(model: str | None, as_json: bool) -> None:
    """Show ghost text from the real server and the real model on sample files.

    Fetches the model first if it is not here yet.

    \b
    Examples:
      midfill demo
      midfill demo --model qwen2.5-coder-1.5b --json
    """
    from rich.console import Console

    from midfill import demo as play
    from midfill.models import fetch, store

    begun = time.monotonic()
    settings = _settings(model=model)
    if store.find(settings.model) is None:
        _with_progress(f"fetching {settings.model}", lambda report: fetch.pull(settings.model, report))
    console = None if as_json else Console(highlight=False)
    suggestions = asyncio.run(play.run(console, {"model": settings.model}))
    seconds = time.monotonic() - begun
    if console is None:
        click.echo(json.dumps(play.summary(settings.model, suggestions, seconds)))
    else:
        console.print(f"[bold]{settings.model}, {seconds:.1f} s in all. Put midfill into your editor:[/bold]")
        for editor, line in play.EDITOR_LINES:
            console.print(f"  [cyan]{editor:8}[/cyan] ", end="")
            console.print(line, markup=False, soft_wrap=True)
    if not all(suggestion.text for suggestion in suggestions):
        raise MidfillError("Not every sample got a suggestion: run `midfill doctor`.")


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
@_JSON
def replay(recording: Path, command: str | None, speed: float, as_json: bool) -> None:
    """Play a session that `midfill serve --record` wrote, and compare the answers.

    Ends with status 1 if an answer differs from the recorded one.

    \b
    Example:
      midfill replay session.jsonl --speed 0
    """
    from midfill import recording as sessions

    result = asyncio.run(sessions.replay(recording, command, speed))
    click.echo(json.dumps(result) if as_json else sessions.describe(result))
    if result["different"]:
        raise click.exceptions.Exit(1)


@cli.group()
def bench() -> None:
    """Measure midfill's own speed."""


@bench.command("lsp")
@click.option("--keys", type=click.IntRange(10), default=500, show_default=True, help="Keys to type.")
@click.option("--busy", is_flag=True, help="While a real model decodes in the same process.")
@_MODEL
@_JSON
def bench_lsp(keys: int, busy: bool, model: str | None, as_json: bool) -> None:
    """Type into the real server and measure what all but the model takes.

    A script takes the model's place; each key is timed from its change and request to the answer.

    """
    from midfill.bench import bench_lsp as measure

    result = asyncio.run(measure(keys, busy_model=_settings(model=model).model if busy else None))
    rows = (f"{key:12} {value}" for key, value in result.items())
    click.echo(json.dumps(result) if as_json else "\n".join(rows))


@cli.group()
def model() -> None:
    """List, fetch, check and choose models."""


@model.command("list")
@_JSON
def model_list(as_json: bool) -> None:
    """List the models that midfill knows by name, and those that are on this machine."""
    from midfill.models import catalogue, store

    here = {installed.name: installed for installed in store.installed()}
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "family": entry.family,
            "license": entry.license,
            "parameters": entry.parameters,
            "context": entry.context,
            "memory_mb": entry.memory_mb,
            "hub": entry.hub,
            "installed": entry.name in here,
        }
        for entry in catalogue.entries().values()
    ]
    rows += [
        {"name": name, "family": found.family, "installed": True}
        for name, found in here.items()
        if name not in catalogue.entries()
    ]
    used = _settings().model
    if as_json:
        click.echo(json.dumps({"models": rows, "used": used}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "name", "parameters", "memory", "licence", "here"):
        table.add_column(title, justify="right" if title in ("parameters", "memory") else "left")
    for row in rows:
        parameters = f"{row['parameters'] / 1e9:.1f} B" if "parameters" in row else ""
        memory = f"{row['memory_mb'] / 1000:.1f} GB" if "memory_mb" in row else ""
        chosen = "*" if row["name"] == used else ""
        here_mark = "yes" if row["installed"] else ""
        table.add_row(chosen, row["name"], parameters, memory, row.get("license", ""), here_mark)
    Console(highlight=False).print(table)
    click.echo(
        "\n* the one in use. Fetch one with `midfill model pull NAME`, choose it with `midfill model use NAME`."
    )


@model.command("pull")
@click.argument("name")
def model_pull(name: str) -> None:
    """Fetch a model: a catalogue name, a Hugging Face id, or a GGUF file to convert.

    It can be stopped and started again; what is here already is not fetched twice.

    \b
    Examples:
      midfill model pull qwen2.5-coder-1.5b
      midfill model pull bigcode/tiny_starcoder_py
    """
    from midfill.models import fetch

    found = _with_progress(f"fetching {name}", lambda report: fetch.pull(name, report))
    click.echo(f"{found.name} is ready: {found.path}")


@model.command("check")
@click.argument("name")
@_ADAPTER
@_JSON
def model_check(name: str, adapter: str | None, as_json: bool) -> None:
    """Load a model, show what midfill makes of it, and let it fill three known holes.

    \b
    Examples:
      midfill model check qwen2.5-coder-0.5b
      midfill model check ./my-model --json
    """
    from midfill.doctor import check_model

    settings = _settings(model=name, adapter=adapter)
    result = asyncio.run(check_model(settings, _engine_maker(None)))
    if as_json:
        click.echo(json.dumps(result))
    else:
        for key, value in result.items():
            if key != "holes":
                click.echo(f"{key:12} {value}")
        for hole in result["holes"]:
            mark = click.style("pass", fg="green") if hole["passed"] else click.style("fail", fg="red")
            click.echo(f"{mark}  {hole['hole']}  ->  {hole['text']!r}")
    if not result["passed"]:
        raise MidfillError(f"{name} does not fill the holes: is it a base model with FIM training?")


@model.command("use")
@click.argument("name")
def model_use(name: str) -> None:
    """Choose the model for all editors; written to your settings file."""
    from midfill import settings
    from midfill.models import catalogue, store

    if store.find(name) is None:
        hint = f"Fetch it first: midfill model pull {name}"
        if catalogue.lookup(name) is None and "/" not in name:
            hint = "`midfill model list` shows the names that midfill knows."
        raise MidfillError(f"{name!r} is not on this machine. {hint}")
    path_given = None if catalogue.lookup(name) else store.as_path(name)
    value = str(path_given or name)
    path = settings.store("model", value)
    click.echo(f"midfill uses {value} from the next start on ({path}).")


@model.command("path")
@click.argument("name", required=False)
def model_path(name: str | None) -> None:
    """Print where a model is on disk; without NAME, the folder of all models."""
    from midfill.models import store

    if name is None:
        click.echo(store.models_dir())
        return
    found = store.find(name)
    if found is None:
        raise MidfillError(f"{name!r} is not on this machine. Fetch it: midfill model pull {name}")
    click.echo(found.path)


@cli.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Check versions, device, memory, model and cache, and measure the model's speed for a second."""
    from midfill.doctor import examine

    checks = asyncio.run(examine(_engine_maker(None)))
    if as_json:
        click.echo(json.dumps({"checks": [check.as_dict() for check in checks]}))
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for check in checks:
            click.echo(
                f"{click.style(check.status.ljust(8), fg=colours[check.status])}{check.name:10} {check.found}"
            )
            if check.remedy:
                click.echo(f"{'':18} -> {check.remedy}")
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)


@cli.group("eval")
def eval_() -> None:
    """Measure how good the suggestions are."""


@eval_.command("infilling")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--raw", is_flag=True, help="The model alone: no anchoring, healing, stopping or clean-up.")
@click.option("--limit", type=click.IntRange(1), help="At most this many tasks, evenly from each kind.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), help="Most tokens of a suggestion.")
@click.option("--results", type=click.Path(path_type=Path), help="Keep results here, and go on from them.")
@click.option("--compare", type=click.Path(path_type=Path), help="Results of another run, compared pair by pair.")
@_MODEL
@_ADAPTER
@_JSON
def eval_infilling(  # noqa: PLR0913, PLR0917 - one parameter for each option
    file: Path,
    raw: bool,
    limit: int | None,
    max_tokens: int | None,
    results: Path | None,
    compare: Path | None,
    model: str | None,
    adapter: str | None,
    as_json: bool,
) -> None:
    """Fill the holes of FILE's tasks, run their tests, and print what share passes.

    FILE has a JSON object a line (.jsonl or .jsonl.gz), in the format of HumanEval-Infilling. The programs
    are run: use tasks that you trust.

    \b
    Examples:
      midfill eval infilling tasks.jsonl.gz --limit 40
      midfill eval infilling tasks.jsonl --results new.jsonl --compare old.jsonl --json
    """
    from midfill import evaluation

    tasks = evaluation.read_tasks(file)
    tasks = evaluation.sample(tasks, limit) if limit else tasks
    settings = _settings(model=model, adapter=adapter, max_new_tokens=max_tokens)
    done = {result.id: result for result in evaluation.read_results(results)} if results else {}
    found = _with_progress(
        "loading the model",
        lambda report: asyncio.run(_evaluate(settings, tasks, done, results, report, raw=raw)),
    )
    summary = evaluation.summarise(found)
    if compare is not None:
        earlier = {result.id: result for result in evaluation.read_results(compare)}
        summary["compared"] = evaluation.compare(found, earlier)
    if as_json:
        click.echo(json.dumps(summary))
        return
    for kind, share in summary["pass@1"].items():
        click.echo(f"{kind:24} pass@1 {share:6.1%}   exact {summary['exact'][kind]:6.1%}")
    click.echo(f"{summary['tasks']} tasks, p50 {summary['latency_ms']['p50']:.0f} ms")
    if compare is not None:
        compared = summary["compared"]
        click.echo("compared: {better} better, {worse} worse of {tasks}, p = {p}".format(**compared))


async def _evaluate(  # noqa: PLR0913 - what a run is made of
    settings: Settings, tasks: Any, done: Any, results: Path | None, report: Progress, *, raw: bool
) -> Any:
    from midfill import evaluation

    engine = _engine_maker(None)(settings)
    try:
        await engine.start(report)
        filler = evaluation.Filler(engine, settings, raw=raw)
        count = len(done)

        def keep(result: Any) -> None:
            nonlocal count
            count += 1
            report("filling holes", min(1.0, count / len(tasks)))
            if results is not None:
                evaluation.append_result(results, result)

        return await evaluation.evaluate(tasks, filler, done, keep)
    finally:
        await engine.close()


def _settings(**overrides: Any) -> Settings:
    """The user's settings, with those of the command line laid over them."""
    from midfill import settings

    given = {key: value for key, value in overrides.items() if value is not None}
    return settings.parse(given, base=settings.load(), where="command line")


def _engine_maker(script: str | None) -> Callable[[Settings], Engine]:
    def make(settings: Settings) -> Engine:
        if script is not None and script.startswith("busy:"):
            from midfill.bench import BusyEngine

            return BusyEngine(Path(script.removeprefix("busy:")), _engine_maker(None)(settings))
        if script is not None:
            from midfill.engine.scripted import Script, ScriptedEngine

            return ScriptedEngine(Script.read(Path(script.removeprefix("scripted:"))))
        from midfill.engine import EngineSpec, create
        from midfill.models import store

        found = store.find(settings.model)
        if found is None:
            from midfill.errors import ModelError

            raise ModelError(
                f"The model {settings.model!r} is not on this machine. Run: midfill model pull {settings.model}"
            )
        return create(
            EngineSpec(
                model=found,
                device=settings.device,
                dtype=settings.dtype,
                adapter=Path(settings.adapter) if settings.adapter else None,
                num_threads=settings.num_threads,
            )
        )

    return make


async def _complete_once(settings: Settings, make: Callable[[Settings], Engine], snapshot: Any) -> Any:
    from midfill.completer import REASONS, Completer, Trigger

    engine = make(settings)
    try:
        await engine.start(lambda _message, _share: None)
        completer = Completer(settings)
        completer.use(engine)
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
        }
        return answer.text, info
    finally:
        await engine.close()


def _read_place(where: str, language: str | None) -> Any:
    """FILE:LINE:COL to a document and a place in it."""
    from midfill.documents import Document, Encoding, Point
    from midfill.languages import language_id

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


def _set_up_logging(log_file: Path | None, log_level: str) -> None:
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"Cannot write the log file {log_file}: {error.strerror}.") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("midfill")
    logger.addHandler(handler)
    logger.setLevel(log_level.upper())


def _with_progress(title: str, work: Callable[[Progress], T]) -> T:
    """Run `work` with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress as Bar, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)

        def report(message: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bar.update(task, description=message or title, total=total, completed=share or 0.0)

        return work(report)
