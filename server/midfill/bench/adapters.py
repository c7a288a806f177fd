"""`midfill bench adapters`: the cost of adapters per token, and the pause of an answer during a swap.

The adapters have random values on all linear layers; the time of a token does not depend on the values. Two
engines run the same model, one of them without adapters, and are used in turn, so that other load on the
machine affects both.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, cast

from midfill.engine.api import Adaptable, AdapterSource, Engine, Progress, Request
from midfill.errors import EngineError
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.system.measure import peak_rss_mb, percentile

_CODE = "def area(width, height):\n    return width * height\n\n\n"
_SWAP_TOKENS = 600


class _Changing(Engine, Adaptable, Protocol):
    """An engine that supports adapters."""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Parameters of the measurement.

    Attributes:
        rank: rank of the adapters.
        rounds: answers of each kind.
        context_tokens: tokens of the prompt.
        decode_tokens: tokens of an answer.
    """

    rank: int = 16
    rounds: int = 8
    context_tokens: int = 384
    decode_tokens: int = 24


async def bench_adapters(
    settings: Settings,
    make: Callable[[Settings], Engine],
    model: LocalModel,
    *,
    folder: Path,
    plan: AdapterPlan,
    progress: Progress,
) -> dict[str, Any]:
    """Measure; return the result as JSON.

    Args:
        settings: the model and how to run it.
        make: makes an engine; speculative decoding should be off.
        model: the model.
        folder: an empty folder, for two adapters.
        plan: parameters.
        progress: told the progress.

    Raises:
        EngineError: the engine does not support adapters.
    """
    from midfill.engine.openvino.int8_weights import forget_merged

    forget_merged(model.path)
    sources = [
        _made_up(model.path, folder / name, plan.rank, seed) for seed, name in enumerate(("one", "two"))
    ]
    plain, adapted = make(settings), make(settings)
    try:
        for engine in (plain, adapted):
            await engine.start(progress)
        if not isinstance(plain, Adaptable) or not isinstance(adapted, Adaptable):
            raise EngineError("This engine has no adapters; only models that midfill itself runs have.")
        progress("swapping", None)
        swaps = {}
        for name, wanted in (("first", sources[:1]), ("second", sources), ("none", [])):
            swaps[name] = await _swap(cast("_Changing", adapted), wanted, plan)
        await adapted.set_adapters(sources[:1])
        times: dict[str, list[float]] = {"base": [], "adapter": [], "base beside it": []}
        for number in range(plan.rounds):
            progress("decoding", number / plan.rounds)
            times["base"] += await _decode(plain, plan, None)
            times["adapter"] += await _decode(adapted, plan, sources[0].key)
            times["base beside it"] += await _decode(adapted, plan, None)
        info = adapted.model
    finally:
        await plain.close()
        await adapted.close()
        forget_merged(model.path)  # delete hundreds of megabytes that are not used again
    return {
        "model": info.name,
        "device": info.device,
        "dtype": info.dtype,
        "rank": plan.rank,
        **_figures(times),
        "swaps": swaps,
        "peak_rss_mb": peak_rss_mb(os.getpid()),
    }


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures of the times of tokens, each absolute and relative to the base."""
    medians = {name: median(values) for name, values in times.items()}
    # The fastest tenth is less disturbed by other programs.
    quick = {name: percentile(values, 10) or 0.0 for name, values in times.items()}
    return {
        "decode_ms": {name: round(value, 2) for name, value in medians.items()},
        "decode_ratio": {name: round(value / medians["base"], 3) for name, value in medians.items()},
        "quickest_tenth_ms": {name: round(value, 2) for name, value in quick.items()},
        "quickest_tenth_ratio": {name: round(value / quick["base"], 3) for name, value in quick.items()},
        "tokens": {name: len(values) for name, values in times.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [f"{result['model']}, {result['device']}, {result['dtype']}, rank {result['rank']}", ""]
    for name, value in result["decode_ms"].items():
        tenth, ratio = result["quickest_tenth_ms"][name], result["quickest_tenth_ratio"][name]
        lines.append(
            f"{name:15} {value:8.2f} ms per token   x {result['decode_ratio'][name]:.3f}   "
            f"fastest tenth {tenth:.2f} ms   x {ratio:.3f}"
        )
    lines.append("")
    for name, swap in result["swaps"].items():
        lines.append(
            f"swap: {name:9} {swap['wall_ms']:8.0f} ms until the adapter is used; longest gap between tokens "
            f"{swap['stall_ms']:.0f} ms (median {swap['token_ms']:.0f} ms)"
        )
    return "\n".join(lines)


async def _decode(engine: Engine, plan: AdapterPlan, adapter: str | None) -> list[float]:
    """Return the milliseconds of each token after the first. Only the first call computes the prompt."""
    request = Request(_prompt(engine, plan), plan.decode_tokens, adapter=adapter)
    arrived = []
    async with aclosing(engine.generate(request)) as tokens:
        async for _ in tokens:
            arrived.append(time.monotonic())  # noqa: PERF401 - not a comprehension over a stream that is closed
    return [1000 * (after - before) for before, after in itertools.pairwise(arrived)]


async def _swap(engine: _Changing, wanted: Sequence[AdapterSource], plan: AdapterPlan) -> dict[str, float]:
    """Swap adapters while the base generates an answer; return the times of swap and tokens."""
    arrived = []
    swapped_s = 0.0
    swap: asyncio.Task[None] | None = None
    began_s = time.monotonic()
    while swap is None or not swap.done():
        request = Request(_prompt(engine, plan), _SWAP_TOKENS)
        async with aclosing(engine.generate(request)) as tokens:
            async for _ in tokens:
                arrived.append(time.monotonic())
                if swap is None and len(arrived) == 8:
                    began_s = time.monotonic()
                    swap = asyncio.create_task(engine.set_adapters(wanted))
                if swap is not None and swap.done() and not swapped_s:
                    swapped_s = time.monotonic()
                if swapped_s and len(arrived) % 8 == 0:
                    break
    await swap
    gaps = [after - before for before, after in itertools.pairwise(arrived[7:])]
    return {
        "wall_ms": round(1000 * ((swapped_s or time.monotonic()) - began_s), 1),
        "stall_ms": round(1000 * max(gaps), 1),
        "token_ms": round(1000 * median(gaps), 1),
    }


def _prompt(engine: Engine, plan: AdapterPlan) -> tuple[int, ...]:
    line = tuple(engine.model.tokenizer.encode(_CODE))
    return (line * (plan.context_tokens // len(line) + 1))[: plan.context_tokens]


def _made_up(model: Path, folder: Path, rank: int, seed: int) -> AdapterSource:
    """Return an adapter with small random values on all linear layers of a model."""
    import numpy as np
    from safetensors.numpy import save_file

    from midfill.adapters import format as peft_format

    numbers = np.random.default_rng(seed)
    tensors = {}
    for name, (outputs, inputs) in peft_format.layers_of(model).items():
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = numbers.standard_normal(shape, np.float32) * np.float32(0.01)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / peft_format.WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / peft_format.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return AdapterSource(peft_format.digest_of(folder), folder.name, folder)
