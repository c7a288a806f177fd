"""Read the settings, and make the engine that they and `--engine` ask for."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midfill.engine.api import Engine
    from midfill.engine.remote.client.remote import RemoteEngine
    from midfill.models.store import LocalModel
    from midfill.settings import Settings

# Editors share one engine process if all of these settings are equal.
_SHARED = (
    *("model", "family", "adapter", "device", "dtype", "runner", "num_threads"),
    *("engine_unload_min", "engine_exit_min"),
)

_HAS_SOCKETS = hasattr(socket, "AF_UNIX")
"""Whether this system has the sockets of a shared engine. Windows does not."""

TEST_ENGINES = ("busy:", "scripted:")
"""Prefixes that `--engine` takes in addition to the values of the setting `engine`."""


def read_settings(**overrides: Any) -> Settings:
    """Return the user's settings, with those options that are not None on top."""
    from midfill import settings

    given = {key: value for key, value in overrides.items() if value is not None}
    return settings.parse(given, base=settings.load(), where="command line")


def with_engine(settings: Settings, engine: str) -> Settings:
    """Return the settings with another value of `engine`."""
    from midfill import settings as schema

    return schema.parse({"engine": engine}, base=settings, where="command line")


def engine_factory(
    engine_override: str | None, *, drafts: bool = True, survive: bool = False
) -> Callable[[Settings], Engine]:
    """Return a function that makes the engine of the given settings, or the one that `--engine` names.

    Args:
        engine_override: a value of the setting `engine`, "scripted:FILE" or "busy:FILE" (both for tests), or
            None to use the settings.
        drafts: use speculative decoding; see `EngineSpec`.
        survive: this process must not end with the model's library. llama.cpp ends the process on a failed
            assertion, so it runs in the shared engine's process then, which is started again.
    """

    def make(settings: Settings) -> Engine:
        if engine_override is not None and engine_override.startswith("busy:"):
            from midfill.engine.scripted import BusyEngine

            return BusyEngine(Path(engine_override.removeprefix("busy:")), engine_factory(None)(settings))
        if engine_override is not None and engine_override.startswith("scripted:"):
            from midfill.engine.scripted import Script, ScriptedEngine

            return ScriptedEngine(Script.read(Path(engine_override.removeprefix("scripted:"))))
        if engine_override is not None:
            settings = with_engine(settings, engine_override)
        if settings.engine_urls:
            return _remote_with_fallback(settings)
        if settings.engine == "shared" or (survive and settings.runner == "llamacpp" and _HAS_SOCKETS):
            return _shared_engine(settings)
        return local_engine(settings, drafts=drafts)

    return make


def installed_model(name: str, runner: str = "auto") -> LocalModel:
    """Return a model of this machine. Raises `ModelMissingError` that names the command to download it."""
    from midfill.errors import ModelMissingError
    from midfill.models import store

    found = store.find_for(name, runner)
    if found is not None:
        return found
    if runner != "llamacpp":
        raise ModelMissingError(f"The model {name!r} is not on this machine. Run: midfill model pull {name}")
    raise ModelMissingError(
        f'There is no GGUF file of the model {name!r} on this machine, which runner "llamacpp" needs. '
        f"Run: midfill model pull {name} --gguf, or set `model` to the path of a GGUF file."
    )


def adapter_folder(name: str) -> Path:
    """Return the folder of a registered adapter, or else the path itself. Raises `AdapterError`."""
    from midfill.adapters.registry import Registry, check_usable

    # The registry first: any repository may contain a folder with that name.
    if (entry := Registry().find(name)) is None:
        return Path(name)
    check_usable(entry)
    return entry.path


def local_engine(settings: Settings, *, drafts: bool = True) -> Engine:
    """Return an engine that runs the model in this process."""
    from midfill.engine.api import EngineSpec
    from midfill.engine.factory import create

    return create(
        EngineSpec(
            model=installed_model(settings.model, settings.runner),
            device=settings.device,
            dtype=settings.dtype,
            adapter=adapter_folder(settings.adapter) if settings.adapter else None,
            num_threads=settings.num_threads,
            runner=settings.runner,
            drafts=drafts,
            prompt_tokens=settings.longest_prompt,
        )
    )


def remote_engine(settings: Settings) -> RemoteEngine:
    """Return an engine that asks the servers of the setting `engine`."""
    from midfill.engine.remote.client.endpoint import RemoteSpec
    from midfill.engine.remote.client.remote import RemoteEngine
    from midfill.models import store

    own = store.find_for(settings.model, settings.runner)
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


def _remote_with_fallback(settings: Settings) -> Engine:
    """Return a remote engine; with the setting `engine_fallback`, one that falls back to the local model."""
    from midfill.engine.remote.client.fallback import FallbackEngine

    engine = remote_engine(settings)
    return FallbackEngine(engine, lambda: local_engine(settings)) if settings.engine_fallback else engine


def _shared_engine(settings: Settings) -> Engine:
    """Return an engine whose model runs in one process for all editors of the user."""
    from midfill.engine.remote.client.shared import SharedEngine, ShareSpec

    values = settings.model_dump(include=set(_SHARED))
    model = installed_model(settings.model, settings.runner)
    return SharedEngine(ShareSpec(model, ("--settings", json.dumps(values)), deadline_s=settings.deadline_s))
