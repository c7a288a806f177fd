"""Request statistics: the answers that the editor got, and the engine's work for them.

The two are kept apart because they do not match one to one: an answer may need no work; work may serve
several answers or, if cancelled, none. Each piece of work keeps the id of the request that began it. Numbers
and times only, never text; the newest few thousand; available by the request `midfill/costs`. Runs on the
event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from midfill.engine.api import Engine, ModelInfo, Progress, Request, Stats, Token

REQUEST: ContextVar[int | str | float | None] = ContextVar("midfill_request", default=None)
"""The id of the LSP request that is being handled; inherited by the tasks that it starts."""

_NUM_KEPT = 4096
# Pieces of work averaged for tokens/s: enough to be steady, few enough to follow a change.
_NUM_TIMED = 16


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer to a completion request.

    Attributes:
        number: counts answers and work together.
        request: the client's id of the request.
        source, reason: as in `answer.Answer`.
    """

    number: int
    request: int | str | float | None
    source: str
    reason: str | None
    latency_ms: float

    def as_dict(self) -> dict[str, Any]:
        """Return the answer for JSON."""
        return {
            "number": self.number,
            "request": self.request,
            "source": self.source,
            "reason": self.reason,
            "latencyMs": round(self.latency_ms, 2),
        }


@dataclass(slots=True)
class Work:
    """One call of `Engine.generate`. Times are `time.monotonic`: seconds of a clock shared by all processes.

    Attributes:
        number: counts answers and work together.
        request: the id of the LSP request that began it; None if none did.
        idle: no request waited for it when it began.
        stats: the engine's own statistics, which continue after the stream is closed.
        end: None while it runs; then "finished" (by the model), "stopped" (by the reader), "cancelled" or
            "failed".
        num_delivered: tokens that were read.
        first_s, last_s: when the first and the last of them were read.
        left_s: when the stream was closed. The engine is free at `Stats.ended_s`.
    """

    number: int
    request: int | str | float | None
    idle: bool
    stats: Stats
    end: str | None = None
    num_delivered: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    left_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the work for JSON."""
        stats = self.stats
        return {
            "number": self.number,
            "request": self.request,
            "idle": self.idle,
            "end": self.end,
            "promptTokens": stats.num_prompt,
            "reusedTokens": stats.num_reused,
            "computedTokens": stats.num_computed,
            "generatedTokens": stats.num_generated,
            "deliveredTokens": self.num_delivered,
            "submittedS": stats.submitted_s or None,
            "startedS": stats.started_s or None,
            "firstTokenS": self.first_s or None,
            "lastTokenS": self.last_s or None,
            "leftS": self.left_s or None,
            "freedS": stats.ended_s or None,
        }


@dataclass(slots=True)
class RequestStats:
    """The newest answers and the newest work."""

    _answers: deque[Answered] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _work: deque[Work] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def answered(self, source: str, reason: str | None, latency_ms: float) -> None:
        """Note an answer to the request that is being handled."""
        self._answers.append(Answered(next(self._numbers), REQUEST.get(), source, reason, latency_ms))

    def begin(self, request: Request) -> Work:
        """Note the beginning of work for an engine request."""
        work = Work(next(self._numbers), REQUEST.get(), request.idle, request.stats)
        self._work.append(work)
        return work

    def tokens_per_second(self) -> float | None:
        """Return how fast the model has written recently, from first to last token; None if unknown."""
        timed = [work for work in list(self._work)[-_NUM_TIMED:] if work.num_delivered > 1]
        seconds = sum(work.last_s - work.first_s for work in timed)
        return sum(work.num_delivered - 1 for work in timed) / seconds if seconds > 0 else None

    def after(self, number: int) -> dict[str, Any]:
        """Return, for JSON, the answers and the work with greater numbers; running work as it is now."""
        return {
            "answers": [answer.as_dict() for answer in self._answers if answer.number > number],
            "work": [work.as_dict() for work in self._work if work.number > number],
        }


class InstrumentedEngine:
    """An engine that notes its work in `RequestStats`."""

    def __init__(self, engine: Engine, request_stats: RequestStats) -> None:
        self._engine = engine
        self._request_stats = request_stats

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._engine.model

    async def start(self, progress: Progress) -> None:
        """Start the engine."""
        await self._engine.start(progress)

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Generate tokens, and note the work."""
        work = self._request_stats.begin(request)
        end = "failed"
        try:
            async with aclosing(self._engine.generate(request)) as tokens:
                async for token in tokens:
                    work.last_s = time.monotonic()
                    work.first_s = work.first_s or work.last_s
                    work.num_delivered += 1
                    yield token
            end = "finished"
        except asyncio.CancelledError:
            end = "cancelled"
            raise
        except GeneratorExit:
            end = "stopped"
            raise
        finally:
            work.left_s = time.monotonic()
            work.end = end

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Read tokens ahead; not noted, since nothing is generated."""
        self._engine.prewarm(tokens, adapter, user=user)

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()


def stages(begun: float, built: float, stats: Stats, written: float) -> tuple[tuple[str, float], ...]:
    """Return (name, milliseconds) for each stage of asking the model that was reached."""
    begins = (
        ("prompt", begun),
        ("queue", built),
        ("prefill", stats.started_s),
        ("decode", stats.first_token_s),
        ("clean-up", written),
    )
    come_to = [(name, at) for name, at in begins if at]
    ends = [at for _, at in come_to[1:]] + [time.monotonic()]
    return tuple((name, (end - at) * 1000) for (name, at), end in zip(come_to, ends, strict=True))
