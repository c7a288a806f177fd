"""`midfill bench shared`: the cost of running the model in a shared process.

Sends the same requests in turn to an engine in this process and to the shared one, on the same model. Each
request adds one token to a prompt that both have computed, like a key; every fourth time a longer output
follows, for the decoding speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from statistics import median
from typing import Any

from midfill.engine.api import Engine, Progress, Request
from midfill.errors import EngineError
from midfill.system.measure import percentiles

_CONTEXT_TOKENS = 300
_DECODED = 32
_TEXT = "".join(f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(64))

Make = Callable[[], Engine]


async def measure(make_here: Make, make_shared: Make, rounds: int, report: Progress) -> dict[str, Any]:
    """Measure both engines in turn; return the result as JSON.

    Returns:
        "first_token_ms": {"here", "shared"} with the 10th percentile, which other programs disturb least, and
        the median; "cost_ms": the differences of these;
        "decode_tok_s": {"here", "shared"} medians; "decode_ratio": median of the ratios shared / here.
    """
    engines = {"here": make_here(), "shared": make_shared()}
    try:
        for name, engine in engines.items():
            report(f"loading: {name}", None)
            await engine.start(lambda _message, _share: None)
        name_of_model = engines["here"].model.name
        text = engines["here"].model.tokenizer.encode(_TEXT)[: _CONTEXT_TOKENS + rounds]
        firsts: dict[str, list[float]] = {name: [] for name in engines}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            await _run(engine, tuple(text[:_CONTEXT_TOKENS]), 1)
        for done in range(1, rounds + 1):
            report("measuring", done / rounds)
            # Each comes first every second time.
            for name in sorted(engines, reverse=done % 2 == 0):
                tokens = tuple(text[: _CONTEXT_TOKENS + done])
                firsts[name].append((await _run(engines[name], tokens, 1))[0])
                if done % 4 == 0:
                    rates[name].append((await _run(engines[name], tokens[:-2], _DECODED))[1])
    finally:
        for engine in engines.values():
            await engine.close()
    found = {name: percentiles(ms, 10, 50) for name, ms in firsts.items()}
    return {
        "model": name_of_model,
        "rounds": rounds,
        "first_token_ms": found,
        "cost_ms": {
            name: round((found["shared"][name] or 0.0) - (found["here"][name] or 0.0), 1)
            for name in found["here"]
        },
        "decode_tok_s": {name: round(median(rate), 2) for name, rate in rates.items()},
        "decode_ratio": round(median(b / a for a, b in zip(rates["here"], rates["shared"], strict=True)), 3),
    }


async def _run(engine: Engine, tokens: tuple[int, ...], num_new: int) -> tuple[float, float]:
    """Run one request; return the milliseconds to the first token, and the tokens per second after it."""
    begun = time.perf_counter()
    stamps = []
    async with aclosing(engine.generate(Request(tokens, num_new))) as output:
        stamps = [time.perf_counter() async for _ in output]
    if not stamps:
        raise EngineError("The model generated no token.")
    seconds = max(stamps[-1] - stamps[0], 1e-9)
    return (stamps[0] - begun) * 1000, (len(stamps) - 1) / seconds


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    firsts, rates = result["first_token_ms"], result["decode_tok_s"]
    return (
        f"first token after a key, p10 and p50, ms: {firsts['here']} in this process, {firsts['shared']} "
        f"shared, difference {result['cost_ms']}\n"
        f"decoding: {rates['here']} tokens/s in this process, {rates['shared']} shared "
        f"(ratio {result['decode_ratio']})"
    )
