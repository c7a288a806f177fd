"""`midfill bench engine`: prefill and decoding speed of the local engine, beside baselines.

All engines run the same prompts in turn (ours, generate, llama.cpp, ours, ...), after a warm-up; their
medians are compared. Baselines run in separate processes, so that the peak memory is our engine's. Uses the
engine's contract only; knows no torch.
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
from midfill.engine.llamacpp.bindings import INSTALL, PACKAGE
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
    """The weights for the baselines.

    Attributes:
        folder: model folder for transformers, or None.
        gguf: GGUF file for llama.cpp, or None.
    """

    folder: Path | None = None
    gguf: Path | None = None


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The work of each engine in a round; less for a model with a short context.

    Attributes:
        rounds: number of rounds.
        prefill_tokens: tokens of the prompt that measures prefill.
        context_tokens: tokens of the prompt that precedes the generated tokens.
        decode_tokens: tokens to generate.
        cancellations: requests to cancel in total, each while a long prompt is computed.
    """

    rounds: int = 3
    prefill_tokens: int = 512
    context_tokens: int = 384
    decode_tokens: int = 64
    cancellations: int = 50

    def within(self, context: int) -> EnginePlan:
        """Return the plan limited to a model's context of `context` tokens."""
        before = min(self.context_tokens, context // 2)
        return replace(
            self,
            prefill_tokens=min(self.prefill_tokens, context - 1),
            context_tokens=before,
            decode_tokens=min(self.decode_tokens, context - before - _WARM_KEYS - 1),
        )


@dataclass(slots=True)
class _Found:
    """Measurements so far, by engine."""

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
    """Measure; return the result as `--json` prints it.

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
        report("cancelling requests", None)
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
    """Start the baselines that are available; record why others are not."""
    baselines = []
    paths = {GENERATE: weights.folder, LLAMA_CPP: weights.gguf}
    if weights.folder is None:
        found.skipped[GENERATE] = "the model has no folder"
    if weights.gguf is None:
        found.skipped[LLAMA_CPP] = (
            "there is no GGUF file of these weights; run `midfill model pull NAME --gguf`, or use --gguf FILE"
        )
    elif not can_run_llama_cpp():
        found.skipped[LLAMA_CPP] = f"{PACKAGE} is not installed; run: {INSTALL}"
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
    """Run every engine once, with prompts that none has seen before."""
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
    # The first request also computes the last token that was generated.
    for size in range(1, min(_WARM_KEYS, room) + 1):
        request = Request((*computed, *typed[:size]), 1)
        await _exhaust(engine, request)
        if size > 1 and request.stats.first_token_s:
            waited_ms.append((request.stats.first_token_s - request.stats.submitted_s) * 1000)
    return waited_ms


async def _cancellations(engine: Engine, plan: EnginePlan) -> list[float]:
    """Return the milliseconds from a cancellation until the engine is free, while it computes a long prompt.

    The first request is cancelled at the end of the prompt, where attention covers the most tokens, the last
    at its begin. The part before is in the KV cache already.
    """
    moments = random.Random(0)
    num_tokens = min(_CANCELLED_TOKENS, engine.model.context - 1)
    prompt = _prompt(engine.model, "kept", num_tokens)
    read_s = (await _run(engine, prompt, 1)).prefill_s
    freed_ms = []
    for number in range(plan.cancellations):
        num_kept = (num_tokens - num_tokens // 8) * (plan.cancellations - 1 - number) // plan.cancellations
        new = _prompt(engine.model, f"cancelled_{number}", num_tokens - num_kept)
        request = Request((*prompt[:num_kept], *new), 1)
        reading = asyncio.create_task(_exhaust(engine, request))
        # Early enough that the prompt is still being read, on a GPU too.
        await asyncio.sleep(moments.uniform(0.04, 1.0) * min(0.5, 0.9 * read_s * len(new) / num_tokens))
        cancelled_s = time.monotonic()
        if reading.done():
            continue
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        # The engine's thread records the end before it runs the next request.
        await _run(engine, request.tokens[:1], 1)
        freed_ms.append(max(0.0, request.stats.ended_s - cancelled_s) * 1000)
    return freed_ms


async def _exhaust(engine: Engine, request: Request) -> None:
    async with aclosing(engine.generate(request)) as output:
        async for _ in output:
            pass


async def _run(engine: Engine, tokens: tuple[int, ...], num_new: int) -> Run:
    """Run one request on our engine; a control token may end it early."""
    request = Request(tokens, num_new)
    ids = []
    async with aclosing(engine.generate(request)) as output:
        async for token in output:
            ids.append(token.id)  # noqa: PERF401 - not a list comprehension over a stream that is closed
    stats = request.stats
    # A model that stops at once yields no first token.
    first_s = stats.first_token_s or stats.ended_s or stats.started_s
    return Run(
        ids,
        first_s - stats.started_s,
        len(tokens) - stats.num_reused,
        (stats.ended_s or first_s) - first_s,
    )


def _prompt(model: ModelInfo, name: str, num_tokens: int) -> tuple[int, ...]:
    """Return a prompt of code that differs from that of other names from the first token on."""
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
    """Return prompts with the tokens that `generate` writes in float32; None if it is not available."""
    for baseline in baselines:
        if baseline.name != GENERATE or GENERATE in found.skipped:
            continue
        if model.device != "cpu":
            found.skipped["tokens_equal_generate"] = "generate runs in bfloat16 on a GPU"
            return None
        report("tokens of generate", None)
        stop_ids = sorted(model.tokenizer.control_ids)
        prompts = [tuple(model.tokenizer.encode(text)) for text in _EQUAL_PROMPTS]
        try:
            return [(tokens, (await baseline.run(tokens, _EQUAL_TOKENS, stop_ids)).ids) for tokens in prompts]
        except BaselineError as error:
            found.skipped[GENERATE] = str(error)
    found.skipped["tokens_equal_generate"] = f"generate is not available: {found.skipped.get(GENERATE)}"
    return None


async def _equals(
    settings: Settings,
    make_engine: MakeEngine,
    model: ModelInfo,
    expected: Sequence[tuple[tuple[int, ...], list[int]]],
) -> bool:
    """Return whether our engine generates the same tokens in float32."""
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
        "attention": model.attention or None,
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
    """Return the figures as a rich table."""
    from rich.table import Table

    title = (
        "{model} ({device}, {dtype}), medians of {rounds} rounds: {prefill_tokens} prompt tokens; "
        "{decode_tokens} generated tokens after {context_tokens}"
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
        f"first token after one more prompt token: {_cell(result['first_token_warm_ms'])} ms, "
        f"{_cell(result['first_token_warm_steps'])} decoding steps",
        "engine free after a cancellation: p50 {p50} ms, p99 {p99} ms".format(**result["cancel_to_free_ms"]),
        f"float32 tokens compared with generate's: {equal}",
        f"peak memory: {result['peak_rss_mb']:.0f} MB",
        *([f"attention kernel: {result['attention']}"] if result["attention"] else []),
        *(f"no {name}: {why}" for name, why in result["skipped"].items()),
    ]
    grid.caption = "\n".join(lines)
    grid.caption_justify = "left"
    return grid


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
