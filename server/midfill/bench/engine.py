"""The local engine alone: how fast it reads and writes, beside other engines on the same weights.

All of them get the same prompts in turn (ours, generate, llama.cpp, ours, ...), after a warm-up, and
the medians are compared. The others run in processes of their own, so that the peak of our memory is
ours. Goes through the engine's contract only: knows no torch.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from midfill.bench.baselines import (
    GENERATE,
    LLAMA_CPP,
    BaselineError,
    BaselineProcess,
    Run,
    can_run_llama_cpp,
)
from midfill.engine.api import Engine, ModelInfo, Progress, Request
from midfill.settings import Settings
from midfill.system.measure import peak_rss_mb, percentiles

MakeEngine = Callable[[Settings], Engine]

_WARM_UP_TOKENS = 8
_WARM_KEYS = 8
_CANCELLED_TOKENS = 4_000
_EQUAL_TOKENS = 24
_EQUAL_PROMPTS = (
    "def add(a, b):\n    ",
    "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Where other engines find the weights.

    Attributes:
        folder: what transformers loads; None if there is none.
        gguf: what llama.cpp loads; None if there is none.
    """

    folder: Path | None = None
    gguf: Path | None = None


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What each engine does in a round. A model with a short context does less.

    Attributes:
        rounds: how many of them.
        prefill_tokens: the prompt that is read.
        context_tokens: what stands before the tokens that are written.
        decode_tokens: how many are written.
        cancellations: how many requests are taken back in all, each while a long prompt is read.
    """

    rounds: int = 3
    prefill_tokens: int = 512
    context_tokens: int = 384
    decode_tokens: int = 64
    cancellations: int = 50

    def within(self, context: int) -> EnginePlan:
        """Return the same for a model that takes at most `context` tokens."""
        before = min(self.context_tokens, context // 2)
        return replace(
            self,
            prefill_tokens=min(self.prefill_tokens, context - 1),
            context_tokens=before,
            decode_tokens=min(self.decode_tokens, context - before - _WARM_KEYS - 1),
        )


@dataclass(slots=True)
class _Found:
    """What the rounds have given, by engine."""

    prefill: dict[str, list[float]] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)
    first_token_ms: list[float] = field(default_factory=list)
    freed_ms: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, prefill: Run, decode: Run) -> None:
        self.prefill.setdefault(name, []).append(prefill.prefill_tok_s)
        if decode.decode_tok_s is not None:
            self.decode.setdefault(name, []).append(decode.decode_tok_s)


async def bench_engine(
    settings: Settings,
    make_engine: MakeEngine,
    report: Progress,
    *,
    weights: Weights,
    plan: EnginePlan | None = None,
) -> dict[str, Any]:
    """Measure; the result is what `--json` prints.

    A comparison that cannot be made is null, with the reason in "skipped". Raises `MidfillError` if our
    engine cannot be loaded or fails.
    """
    found = _Found()
    engine = await asyncio.to_thread(make_engine, settings)
    baselines: list[BaselineProcess] = []
    try:
        await engine.start(report)
        model = engine.model
        plan = (plan or EnginePlan()).within(model.context)
        baselines = await _start_baselines(found, model, plan, weights, report)
        for number in range(plan.rounds):
            report(f"round {number + 1} of {plan.rounds}", number / plan.rounds)
            await _round(found, number, plan, engine, baselines)
        peak_mb = peak_rss_mb(os.getpid())
        report("taking requests back", None)
        found.freed_ms = await _cancellations(engine, plan)
        await engine.close()
        expected = await _expected(found, model, baselines, report)
    finally:
        await engine.close()
        for baseline in baselines:
            await baseline.close()
    equal = None
    if expected is not None:
        report("float32, token for token", None)
        equal = await _equals(settings, make_engine, model, expected)
    return _result(found, model, plan, peak_mb, equal)


async def _start_baselines(
    found: _Found, model: ModelInfo, plan: EnginePlan, weights: Weights, report: Progress
) -> list[BaselineProcess]:
    """Those that can be had; why not, for the others."""
    baselines = []
    paths = {GENERATE: weights.folder, LLAMA_CPP: weights.gguf}
    if weights.folder is None:
        found.skipped[GENERATE] = "the model has no folder"
    if weights.gguf is None:
        found.skipped[LLAMA_CPP] = (
            "there is no GGUF file of these weights: midfill model pull NAME --gguf, or --gguf FILE"
        )
    elif not can_run_llama_cpp():
        found.skipped[LLAMA_CPP] = "xllamacpp is not installed: pip install xllamacpp"
    context = max(plan.prefill_tokens, plan.context_tokens + plan.decode_tokens) + _WARM_UP_TOKENS
    for name, path in paths.items():
        if path is None or name in found.skipped:
            continue
        report(f"loading the model into {name}", None)
        try:
            baselines.append(await BaselineProcess.start(name, path, model.device, context))
        except BaselineError as error:
            found.skipped[name] = str(error)
    return baselines


async def _round(
    found: _Found, number: int, plan: EnginePlan, engine: Engine, baselines: Sequence[BaselineProcess]
) -> None:
    """Every engine once, with prompts that none has seen."""
    num_new = plan.decode_tokens
    warm_up = _prompt(engine.model, f"warm_{number}", 16)
    prefill = _prompt(engine.model, f"read_{number}", plan.prefill_tokens)
    decode = _prompt(engine.model, f"write_{number}", plan.context_tokens)
    await _run(engine, warm_up, _WARM_UP_TOKENS)
    ours = await _run(engine, prefill, 1)
    written = await _run(engine, decode, num_new)
    found.note("midfill", ours, written)
    found.first_token_ms += await _keys(engine, (*decode, *written.ids), prefill)
    for baseline in [baseline for baseline in baselines if baseline.name not in found.skipped]:
        try:
            await baseline.run(warm_up, _WARM_UP_TOKENS)
            found.note(baseline.name, await baseline.run(prefill, 1), await baseline.run(decode, num_new))
        except BaselineError as error:
            found.skipped[baseline.name] = str(error)


async def _keys(engine: Engine, computed: tuple[int, ...], typed: Sequence[int]) -> list[float]:
    """Return the milliseconds to the first token after one more token, several times."""
    waited_ms = []
    room = max(0, engine.model.context - len(computed) - 1)
    # The first also computes the last token that was written.
    for size in range(1, min(_WARM_KEYS, room) + 1):
        request = Request((*computed, *typed[:size]), 1)
        await _exhaust(engine, request)
        if size > 1 and request.stats.first_token_s:
            waited_ms.append((request.stats.first_token_s - request.stats.submitted_s) * 1000)
    return waited_ms


async def _cancellations(engine: Engine, plan: EnginePlan) -> list[float]:
    """Milliseconds from taking back a request until the model is free, while it reads a long prompt.

    The first is taken back at the far end of the prompt, where the most tokens are attended to, the last at
    its beginning. What comes before is computed already, so that nobody waits for that.
    """
    moments = random.Random(0)  # noqa: S311 - a sample
    num_tokens = min(_CANCELLED_TOKENS, engine.model.context - 1)
    prompt = _prompt(engine.model, "kept", num_tokens)
    await _run(engine, prompt, 1)
    freed_ms = []
    for number in range(plan.cancellations):
        num_kept = (num_tokens - num_tokens // 8) * (plan.cancellations - 1 - number) // plan.cancellations
        new = _prompt(engine.model, f"cancelled_{number}", num_tokens - num_kept)
        request = Request((*prompt[:num_kept], *new), 1)
        reading = asyncio.create_task(_exhaust(engine, request))
        await asyncio.sleep(moments.uniform(0.02, 0.5))
        cancelled_s = time.monotonic()
        if reading.done():
            continue
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        # The thread notes the end; the next request comes after it.
        await _run(engine, request.tokens[:1], 1)
        freed_ms.append(max(0.0, request.stats.ended_s - cancelled_s) * 1000)
    return freed_ms


async def _exhaust(engine: Engine, request: Request) -> None:
    async with aclosing(engine.generate(request)) as output:
        async for _ in output:
            pass


async def _run(engine: Engine, tokens: tuple[int, ...], num_new: int) -> Run:
    """Return one answer of ours; a control token may end it early."""
    request = Request(tokens, num_new)
    ids = []
    async with aclosing(engine.generate(request)) as output:
        async for token in output:
            ids.append(token.id)  # noqa: PERF401 - not a list comprehension over a stream that is closed
    stats = request.stats
    # A model that ends at once gives no first token.
    first_s = stats.first_token_s or stats.ended_s or stats.started_s
    return Run(
        ids,
        first_s - stats.started_s,
        len(tokens) - stats.num_reused,
        (stats.ended_s or first_s) - first_s,
    )


def _prompt(model: ModelInfo, name: str, num_tokens: int) -> tuple[int, ...]:
    """So many tokens of code that differs from other names' from the first token on."""
    tokens: list[int] = []
    for n in itertools.count():
        if len(tokens) >= num_tokens:
            return tuple(tokens[:num_tokens])
        tokens += model.tokenizer.encode(
            f"{name}_{n} = area(width={n}, height={n * 7 % 31})\n\n\n"
            f"def {name}_{n}(values):\n    return values[{n}]\n\n\n"
        )
    raise AssertionError


async def _expected(
    found: _Found, model: ModelInfo, baselines: Sequence[BaselineProcess], report: Progress
) -> list[tuple[tuple[int, ...], list[int]]] | None:
    """Prompts and what `generate` writes after them in float32; None if it cannot be asked."""
    for baseline in baselines:
        if baseline.name != GENERATE or GENERATE in found.skipped:
            continue
        if model.device != "cpu":
            found.skipped["tokens_equal_generate"] = "on a GPU generate runs in bfloat16"
            return None
        report("what generate writes", None)
        stop_ids = sorted(model.tokenizer.control_ids)
        prompts = [tuple(model.tokenizer.encode(text)) for text in _EQUAL_PROMPTS]
        try:
            return [(tokens, (await baseline.run(tokens, _EQUAL_TOKENS, stop_ids)).ids) for tokens in prompts]
        except BaselineError as error:
            found.skipped[GENERATE] = str(error)
    found.skipped["tokens_equal_generate"] = f"no generate: {found.skipped.get(GENERATE)}"
    return None


async def _equals(
    settings: Settings,
    make_engine: MakeEngine,
    model: ModelInfo,
    expected: Sequence[tuple[tuple[int, ...], list[int]]],
) -> bool:
    """Return whether our engine in float32 writes the same tokens."""
    engine = await asyncio.to_thread(
        make_engine, settings.model_copy(update={"dtype": "float32", "device": model.device})
    )
    try:
        await engine.start(lambda _message, _share: None)
        return all([(await _run(engine, tokens, _EQUAL_TOKENS)).ids == ids for tokens, ids in expected])
    finally:
        await engine.close()


def _result(
    found: _Found, model: ModelInfo, plan: EnginePlan, peak_mb: float, equal: bool | None
) -> dict[str, Any]:
    def middle(values: Sequence[float] | None) -> float | None:
        return round(median(values), 2) if values else None

    def ratio(of: dict[str, list[float]], name: str) -> float | None:
        ours, theirs = of.get("midfill"), of.get(name)
        return round(median(ours) / median(theirs), 3) if ours and theirs else None

    names = (LLAMA_CPP, GENERATE)
    decode_tok_s, first_token_ms = middle(found.decode.get("midfill")), middle(found.first_token_ms)
    return {
        "model": model.name,
        "device": model.device,
        "dtype": model.dtype,
        **asdict(plan),
        "decode_tok_s": decode_tok_s,
        "prefill_tok_s": middle(found.prefill.get("midfill")),
        "first_token_warm_ms": first_token_ms,
        "first_token_warm_steps": (
            round(first_token_ms * decode_tok_s / 1000, 2) if first_token_ms and decode_tok_s else None
        ),
        "cancel_to_free_ms": percentiles(found.freed_ms, 50, 99),
        "tokens_equal_generate": equal,
        "peak_rss_mb": peak_mb,
        "ratios": {
            name: {"decode": ratio(found.decode, name), "prefill": ratio(found.prefill, name)}
            for name in names
        },
        "others": {
            name: {
                "decode_tok_s": middle(found.decode.get(name)),
                "prefill_tok_s": middle(found.prefill.get(name)),
            }
            for name in names
        },
        "runs": {"decode": _rounded(found.decode), "prefill": _rounded(found.prefill)},
        "skipped": found.skipped,
    }


def _rounded(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 2) for value in values] for name, values in runs.items()}


def table(result: dict[str, Any]) -> Any:
    """Return the figures for a person: a rich table."""
    from rich.table import Table  # noqa: PLC0415 - only a person needs it

    title = (
        "{model} ({device}, {dtype}), medians of {rounds} rounds: {prefill_tokens} tokens read, "
        "{decode_tokens} written after {context_tokens}"
    ).format(**result)
    grid = Table("", "decode, tok/s", "ours / it", "prefill, tok/s", "ours / it", title=title)
    grid.add_row("midfill", _cell(result["decode_tok_s"]), "", _cell(result["prefill_tok_s"]), "")
    for name, figures in result["others"].items():
        ratios = result["ratios"][name]
        grid.add_row(
            name,
            _cell(figures["decode_tok_s"]),
            _cell(ratios["decode"]),
            _cell(figures["prefill_tok_s"]),
            _cell(ratios["prefill"]),
        )
    equal = {None: "not compared", True: "equal", False: "NOT EQUAL"}[result["tokens_equal_generate"]]
    lines = [
        f"first token after one more token: {_cell(result['first_token_warm_ms'])} ms, "
        f"{_cell(result['first_token_warm_steps'])} decode steps",
        "free again after a request is taken back: p50 {p50} ms, p99 {p99} ms".format(
            **result["cancel_to_free_ms"]
        ),
        f"float32 tokens beside generate's: {equal}",
        f"peak memory: {result['peak_rss_mb']:.0f} MB",
        *(f"no {name}: {why}" for name, why in result["skipped"].items()),
    ]
    grid.caption = "\n".join(lines)
    grid.caption_justify = "left"
    return grid


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
