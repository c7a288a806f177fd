"""What the commands share: options, settings, the engine, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from midfill.cli.terminal import say, terminal
from midfill.system.printable import shown

if TYPE_CHECKING:
    from midfill.engine.api import Engine, LocalModel, Progress
    from midfill.engine.remote.client.remote import RemoteEngine
    from midfill.settings import Settings

T = TypeVar("T")

# What makes one shared engine differ from another.
_SHARED = (
    *("model", "family", "adapter", "device", "dtype", "runner", "num_threads"),
    *("engine_unload_min", "engine_exit_min"),
)

TEST_ENGINES = ("busy:", "scripted:")
"""What `--engine` may begin with beside the values of the setting `engine`."""

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
MODEL = click.option("--model", metavar="NAME", help="Use this model instead of the one in your settings.")
ADAPTER = click.option(
    "--adapter",
    metavar="DIR",
    help="Use this LoRA adapter: a folder in PEFT format, or a name of `adapter list`.",
)
SCRIPT = click.option(
    "--engine",
    "script",
    metavar="WHERE",
    help="Who runs the model, instead of the setting `engine`: local, shared or a URL.",
)


def read_settings(**overrides: Any) -> Settings:
    """The user's settings, with those of the command line laid over them."""
    from midfill import settings

    given = {key: value for key, value in overrides.items() if value is not None}
    return settings.parse(given, base=settings.load(), where="command line")


def engine_maker(script: str | None, *, drafts: bool = True) -> Callable[[Settings], Engine]:
    """What makes the engine that the settings ask for, or the one that `--engine` names.

    That may also be "scripted:FILE" or "busy:FILE", for tests. Without `drafts` it guesses nothing; see
    `EngineSpec`.
    """

    def make(settings: Settings) -> Engine:
        if script is not None and script.startswith("busy:"):
            from midfill.engine.scripted import BusyEngine

            return BusyEngine(Path(script.removeprefix("busy:")), engine_maker(None)(settings))
        if script is not None and script.startswith("scripted:"):
            from midfill.engine.scripted import Script, ScriptedEngine

            return ScriptedEngine(Script.read(Path(script.removeprefix("scripted:"))))
        if script is not None:
            settings = read_engine(settings, script)
        if settings.engine_urls:
            return _remote(settings)
        if settings.engine == "shared":
            return _shared(settings)
        return local_engine(settings, drafts=drafts)

    return make


def read_engine(settings: Settings, where: str) -> Settings:
    """The settings with another `engine`."""
    from midfill import settings as schema

    return schema.parse({"engine": where}, base=settings, where="command line")


def _find(settings: Settings) -> LocalModel:
    """The model of the settings. Raises `ModelError`."""
    from midfill.errors import ModelError
    from midfill.models import store

    found = store.find(settings.model)
    if found is None:
        raise ModelError(
            f"The model {settings.model!r} is not on this machine. Run: midfill model pull {settings.model}"
        )
    return found


def _shared(settings: Settings) -> Engine:
    """A model in a process that all of the user's editors share."""
    from midfill.engine.remote.client.shared import SharedEngine, ShareSpec

    values = settings.model_dump(include=set(_SHARED))
    return SharedEngine(
        ShareSpec(_find(settings), ("--settings", json.dumps(values)), deadline_s=settings.deadline_s)
    )


def local_engine(settings: Settings, *, drafts: bool = True) -> Engine:
    """A model in this process."""
    from midfill.engine.api import EngineSpec
    from midfill.engine.factory import create

    return create(
        EngineSpec(
            model=_find(settings),
            device=settings.device,
            dtype=settings.dtype,
            adapter=adapter_folder(settings.adapter) if settings.adapter else None,
            num_threads=settings.num_threads,
            runner=settings.runner,
            drafts=drafts,
        )
    )


def adapter_folder(name: str) -> Path:
    """A folder, or an adapter of the registry by its name. Raises `AdapterError`."""
    from midfill.adapters.registry import Registry, check_usable

    # The registry first: a folder of that name may be in whatever repository this is.
    if (entry := Registry().find(name)) is None:
        return Path(name)
    check_usable(entry)
    return entry.path


def _remote(settings: Settings) -> Engine:
    """A model that a server has; with the one here in reserve if the user wants that."""
    from midfill.engine.remote.client.fallback import FallbackEngine

    engine = remote_engine(settings)
    return FallbackEngine(engine, lambda: local_engine(settings)) if settings.engine_fallback else engine


def remote_engine(settings: Settings) -> RemoteEngine:
    """A model that a server has."""
    from midfill.engine.remote.client.endpoint import RemoteSpec
    from midfill.engine.remote.client.remote import RemoteEngine
    from midfill.models import store

    own = store.find(settings.model)
    others = [model for model in store.installed() if own is None or model.path != own.path]
    spec = RemoteSpec(
        urls=settings.engine_urls,
        model=settings.engine_model,
        api=settings.engine_api,
        key=settings.engine_key,
        ca=Path(settings.engine_ca).expanduser() if settings.engine_ca else None,
        candidates=tuple(([own] if own is not None else []) + others),
        first_token_s=settings.deadline_s,
    )
    return RemoteEngine(spec)


def show(result: dict[str, Any], table: Callable[[dict[str, Any]], Any], *, as_json: bool) -> None:
    """Print a result as one JSON object, or as what `table` makes of it."""
    found = json.dumps(result) if as_json else table(result)
    if isinstance(found, str):
        say(found)
        return
    terminal().print(found)


def with_progress(title: str, work: Callable[[Progress], T]) -> T:
    """Run `work` with a progress bar on stderr."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = terminal(stderr=True)
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        # A column takes a text as it is, past what `terminal` does with others.
        task = bar.add_task(shown(title), total=None)

        def report(message: str, share: float | None) -> None:
            total = None if share is None else 1.0
            bar.update(task, description=shown(message or title), total=total, completed=share or 0.0)

        return work(report)
