"""The local engine alone: how fast it reads and writes, beside other engines on the same weights.

All of them get the same prompts in turn (ours, generate, llama.cpp, ours, ...), after a warm-up, and
the medians are compared. The others run in processes of their own, so that the peak of our memory is
ours. Goes through the engine's contract only: knows no torch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from midfill.bench.figures import peak_rss_mb
from midfill.bench.rivals import GENERATE, LLAMA_CPP, Rival, RivalError, Run, can_run_llama_cpp
from midfill.engine import Engine, ModelInfo, Progress, Request
from midfill.settings import Settings

MakeEngine = Callable[[Settings], Engine]

_PREFILL_TOKENS = 512
_DECODE_CONTEXT = 384
_DECODE_TOKENS = 64
_WARM_UP_TOKENS = 8
_WARM_KEYS = 8
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


@dataclass(slots=True)
class _Found:
    """What the rounds have given, by engine."""

    prefill: dict[str, list[float]] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)
    first_token_ms: list[float] = field(default_factory=list)
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
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure; the result is what `--json` prints.

    A comparison that cannot be made is null, with the reason in "skipped". Raises `MidfillError` if our
    engine cannot be loaded or fails.
    """
    found = _Found()
    engine = await asyncio.to_thread(make_engine, settings)
    rivals: list[Rival] = []
    try:
        await engine.start(report)
        model = engine.model
        rivals = await _rivals(found, model, weights, report)
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}", number / rounds)
            await _round(found, number, engine, rivals)
        peak_mb = peak_rss_mb(os.getpid())
        await engine.close()
        expected = await _expected(found, model, rivals, report)
    finally:
        await engine.close()
        for rival in rivals:
            await rival.close()
    equal = None
    if expected is not None:
        report("float32, token for token", None)
        equal = await _equals(settings, make_engine, model, expected)
    return _result(found, model, rounds, peak_mb, equal)


async def _rivals(found: _Found, model: ModelInfo, weights: Weights, report: Progress) -> list[Rival]:
    """Those that can be had; why not, for the others."""
    rivals = []
    paths = {GENERATE: weights.folder, LLAMA_CPP: weights.gguf}
    if weights.folder is None:
        found.skipped[GENERATE] = "the model has no folder"
    if weights.gguf is None:
        found.skipped[LLAMA_CPP] = "no GGUF file of these weights was given (--gguf FILE)"
    elif not can_run_llama_cpp():
        found.skipped[LLAMA_CPP] = "xllamacpp is not installed: pip install 'midfill[bench]'"
    for name, path in paths.items():
        if path is None or name in found.skipped:
            continue
        report(f"loading the model into {name}", None)
        try:
            rivals.append(await Rival.start(name, path, model.device))
        except RivalError as error:
            found.skipped[name] = str(error)
    return rivals


async def _round(found: _Found, number: int, engine: Engine, rivals: Sequence[Rival]) -> None:
    """Every engine once, with prompts that none has seen."""
    context = engine.model.context
    num_prefill = min(_PREFILL_TOKENS, context - 1)
    num_context = min(_DECODE_CONTEXT, context // 2)
    num_new = min(_DECODE_TOKENS, context - num_context - _WARM_KEYS - 1)
    encode = engine.model.tokenizer.encode
    warm_up = tuple(encode(_code(f"warm_{number}")))[:16]
    prefill = tuple(encode(_code(f"read_{number}")))[:num_prefill]
    decode = tuple(encode(_code(f"write_{number}")))[:num_context]
    await _run(engine, warm_up, _WARM_UP_TOKENS)
    ours = await _run(engine, prefill, 1)
    written = await _run(engine, decode, num_new)
    found.note("midfill", ours, written)
    found.first_token_ms += await _keys(engine, (*decode, *written.ids), prefill)
    for rival in [rival for rival in rivals if rival.name not in found.skipped]:
        try:
            await rival.run(warm_up, _WARM_UP_TOKENS)
            found.note(rival.name, await rival.run(prefill, 1), await rival.run(decode, num_new))
        except RivalError as error:
            found.skipped[rival.name] = str(error)


async def _keys(engine: Engine, computed: tuple[int, ...], typed: Sequence[int]) -> list[float]:
    """Milliseconds to the first token after one more token, several times."""
    waited_ms = []
    room = max(0, engine.model.context - len(computed) - 1)
    # The first also computes the last token that was written.
    for size in range(1, min(_WARM_KEYS, room) + 1):
        request = Request((*computed, *typed[:size]), 1)
        async with aclosing(engine.generate(request)) as output:
            async for _ in output:
                pass
        if size > 1 and request.stats.first_token_s:
            waited_ms.append((request.stats.first_token_s - request.stats.submitted_s) * 1000)
    return waited_ms


async def _run(engine: Engine, tokens: tuple[int, ...], num_new: int) -> Run:
    """One answer of ours; a control token may end it early."""
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


def _code(name: str) -> str:
    """Code that differs from the first token on, and goes on for longer than anybody reads."""
    return "".join(
        f"{name}_{n} = area(width={n}, height={n * 7 % 31})\n\n\n"
        f"def {name}_{n}(values):\n    return values[{n}]\n\n\n"
        for n in range(64)
    )


async def _expected(
    found: _Found, model: ModelInfo, rivals: Sequence[Rival], report: Progress
) -> list[tuple[tuple[int, ...], list[int]]] | None:
    """Prompts and what `generate` writes after them in float32; None if it cannot be asked."""
    for rival in rivals:
        if rival.name != GENERATE or GENERATE in found.skipped:
            continue
        if model.device != "cpu":
            found.skipped["tokens_equal_generate"] = "on a GPU generate runs in bfloat16"
            return None
        report("what generate writes", None)
        stop_ids = sorted(model.tokenizer.control_ids)
        prompts = [tuple(model.tokenizer.encode(text)) for text in _EQUAL_PROMPTS]
        try:
            return [(tokens, (await rival.run(tokens, _EQUAL_TOKENS, stop_ids)).ids) for tokens in prompts]
        except RivalError as error:
            found.skipped[GENERATE] = str(error)
    found.skipped["tokens_equal_generate"] = f"no generate: {found.skipped.get(GENERATE)}"
    return None


async def _equals(
    settings: Settings,
    make_engine: MakeEngine,
    model: ModelInfo,
    expected: Sequence[tuple[tuple[int, ...], list[int]]],
) -> bool:
    """Whether our engine in float32 writes the same tokens."""
    engine = await asyncio.to_thread(
        make_engine, settings.model_copy(update={"dtype": "float32", "device": model.device})
    )
    try:
        await engine.start(lambda _message, _share: None)
        return all([(await _run(engine, tokens, _EQUAL_TOKENS)).ids == ids for tokens, ids in expected])
    finally:
        await engine.close()


def _result(
    found: _Found, model: ModelInfo, rounds: int, peak_mb: float, equal: bool | None
) -> dict[str, Any]:
    def middle(values: Sequence[float] | None) -> float | None:
        return round(median(values), 2) if values else None

    def ratio(of: dict[str, list[float]], name: str) -> float | None:
        ours, theirs = of.get("midfill"), of.get(name)
        return round(median(ours) / median(theirs), 3) if ours and theirs else None

    names = (LLAMA_CPP, GENERATE)
    return {
        "model": model.name,
        "device": model.device,
        "dtype": model.dtype,
        "rounds": rounds,
        "decode_tok_s": middle(found.decode.get("midfill")),
        "prefill_tok_s": middle(found.prefill.get("midfill")),
        "first_token_warm_ms": middle(found.first_token_ms),
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
    """The figures for a person: a rich table."""
    from rich.table import Table  # noqa: PLC0415 - only a person needs it

    title = "{model} ({device}, {dtype}), medians of {rounds} rounds".format(**result)
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
        f"first token after one more token: {_cell(result['first_token_warm_ms'])} ms",
        f"float32 tokens beside generate's: {equal}",
        f"peak memory: {result['peak_rss_mb']:.0f} MB",
        *(f"no {name}: {why}" for name, why in result["skipped"].items()),
    ]
    grid.caption = "\n".join(lines)
    grid.caption_justify = "left"
    return grid


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
