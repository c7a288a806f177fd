"""`midfill engine check URL`: whether a served engine is fit for somebody who types, and what to do if not.

Asks it as the server would: the same recognition, prompts, probe and cancellation. Sends made-up code only.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx2

from midfill.cli.doctor import HOLES, SPEED_TEST_TEXT, Check
from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.engine.api import Request
from midfill.engine.remote.client.detection import ServerInfo, ask
from midfill.engine.remote.client.endpoint import is_loopback
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.client.text_tokenizer import TextTokenizer
from midfill.errors import EngineError, EngineUnavailableError, MidfillError
from midfill.fim.probing import identify, probe
from midfill.fim.templates import Family
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot

_PROMPT_TOKENS = 320
_DECODED = 24
_LONG = 400
_FREED_S = 5.0
_SLOW_FIRST_MS = 300
_SLOW_TOKEN_MS = 60
_REUSED_SHARE = 0.6
"""With the rest reused, a prompt that differs in its last token takes this share of the time at most."""

# What each kind says of how many requests it is computing: a gauge on its page for Prometheus.
_RUNNING = {
    "vllm": "vllm:num_requests_running",
    "sglang": "sglang:num_running_reqs",
    "llama.cpp": "llamacpp:requests_processing",
    "midfill": "midfill_requests_running",
}


@dataclass(slots=True)
class Findings:
    """What was found: for people, and as numbers.

    Attributes:
        checks: in the order of the questions.
        numbers: milliseconds, tokens and names, for `--json`.
    """

    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, status: str, found: str, remedy: str = "", **numbers: Any) -> None:
        """Note a finding."""
        self.checks.append(Check(name, status, found, remedy))
        self.numbers |= numbers

    @property
    def passed(self) -> bool:
        """Whether it can be used."""
        return all(check.status != "error" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "passed": self.passed,
            "checks": [check.as_dict() for check in self.checks],
            "numbers": self.numbers,
        }


async def check(engine: RemoteEngine, settings: Settings) -> Findings:
    """Ask an engine that is not started yet all of it. Raises nothing for what it finds."""
    findings = Findings()
    try:
        begun = time.monotonic()
        await engine.start(lambda _message, _share: None)
        served = engine.endpoints[0].served
        if served is None:
            raise EngineUnavailableError("It was not recognised.")
        _reached(findings, engine, served, (time.monotonic() - begun) * 1000)
        family = await _fills_in(findings, engine, settings)
        if family is not None:
            await _suggests(findings, engine, settings, family)
        await _is_quick(findings, engine)
        await _cancels(findings, engine, served)
    except MidfillError as error:
        name = "reachable" if not findings.checks else "asked"
        findings.add(
            name, "error", str(error), "Look at the server's own log, and at `engine` in your settings."
        )
    finally:
        await engine.close()
    return findings


def _reached(findings: Findings, engine: RemoteEngine, served: ServerInfo, ms: float) -> None:
    endpoint = engine.endpoints[0]
    open_air = endpoint.url.startswith("http://") and not is_loopback(endpoint.url)
    findings.add(
        "reachable",
        "warning" if open_air else "ok",
        f"{served.kind.title} at {endpoint.address}, recognised in {ms:.0f} ms",
        "Your code goes over the network unencrypted: put TLS before the server." if open_air else "",
        url=endpoint.url,
        kind=served.dialect,
        recognised_ms=round(ms, 1),
    )
    text = isinstance(engine.model.tokenizer, TextTokenizer)
    how = "as text, since its vocabulary is not here" if text else "as token ids"
    remedy = (
        "Fetch a model of the same family, so that prompts are exact: midfill model pull NAME" if text else ""
    )
    findings.add(
        "model",
        "warning" if text and served.kind.takes_ids else "ok",
        f"{served.model}, {served.context} tokens of context; prompts go {how}",
        remedy if served.kind.takes_ids else "",
        model=served.model,
        context=served.context,
        token_ids=not text,
    )


async def _fills_in(
    findings: Findings, engine: RemoteEngine, settings: Settings
) -> tuple[str, Family] | None:
    """Whether the model was trained to fill in, asked of itself."""
    try:
        name, family = await identify(engine, settings.family)
    except EngineError:
        raise
    except MidfillError as error:
        findings.add(
            "fills in", "error", str(error), "Serve the base model of a known family: midfill eval families"
        )
        return None
    if not family.middle:
        findings.add("fills in", "ok", f"{name}; its server makes the prompts, so that this cannot be asked")
        return name, family
    found = await probe(engine, family)
    scores = ", ".join(f"{layout} {score:.2f}" for layout, score in found.scores.items())
    what = f"{name}; nats per character of known middles: {scores}, prefix alone {found.alone:.2f}"
    remedy = "" if found.agrees(family) else "It is no model of that family, or tells no log-probabilities."
    findings.add(
        "fills in", "ok" if not remedy else "warning", what, remedy, family=name, probe=found.as_dict()
    )
    return name, family


async def _suggests(
    findings: Findings, engine: RemoteEngine, settings: Settings, family: tuple[str, Family]
) -> None:
    """Whether known holes are filled, by the whole pipeline."""
    completer = Completer(settings.model_copy(update={"prefetch": False}))
    completer.use(engine, family)
    good, texts = 0, []
    for number, (marked, expected) in enumerate(HOLES):
        before, after = marked.split("▮")
        document = Document.open(f"untitled:{number}.py", "python", 0, before + after)
        cursor = Point(before.count("\n"), len(before) - before.rfind("\n") - 1)
        answer = await completer.complete(Snapshot(document, cursor), Trigger.INVOKED)
        texts.append(answer.text)
        good += expected in answer.text
    status = "ok" if good == len(HOLES) else "warning" if good else "error"
    remedy = "" if status == "ok" else "An instruct model, a quantised one, or a wrong template may do that."
    findings.add("suggests", status, f"{good} of {len(HOLES)} known holes filled", remedy, holes=texts)


async def _is_quick(findings: Findings, engine: RemoteEngine) -> None:
    """First token with and without a prompt that the server has read before; time of each further token."""
    tokenizer = engine.model.tokenizer
    # The time, so that no earlier check has left this prompt in the server's memory.
    text = f"# {time.time()}\n{SPEED_TEST_TEXT}"
    tokens = tuple(tokenizer.encode(text)[: min(_PROMPT_TOKENS, engine.model.context // 2)])
    cold_ms, per_token_ms, _ = await _time(engine, tokens[:-2], _DECODED)
    warm = [await _time(engine, tokens[: len(tokens) - cut], 1) for cut in (1, 0)]
    warm_ms = min(ms for ms, _, _ in warm)
    status = "ok" if warm_ms <= _SLOW_FIRST_MS and per_token_ms <= _SLOW_TOKEN_MS else "warning"
    findings.add(
        "quick",
        status,
        f"first token {cold_ms:.0f} ms after {len(tokens) - 2} new tokens, {warm_ms:.0f} ms after one more; "
        f"{per_token_ms:.1f} ms for each further one",
        ""
        if status == "ok"
        else "Most suggestions will come too late for the next key: a GPU, or a smaller model.",
        prompt_tokens=len(tokens) - 2,
        first_token_cold_ms=round(cold_ms, 1),
        first_token_warm_ms=round(warm_ms, 1),
        per_token_ms=round(per_token_ms, 2),
    )
    reused = max(count for _, _, count in warm)
    hits = reused > len(tokens) // 2 or warm_ms < _REUSED_SHARE * cold_ms
    told = f", {reused} of {len(tokens)} tokens by its own account" if reused else ""
    findings.add(
        "prefix cache",
        "ok" if hits else "warning",
        f"{'hits' if hits else 'does not show'}: {warm_ms / cold_ms:.0%} of the time{told}",
        ""
        if hits
        else "Switch it on (vLLM: --enable-prefix-caching; llama.cpp: cache_prompt), or the prompt is short.",
        prefix_cache_hits=hits,
        reused_tokens=reused,
    )


async def _time(engine: RemoteEngine, tokens: Sequence[int], num_new: int) -> tuple[float, float, int]:
    """(ms to the first token, ms for each further one, tokens of the prompt that were reused)."""
    request = Request(tuple(tokens), num_new)
    begun = time.monotonic()
    async with aclosing(engine.generate(request)) as output:
        stamps = [time.monotonic() async for _ in output]
    if not stamps:
        raise EngineError("It wrote nothing after ordinary code.")
    further = (stamps[-1] - stamps[0]) * 1000 / max(request.stats.num_generated - 1, 1)
    return (stamps[0] - begun) * 1000, further, request.stats.num_reused


async def _cancels(findings: Findings, engine: RemoteEngine, served: ServerInfo) -> None:
    """Whether the server stops computing when its client hangs up, by its own account."""
    tokens = tuple(engine.model.tokenizer.encode(SPEED_TEST_TEXT)[:64])
    client = engine.endpoints[0].client
    limit = min(_LONG, engine.model.context - len(tokens) - 1)
    async with aclosing(engine.generate(Request(tokens, limit))) as output:
        await anext(output)
        during = await _num_running(client, served)
    left = time.monotonic()
    if during is None:
        remedy = "llama.cpp: --metrics; vLLM and SGLang have it as long as nothing before them hides it."
        findings.add(
            "cancels", "warning", "it does not tell how many requests it computes (/metrics)", remedy
        )
        return
    after = during
    while after >= during and time.monotonic() - left < _FREED_S:
        after = await _num_running(client, served) or 0
        await asyncio.sleep(0.02)
    took_ms = (time.monotonic() - left) * 1000
    freed = after < during
    findings.add(
        "cancels",
        "ok" if freed else "error",
        f"free {took_ms:.0f} ms after the stream was left"
        if freed
        else f"still computing after {_FREED_S:.0f} s",
        "" if freed else "Something before the server keeps the connection open: a proxy that buffers?",
        cancel_ms=round(took_ms, 1) if freed else None,
    )


async def _num_running(client: httpx2.AsyncClient, served: ServerInfo) -> int | None:
    """How many requests the server says it computes; None if it does not."""
    if served.dialect == "llama.cpp" and isinstance(slots := await ask(client, "/slots"), list):
        return sum(bool(slot.get("is_processing")) for slot in slots if isinstance(slot, dict))
    gauge = _RUNNING.get(served.dialect)
    if gauge is None:
        return None
    answer = await client.get("/metrics")
    rows = re.findall(rf"^{re.escape(gauge)}(?:\{{[^}}]*\}})?\s+([\d.eE+-]+)", answer.text, re.MULTILINE)
    return round(sum(map(float, rows))) if rows else None


def table(findings: Findings) -> Any:
    """For a person: a rich table with advice."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "question", "found", "advice"):
        grid.add_column(title, overflow="fold")
    for one in findings.checks:
        grid.add_row(Text(one.status, colours[one.status]), one.name, one.found, one.remedy)
    return grid
