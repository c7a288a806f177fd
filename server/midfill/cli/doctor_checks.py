"""The checks of `midfill doctor` and `midfill model check`: the installation, the model and its speed.

Every finding that is not "ok" names its remedy.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from midfill import settings as settings_file
from midfill.cli import gpu_checks
from midfill.completion import calibrations
from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.engine.api import Engine, LocalModel, Request
from midfill.engine.torch import devices
from midfill.engine.torch.devices import Device
from midfill.errors import EngineError, MidfillError, SettingsError
from midfill.fim.probing import identify, probe
from midfill.models import catalogue, store
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot

MakeEngine = Callable[[Settings], Engine]

_GPU_PAGE = "server/docs/gpu.md"
_PACKAGES = ("midfill", "torch", "transformers", "peft", "tokenizers", "pygls")
_SPEED_TEST_S = 1.0
_SPEED_TEST_TOKENS = 257
SPEED_TEST_TEXT = "".join(
    f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(32)
)
_SLOW_TOKENS_PER_S = 5.0
_MIN_FREE_GB = 2.0
_MB = 1_000_000

# Code with a cursor mark that any useful code model can fill, and what the suggestion has to contain.
HOLES = (
    ("def add(a, b):\n    return a ▮\n\n\nprint(add(1, 2))\n", "+ b"),
    ("import math\n\n\ndef circle_area(radius):\n    return ▮\n\n\nprint(circle_area(2))\n", "radius"),
    ("names = ['ada', 'grace', 'alan']\nfor ▮ in names:\n    print(name.title())\n", "name"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: the subject of the check.
        status: "ok", "warning" or "error".
        found: the finding.
        remedy: what the user should do; "" for nothing.
    """

    name: str
    status: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the check for `--json`."""
        return asdict(self)


async def examine(make_engine: MakeEngine) -> list[Check]:
    """Run all checks. A failed check is a finding, not an exception."""
    checks = [_python(), *_settings_file()]
    settings = Settings()
    if checks[-1].status == "ok":
        settings = settings_file.load()
    gpus = devices.torch_devices()
    found = gpu_checks.examine_gpus(gpu_checks.find_hardware(), gpus, devices.installed_build())
    checks += [Check("gpu", one.status, one.found, one.remedy) for one in found]
    checks += [_device(settings, gpus), _cache(), _calibration(settings), _model(settings)]
    checks.append(_memory(settings, gpus))
    if checks[-2].status != "error":
        checks.append(await _speed(settings, make_engine))
    return checks


def _python() -> Check:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return Check("versions", "ok", f"Python {platform.python_version()}, {versions}")


def _settings_file() -> list[Check]:
    path = settings_file.config_path()
    try:
        loaded = settings_file.load()
    except SettingsError as error:
        return [Check("settings", "error", str(error), f"Correct or delete {path}.")]
    changed = {key: value for key, value in loaded.model_dump().items() if value != getattr(Settings(), key)}
    what = ", ".join(f"{key} = {value!r}" for key, value in changed.items()) or "all defaults"
    return [Check("settings", "ok", f"{path if path.exists() else 'no file'}: {what}")]


def _device(settings: Settings, gpus: Sequence[Device]) -> Check:
    """Check the device that the settings choose."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if settings.runner == "llamacpp":
        return _llamacpp_device(settings, cores)
    import torch

    cpu = f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    try:
        device, why = devices.choose(settings.device, gpus)
    except EngineError as error:
        remedy = f"Set `device` to auto, or install a torch for the GPU: see {_GPU_PAGE}"
        return Check("device", "error", str(error), remedy)
    if device.kind == "cpu":
        return Check("device", "ok", f"CPU: {cpu}" + f"; {why}" * bool(why))
    return Check("device", "ok", f"{device.torch_name}: {device.whole_name}; {cpu}")


def _llamacpp_device(settings: Settings, cores: int) -> Check:
    """Check what llama.cpp's library finds; GPUs need another build of it."""
    from midfill.engine.llamacpp import devices

    try:
        found = devices.gpus()
    except EngineError as error:
        return Check("device", "error", str(error), f"Run: {devices.INSTALL}")
    shown = [*map(str, found), f"CPU: {cores} cores"]
    if not found and settings.device != "cpu":
        return Check("device", "ok", f"{shown[0]}; no GPU: {devices.HINT}")
    return Check("device", "ok", "; ".join(shown))


def _cache() -> Check:
    folder = store.models_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < _MIN_FREE_GB:
        remedy = "Free disk space, or set MIDFILL_CACHE to a folder on another disk."
        return Check("cache", "warning", f"{folder}: {free_gb:.1f} GB free", remedy)
    return Check("cache", "ok", f"{folder}: {free_gb:.0f} GB free")


def _calibration(settings: Settings) -> Check:
    """Check the calibration of the confidence filter, which decides which suggestions are shown."""
    found = calibrations.in_use(settings.model)
    if found.problem:
        return Check("gate", "warning", found.problem, "Run: midfill eval calibrate --reset")
    return Check("gate", "ok", calibrations.describe(found))


def _model(settings: Settings) -> Check:
    remedy = f"Run: midfill model pull {settings.model}"
    try:
        found = store.find_for(settings.model, settings.runner)
    except MidfillError as error:
        return Check("model", "error", str(error), remedy)
    if found is None:
        return Check("model", "error", f"{settings.model} is not on this machine", remedy)
    return Check("model", "ok", f"{found.name} in {found.path}")


def _memory(settings: Settings, gpus: Sequence[Device]) -> Check:
    """Check if the model fits into the memory of the device that the settings choose."""
    try:
        device, _ = devices.choose(settings.device, gpus)
        found = store.find(settings.model)
    except MidfillError:
        device, found = devices.CPU, None
    if settings.runner != "llamacpp" and device.kind != "cpu" and found is not None:
        return _gpu_memory(settings, device, found)
    free_mb = psutil.virtual_memory().available / _MB
    entry = catalogue.lookup(settings.model)
    if entry is not None and free_mb < entry.memory_mb:
        said = f"{free_mb / 1000:.1f} GB free, but {entry.name} needs {entry.memory_mb / 1000:.1f} GB"
        return Check(
            "memory", "warning", said, "Close programs, or choose a smaller model: midfill model list"
        )
    return Check("memory", "ok", f"{free_mb / 1000:.1f} GB free")


def _gpu_memory(settings: Settings, device: Device, model: LocalModel) -> Check:
    from midfill.engine.torch.loading import choose_format

    try:
        dtype = choose_format(
            model,
            device,
            settings.dtype,
            prompt_tokens=settings.longest_prompt,
            adapters=settings.adapter is not None,
        )
    except MidfillError as error:
        status = "warning" if settings.device == "auto" else "error"
        return Check("memory", status, str(error), f"See {_GPU_PAGE}")
    free_gb = device.free_bytes() / 1e9
    return Check(
        "memory", "ok", f"{free_gb:.1f} GB of {device.torch_name} free; {model.name} fits in {dtype}"
    )


async def _speed(settings: Settings, make_engine: MakeEngine) -> Check:
    """Load the model, and measure prefill and decode for about a second."""
    begun = time.monotonic()
    engine = None
    try:
        engine = await asyncio.to_thread(make_engine, settings)
        await engine.start(lambda _message, _share: None)
        load_s = time.monotonic() - begun
        speed = await _measure(engine)
    except MidfillError as error:
        return Check("speed", "error", str(error), f"Run: midfill model check {settings.model}")
    finally:
        if engine is not None:
            await engine.close()
    found = (
        f"loaded in {load_s:.1f} s; reads {speed.read_per_s:.0f} and writes {speed.written_per_s:.1f} "
        f"tokens/s; first token {speed.next_key_ms:.0f} ms after a key"
    )
    if speed.written_per_s < _SLOW_TOKENS_PER_S:
        return Check(
            "speed", "warning", found, "Close programs, or choose a smaller model: midfill model list"
        )
    return Check("speed", "ok", found)


@dataclass(frozen=True, slots=True)
class _Speed:
    """Tokens per second read (prefill) and written (decode), and the time to a first token with warm KV."""

    read_per_s: float
    written_per_s: float
    next_key_ms: float


async def _measure(engine: Engine) -> _Speed:
    tokens = tuple(engine.model.tokenizer.encode(SPEED_TEST_TEXT))[:_SPEED_TEST_TOKENS]
    cold = Request(tokens[:-1], max_new_tokens=engine.model.context - len(tokens))
    async with aclosing(engine.generate(cold)) as output:
        async for _ in output:
            if time.monotonic() - cold.stats.first_token_s > _SPEED_TEST_S:
                break
    writing_s = time.monotonic() - cold.stats.first_token_s
    warm = Request(tokens, max_new_tokens=1)
    async with aclosing(engine.generate(warm)) as output:
        async for _ in output:
            pass
    # Avoids a division by zero for a model that ends at once.
    reading_s = max(cold.stats.first_token_s - cold.stats.started_s, 1e-6)
    return _Speed(
        len(cold.tokens) / reading_s,
        max(cold.stats.num_generated - 1, 0) / writing_s,
        max(warm.stats.first_token_s - warm.stats.submitted_s, 0.0) * 1000,
    )


async def check_model(settings: Settings, make_engine: MakeEngine) -> dict[str, Any]:
    """Load a model, probe it and fill `HOLES`. Raises `MidfillError` if it cannot be loaded."""
    engine = await asyncio.to_thread(make_engine, settings)
    try:
        await engine.start(lambda _message, _share: None)
        model = engine.model
        name, family = await identify(engine, settings.family)
        orders = await probe(engine, family)
        completer = Completer(settings.model_copy(update={"prefetch": False}))
        completer.use(engine, (name, family))
        holes = [await _fill(completer, text, expected) for text, expected in HOLES]
        return {
            "model": model.name,
            "family": name,
            "layouts": [str(layout) for layout in family.layouts],
            "sentinels": {sentinel: model.tokenizer.token_id(sentinel) for sentinel in family.sentinels},
            "probe": orders.as_dict(),
            "context": model.context,
            "device": model.device,
            "dtype": model.dtype,
            "adapter": model.adapter,
            "memory_mb": round(psutil.Process().memory_info().rss / _MB),
            "holes": holes,
            "passed": all(hole["passed"] for hole in holes) and orders.agrees(family),
        }
    finally:
        await engine.close()


async def _fill(completer: Completer, marked: str, expected: str) -> dict[str, Any]:
    """Complete at the mark. Return the line with the hole, the text, and if it contains `expected`."""
    before, after = marked.split("▮")
    document = Document.open("untitled:hole.py", "python", 0, before + after)
    cursor = Point(before.count("\n"), len(before) - before.rfind("\n") - 1)
    answer = await completer.complete(Snapshot(document, cursor), Trigger.INVOKED)
    row = marked.splitlines()[cursor.line].strip()
    return {"hole": row, "text": answer.text, "expected": expected, "passed": expected in answer.text}
