"""The checks of `midfill engine check URL`: if a model server is suitable for completion while typing.

Uses it as the language server would: the same detection, prompts, probe and cancellation. Sends made-up code
only. Every finding that is not "ok" names its remedy.
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

from midfill.cli.doctor_checks import HOLES, SPEED_TEST_TEXT, Check
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
"""If the prefix is reused, a prompt with another last token takes at most this share of the cold time."""

# Prometheus gauge of the number of running requests, for each kind of server.
_RUNNING = {
    "vllm": "vllm:num_requests_running",
    "sglang": "sglang:num_running_reqs",
    "llama.cpp": "llamacpp:requests_processing",
    "midfill": "midfill_requests_running",
}


@dataclass(slots=True)
class Findings:
    """The findings: as sentences for people, and as values for `--json`.

    Attributes:
        checks: in the order in which they were made.
        numbers: milliseconds, tokens and names.
    """

    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, status: str, found: str, remedy: str = "", **numbers: Any) -> None:
        """Add a finding."""
        self.checks.append(Check(name, status, found, remedy))
        self.numbers |= numbers

    @property
    def passed(self) -> bool:
        """Return True if the server can be used."""
        return all(check.status != "error" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "passed": self.passed,
            "checks": [check.as_dict() for check in self.checks],
            "numbers": self.numbers,
        }


async def check(engine: RemoteEngine, settings: Settings) -> Findings:
    """Start the engine, run all checks and close it. A failed check is a finding, not an exception."""
    findings = Findings()
    try:
        begun = time.monotonic()
        await engine.start(lambda _message, _share: None)
        served = engine.endpoints[0].served
        if served is None:
            raise EngineUnavailableError("The kind of server was not recognised.")
        _reached(findings, engine, served, (time.monotonic() - begun) * 1000)
        family = await _fills_in(findings, engine, settings)
        if family is not None:
            await _suggests(findings, engine, settings, family)
        await _is_quick(findings, engine)
        await _cancels(findings, engine, served)
    except MidfillError as error:
        name = "reachable" if not findings.checks else "asked"
        findings.add(name, "error", str(error), "Check the URL and the server's log.")
    finally:
        await engine.close()
    return findings


def _reached(findings: Findings, engine: RemoteEngine, served: ServerInfo, ms: float) -> None:
    endpoint = engine.endpoints[0]
    unencrypted = endpoint.url.startswith("http://") and not is_loopback(endpoint.url)
    findings.add(
        "reachable",
        "warning" if unencrypted else "ok",
        f"{served.kind.title} at {endpoint.address}, recognised in {ms:.0f} ms",
        "Your code is sent unencrypted. Put a TLS proxy in front of the server." if unencrypted else "",
        url=endpoint.url,
        kind=served.dialect,
        recognised_ms=round(ms, 1),
    )
    text = isinstance(engine.model.tokenizer, TextTokenizer)
    how = "as text, because its vocabulary is not on this machine" if text else "as token ids"
    remedy = "For exact prompts, download a model of the same family: midfill model pull NAME" if text else ""
    findings.add(
        "model",
        "warning" if text and served.kind.takes_ids else "ok",
        f"{served.model}, context of {served.context} tokens; prompts are sent {how}",
        remedy if served.kind.takes_ids else "",
        model=served.model,
        context=served.context,
        token_ids=not text,
    )


async def _fills_in(
    findings: Findings, engine: RemoteEngine, settings: Settings
) -> tuple[str, Family] | None:
    """Probe if the model was trained for fill-in-the-middle. Return its family, or None."""
    try:
        name, family = await identify(engine, settings.family)
    except EngineError:
        raise
    except MidfillError as error:
        findings.add(
            "fills in",
            "error",
            str(error),
            "Serve a base model of a known FIM family. To list them: midfill eval families",
        )
        return None
    if not family.middle:
        findings.add("fills in", "ok", f"{name}; not probed, because its server builds the prompts")
        return name, family
    found = await probe(engine, family)
    scores = ", ".join(f"{layout} {score:.2f}" for layout, score in found.scores.items())
    what = (
        f"{name}; log-loss of known middles in nats per character: {scores}, prefix alone {found.alone:.2f}"
    )
    remedy = (
        ""
        if found.agrees(family)
        else "The model is not of that family, or its server reports no log-probabilities."
    )
    findings.add(
        "fills in", "ok" if not remedy else "warning", what, remedy, family=name, probe=found.as_dict()
    )
    return name, family


async def _suggests(
    findings: Findings, engine: RemoteEngine, settings: Settings, family: tuple[str, Family]
) -> None:
    """Check that the completion pipeline fills known holes with this model."""
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
    remedy = (
        ""
        if status == "ok"
        else "Likely causes: an instruct model, strong quantization or a wrong FIM template."
    )
    findings.add("suggests", status, f"{good} of {len(HOLES)} known holes filled", remedy, holes=texts)


async def _is_quick(findings: Findings, engine: RemoteEngine) -> None:
    """Measure the first token with a cold and with a warm prompt cache, and the time per further token."""
    tokenizer = engine.model.tokenizer
    # The time makes the prompt new: an earlier check cannot have left it in the server's cache.
    text = f"# {time.time()}\n{SPEED_TEST_TEXT}"
    tokens = tuple(tokenizer.encode(text)[: min(_PROMPT_TOKENS, engine.model.context // 2)])
    cold_ms, per_token_ms, _ = await _time(engine, tokens[:-2], _DECODED)
    warm = [await _time(engine, tokens[: len(tokens) - cut], 1) for cut in (1, 0)]
    warm_ms = min(ms for ms, _, _ in warm)
    status = "ok" if warm_ms <= _SLOW_FIRST_MS and per_token_ms <= _SLOW_TOKEN_MS else "warning"
    findings.add(
        "quick",
        status,
        f"first token {cold_ms:.0f} ms after {len(tokens) - 2} new tokens, {warm_ms:.0f} ms after one; "
        f"{per_token_ms:.1f} ms per further token",
        ""
        if status == "ok"
        else "Most suggestions will come after the next key. Use a GPU or a smaller model.",
        prompt_tokens=len(tokens) - 2,
        first_token_cold_ms=round(cold_ms, 1),
        first_token_warm_ms=round(warm_ms, 1),
        per_token_ms=round(per_token_ms, 2),
    )
    reused = max(count for _, _, count in warm)
    hits = reused > len(tokens) // 2 or warm_ms < _REUSED_SHARE * cold_ms
    told = f"; the server reports {reused} of {len(tokens)} tokens reused" if reused else ""
    findings.add(
        "prefix cache",
        "ok" if hits else "warning",
        f"{'works' if hits else 'no effect'}: a warm prompt takes {warm_ms / cold_ms:.0%} of the time{told}",
        ""
        if hits
        else "Enable it (vLLM: --enable-prefix-caching; llama.cpp: cache_prompt) unless prompts are short.",
        prefix_cache_hits=hits,
        reused_tokens=reused,
    )


async def _time(engine: RemoteEngine, tokens: Sequence[int], num_new: int) -> tuple[float, float, int]:
    """Return (ms to the first token, ms per further token, number of prompt tokens reused)."""
    request = Request(tuple(tokens), num_new)
    begun = time.monotonic()
    async with aclosing(engine.generate(request)) as output:
        stamps = [time.monotonic() async for _ in output]
    if not stamps:
        raise EngineError("The server generated nothing for ordinary code.")
    further = (stamps[-1] - stamps[0]) * 1000 / max(request.stats.num_generated - 1, 1)
    return (stamps[0] - begun) * 1000, further, request.stats.num_reused


async def _cancels(findings: Findings, engine: RemoteEngine, served: ServerInfo) -> None:
    """Check by the server's own metrics that it stops computing when its client hangs up."""
    tokens = tuple(engine.model.tokenizer.encode(SPEED_TEST_TEXT)[:64])
    client = engine.endpoints[0].client
    limit = min(_LONG, engine.model.context - len(tokens) - 1)
    async with aclosing(engine.generate(Request(tokens, limit))) as output:
        await anext(output)
        during = await _num_running(client, served)
    left = time.monotonic()
    if during is None:
        remedy = "Make /metrics reachable (llama.cpp: add --metrics; vLLM and SGLang: look at the proxy)."
        found = "unknown: the server does not report its number of running requests (/metrics)"
        findings.add("cancels", "warning", found, remedy)
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
        f"stops {took_ms:.0f} ms after the client hangs up"
        if freed
        else f"still computing {_FREED_S:.0f} s after the client hung up",
        "" if freed else "Likely cause: a buffering proxy in front of the server keeps the connection open.",
        cancel_ms=round(took_ms, 1) if freed else None,
    )


async def _num_running(client: httpx2.AsyncClient, served: ServerInfo) -> int | None:
    """Return the server's number of running requests; None if it does not report it."""
    if served.dialect == "llama.cpp" and isinstance(slots := await ask(client, "/slots"), list):
        return sum(bool(slot.get("is_processing")) for slot in slots if isinstance(slot, dict))
    gauge = _RUNNING.get(served.dialect)
    if gauge is None:
        return None
    answer = await client.get("/metrics")
    rows = re.findall(rf"^{re.escape(gauge)}(?:\{{[^}}]*\}})?\s+([\d.eE+-]+)", answer.text, re.MULTILINE)
    return round(sum(map(float, rows))) if rows else None


def table(findings: Findings) -> Any:
    """Return a rich table of the findings and remedies."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "finding", "remedy"):
        grid.add_column(title, overflow="fold")
    for one in findings.checks:
        grid.add_row(Text(one.status, colours[one.status]), one.name, one.found, one.remedy)
    return grid
