"""The model of a server: loaded when needed, unloaded when idle, with all clients' adapters, and metrics.

Knows no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from midfill.engine.api import MAX_ADAPTERS, Adaptable, AdapterSource, Engine, ModelInfo, Stats
from midfill.engine.remote.client.detection import vocabulary_of
from midfill.errors import AdapterError, MidfillError

_LOG = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Report = dict[str, Any]

Infill = Callable[[ModelInfo, str, str], tuple[Sequence[int], frozenset[int]]]
"""Converts the texts before and after a hole to a prompt: its ids, and ids that end the hole's text.

Raises `ModelError` if the model was not trained for that. Called in threads.
"""


class HostMetrics:
    """Metrics for Prometheus. Numbers only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "midfill_requests", "Requests by how they ended.", ["end"], registry=self.registry
        )
        self.running = Gauge("midfill_requests_running", "Requests under way.", registry=self.registry)
        self.loaded = Gauge("midfill_model_loaded", "Whether the model is in memory.", registry=self.registry)
        self.tokens = Counter("midfill_tokens", "Tokens by what was done.", ["kind"], registry=self.registry)
        self.first = Histogram(
            "midfill_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def account(self, stats: Stats, end: str) -> None:
        """Record a finished request."""
        self.requests.labels(end).inc()
        self.tokens.labels("computed").inc(stats.num_computed)
        self.tokens.labels("reused").inc(stats.num_reused)
        self.tokens.labels("generated").inc(stats.num_generated)
        if stats.first_token_s:
            self.first.observe(max(stats.first_token_s - stats.submitted_s, 0.0))


@dataclass(slots=True)
class ModelHost:
    """The model, in memory while it is needed.

    Attributes:
        make_engine: makes an engine that is not started; may be slow, runs in a thread.
        unload_s: seconds without a request after which the model is unloaded; 0 for never.
        exit_s: seconds without a request after which the process may end; 0 for never.
        on_exit: called then.
        adapters: adapters that are always in the model, each listed as a model.
        infill: see `Infill`; None if infilling is not offered.
        vocabulary: digest of the model's vocabulary; computed when it is loaded for the first time.
        num_ids: size of the vocabulary.
        report: the progress of loading.
    """

    make_engine: Callable[[], Engine]
    unload_s: float = 0.0
    exit_s: float = 0.0
    on_exit: Callable[[], None] = lambda: None
    adapters: tuple[AdapterSource, ...] = ()
    infill: Infill | None = None
    metrics: HostMetrics = field(default_factory=HostMetrics)
    engine: Engine | None = None
    vocabulary: str = ""
    num_ids: int = 0
    report: Report = field(default_factory=lambda: {"message": "starting", "share": None})
    _wanted: dict[str, tuple[AdapterSource, ...]] = field(default_factory=dict)  # by client
    _pids: dict[str, int] = field(default_factory=dict)  # of these clients' processes
    _adapting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _loading: asyncio.Task[Engine] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: asyncio.Task[None] | None = None  # of an engine that is being unloaded
    _num_running: int = 0
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)

    async def load(self) -> Engine:
        """Return the engine, loaded if necessary. Raises `MidfillError`; the next call tries again."""
        if self.engine is not None:
            return self.engine
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load())
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._loading)

    async def _load(self) -> Engine:
        try:
            if self._closing is not None:
                # There may not be memory for two models. Cancelling this wait must not cancel the closing.
                await asyncio.wait([self._closing])
            engine = await asyncio.to_thread(self.make_engine)
            try:
                await self._make_ready(engine)
            except BaseException:
                await engine.close()
                raise
        finally:
            self._loading = None
        self.engine = engine
        self.metrics.loaded.set(1)
        self.touch()
        return engine

    async def _make_ready(self, engine: Engine) -> None:
        """Load the model with the known adapters, and record its vocabulary."""
        loop = asyncio.get_running_loop()

        def report(message: str, share: float | None) -> None:
            loop.call_soon_threadsafe(self._tell, message, share)

        await engine.start(report)
        if isinstance(engine, Adaptable) and (wanted := self.known_adapters):
            await engine.set_adapters(wanted)
        self.num_ids = len(engine.model.tokenizer.vocab_bytes())
        if not self.vocabulary:
            self.vocabulary = await asyncio.to_thread(vocabulary_of, engine.model.tokenizer)

    async def want(self, client: str, adapters: Sequence[AdapterSource], *, pid: int = 0) -> None:
        """Put a client's adapters into the model, beside those of other clients.

        If there is no room, adapters of clients whose process has ended are removed.

        Raises `AdapterError`, and changes nothing, if they cannot be used or are too many.
        """
        async with self._adapting:
            # The model may have been unloaded while this waited for the lock.
            engine = await self.load()
            self.enter()  # keeps the model in memory
            try:
                await self._put_in(engine, client, adapters)
            finally:
                self.leave()
            self._pids = {name: number for name, number in self._pids.items() if name in self._wanted}
            self._pids[client] = pid

    async def _put_in(self, engine: Engine, client: str, adapters: Sequence[AdapterSource]) -> None:
        others = {name: wanted for name, wanted in self._wanted.items() if name != client}
        wanted = others | ({client: tuple(adapters)} if adapters else {})
        together = _each_once(self.adapters, wanted)
        if len(together) > MAX_ADAPTERS:
            # A client that was killed has not removed its adapters.
            wanted = {
                name: those
                for name, those in wanted.items()
                if name == client or _lives(self._pids.get(name, 0))
            }
            together = _each_once(self.adapters, wanted)
        if len(together) > MAX_ADAPTERS:
            raise AdapterError(
                f"All clients together use {len(together)} adapters; the maximum is {MAX_ADAPTERS}."
            )
        if not isinstance(engine, Adaptable):
            raise AdapterError("This engine does not support adapters.")
        await engine.set_adapters(together)
        self._wanted = wanted

    @property
    def known_adapters(self) -> list[AdapterSource]:
        """The adapters that are in the model, or will be once it is loaded."""
        return _each_once(self.adapters, self._wanted)

    def _tell(self, message: str, share: float | None) -> None:
        self.report = {"message": message, "share": share}
        self._news.set()
        self._news = asyncio.Event()

    async def progress(self) -> AsyncGenerator[Report, None]:
        """Yield the progress of loading, at the end {"ready": true} or {"error": sentence}."""
        loading = asyncio.ensure_future(self.load())
        self.enter()
        try:
            while not loading.done():
                # First the event, then the report, so that none is missed while this one is sent.
                news = asyncio.ensure_future(self._news.wait())
                try:
                    yield self.report
                    await asyncio.wait([loading, news], return_when="FIRST_COMPLETED")
                finally:
                    news.cancel()
            await loading
        except MidfillError as error:
            yield {"error": str(error), "kind": type(error).__name__}
        else:
            yield {"ready": True}
        finally:
            # The client may have disconnected; the model is loaded all the same.
            loading.cancel()
            self.leave()

    def enter(self) -> None:
        """Record that a request begins."""
        self._num_running += 1
        self.metrics.running.set(self._num_running)
        self._stop_timers()

    def leave(self) -> None:
        """Record that a request ends."""
        self._num_running -= 1
        self.metrics.running.set(self._num_running)
        self.touch()

    def touch(self) -> None:
        """Restart the idle timers."""
        self._stop_timers()
        if self._num_running:
            return
        loop = asyncio.get_running_loop()
        if self.unload_s and self.engine is not None:
            self._timers.append(loop.call_later(self.unload_s, self._unload))
        if self.exit_s:
            self._timers.append(loop.call_later(self.exit_s, self.on_exit))

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _unload(self) -> None:
        """Free the model's memory; the next request loads it again."""
        engine, self.engine = self.engine, None
        if engine is not None:
            _LOG.info("the model is unloaded")
            self.metrics.loaded.set(0)
            self._closing = asyncio.get_running_loop().create_task(engine.close())

    async def close(self) -> None:
        """Free the model."""
        self._stop_timers()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self.engine is not None:
            await self.engine.close()
        if self._closing is not None:
            await self._closing


def _lives(pid: int) -> bool:
    """Return whether the process exists; a client that has not sent its process id counts as alive."""
    return not pid or psutil.pid_exists(pid)


def _each_once(
    always: Sequence[AdapterSource], wanted: Mapping[str, Sequence[AdapterSource]]
) -> list[AdapterSource]:
    """Return the adapters that are always there and those that any client wants, without duplicates."""
    return list({one.key: one for adapters in (always, *wanted.values()) for one in adapters}.values())
