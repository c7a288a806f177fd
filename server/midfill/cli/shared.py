"""What the commands share: options, settings, the engine, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from midfill.engine import Engine, Progress
    from midfill.settings import Settings

T = TypeVar("T")

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
MODEL = click.option("--model", metavar="NAME", help="Use this model instead of the one in your settings.")
ADAPTER = click.option(
    "--adapter", metavar="DIR", help="Use this LoRA adapter (a folder in PEFT format, safetensors only)."
)
SCRIPT = click.option("--engine", "script", hidden=True, help="For tests: scripted:FILE.")


def read_settings(**overrides: Any) -> Settings:
    """The user's settings, with those of the command line laid over them."""
    from midfill import settings

    given = {key: value for key, value in overrides.items() if value is not None}
    return settings.parse(given, base=settings.load(), where="command line")


def engine_maker(script: str | None, *, drafts: bool = True) -> Callable[[Settings], Engine]:
    """What makes the engine that the settings ask for, or the test's one that `--engine` names.

    Without `drafts` it guesses nothing; see `EngineSpec`.
    """

    def make(settings: Settings) -> Engine:
        if script is not None and script.startswith("busy:"):
            from midfill.bench import BusyEngine

            return BusyEngine(Path(script.removeprefix("busy:")), engine_maker(None)(settings))
        if script is not None:
            from midfill.engine.scripted import Script, ScriptedEngine

            return ScriptedEngine(Script.read(Path(script.removeprefix("scripted:"))))
        from midfill.engine import EngineSpec, create
        from midfill.models import store

        found = store.find(settings.model)
        if found is None:
            from midfill.errors import ModelError

            raise ModelError(
                f"The model {settings.model!r} is not on this machine. "
                f"Run: midfill model pull {settings.model}"
            )
        return create(
            EngineSpec(
                model=found,
                device=settings.device,
                dtype=settings.dtype,
                adapter=Path(settings.adapter) if settings.adapter else None,
                num_threads=settings.num_threads,
                runner=settings.runner,
                drafts=drafts,
            )
        )

    return make


def show(result: dict[str, Any], table: Callable[[dict[str, Any]], Any], *, as_json: bool) -> None:
    """Print a result as one JSON object, or as what `table` makes of it."""
    shown = json.dumps(result) if as_json else table(result)
    if isinstance(shown, str):
        click.echo(shown)
        return
    from rich.console import Console

    Console(highlight=False).print(shown)


def with_progress(title: str, work: Callable[[Progress], T]) -> T:
    """Run `work` with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

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
