"""Restart a local engine when a pass hangs or its thread dies.

A `LocalEngine` is one thread and one model; it can lose both. The supervisor keeps the engine contract around
one of them at a time. When it is lost, its requests fail at once and a new one is loaded in the background;
until it is ready, requests fail with a message that says so. Restarts are limited, because a fault that
returns after each of them would keep the machine busy with loading. Knows nothing of tensors. Runs on the
event loop; a timer exists only while there is work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from midfill.engine.api import AdapterSource, ModelInfo, Progress, Request, Token
from midfill.engine.local import LocalEngine
from midfill.errors import EngineUnavailableError

_LOG = logging.getLogger(__name__)

_GRACE = 0.1
"""A late pass is checked again after this share of its limit: it ends if the process was only suspended."""

_SLOW = 20
"""A pass may take this many times the warm-up: other programs can slow passes down that much."""

_RESTARTING = "The model is being restarted after a fault; try again in a moment."

_MAX_RESTARTS = 3
_WINDOW_S = 600.0


class Supervisor:
    """`Engine` for a model in this process that is loaded again when it is lost.

    Args:
        make: makes an engine that is not started.
        on_cpu: makes one that uses no GPU, for when that has failed; None if there is no GPU to lose.
        step_limit_s: a forward pass that takes longer is hung. A model whose passes are slow gets more time.
    """

    def __init__(
        self,
        make: Callable[[], LocalEngine],
        *,
        on_cpu: Callable[[], LocalEngine] | None = None,
        step_limit_s: float = 10.0,
    ) -> None:
        self._make = make
        self._on_cpu = on_cpu
        self._step_limit_s = step_limit_s
        self._engine = make()
        self._model: ModelInfo | None = None
        self._adapters: tuple[AdapterSource, ...] = ()
        self._timer: asyncio.TimerHandle | None = None
        self._late: float | None = None  # start of the step that was late at the last check
        self._restart: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)  # when they began
        self._given_up: LocalEngine | None = None  # the engine that was lost when no restart was left
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        """The running model; unchanged until a restart is complete. See `Engine.model`."""
        if self._model is None or self._closed:
            return self._engine.model
        return self._model

    async def start(self, progress: Progress) -> None:
        """Load the model; see `Engine.start`. A model that cannot be loaded is not tried again."""
        await self._engine.start(progress)
        self._model = self._engine.model

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens as they are computed; see `Engine.generate`."""
        engine = self._serving()
        self._watch()
        try:
            async with aclosing(engine.generate(request)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            if engine.lost is not None:
                self._recover(engine)

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute a prompt when idle; see `Engine.prewarm`."""
        self._engine.prewarm(tokens, adapter, user=user)
        self._watch()

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Have exactly these adapters in the model, also after a restart; see `Adaptable.set_adapters`."""
        await self._serving().set_adapters(adapters)
        self._adapters = tuple(adapters)

    async def close(self) -> None:
        """Stop; see `Engine.close`. Wait for a hung pass no longer than its limit."""
        self._closed = True
        # This may be an engine that is loading; its restart then ends by itself.
        await self._engine.close()
        if self._restart is not None:
            await self._restart
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _serving(self) -> LocalEngine:
        """Return the engine to use. Raises `EngineUnavailableError` if there is none, and starts one."""
        engine = self._engine
        if engine.lost is not None and not self._closed:
            raise EngineUnavailableError(self._recover(engine))
        if self._restart is not None and not self._closed:
            raise EngineUnavailableError(_RESTARTING)
        return engine

    # Detecting a hung pass.

    def _watch(self) -> None:
        """Check the engine after the limit, unless a check is scheduled already."""
        if self._timer is None:
            self._schedule_check(self._limit_s)

    def _schedule_check(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check)

    @property
    def _limit_s(self) -> float:
        return max(self._step_limit_s, _SLOW * self._engine.warm_up_s)

    def _check(self) -> None:
        self._timer = None
        engine = self._engine
        if engine.lost is not None:
            self._recover(engine)
        if engine.lost is not None or engine.idle:
            return
        began = engine.step_started_s
        age = 0.0 if began is None else time.monotonic() - began
        if age < self._limit_s:
            self._schedule_check(self._limit_s - age)
        elif self._late != began:
            self._late = began
            self._schedule_check(_GRACE * self._limit_s)
        else:
            _LOG.critical("a forward pass has not ended after %.1f s; its thread is abandoned", age)
            engine.abandon(f"The model hung: one step took longer than {self._limit_s:.0f} s.")
            self._recover(engine)

    # Restarting.

    def _recover(self, engine: LocalEngine) -> str:
        """Start to replace a lost engine, if that is allowed. Return the message for the user."""
        if engine is not self._engine or self._restart is not None or self._closed:
            return _RESTARTING
        now = time.monotonic()
        if len(self._restarts) == _MAX_RESTARTS and now - self._restarts[0] < _WINDOW_S:
            why = (
                f"{engine.lost} It was restarted {_MAX_RESTARTS} times within {_WINDOW_S / 60:.0f} minutes "
                "and will not be restarted for a while. See the log; restart midfill or choose another model."
            )
            if self._given_up is not engine:
                self._given_up = engine
                _LOG.critical("%s", why)
            return why
        self._restarts.append(now)
        self._restart = asyncio.get_running_loop().create_task(self._replace(engine))
        if engine.device_lost and self._on_cpu is not None:
            return f"{engine.lost} The model is being loaded on the CPU; try again in a moment."
        return f"{engine.lost} It is being restarted; try again in a moment."

    async def _replace(self, lost: LocalEngine) -> None:
        _LOG.error("the engine is restarted: %s", lost.lost)
        began = time.monotonic()
        try:
            await lost.close()  # A thread that died frees its model before the next one is loaded.
            if self._closed:
                return
            if lost.device_lost and self._on_cpu is not None:
                self._make = self._on_cpu  # until midfill is restarted
            self._engine = self._make()
            await self._engine.start(lambda _message, _share: None)
            await self._engine.set_adapters(self._adapters)
        except Exception as error:
            # The next request tries again, as long as that is allowed.
            self._engine.lost = f"The model could not be restarted: {error}"
            if not self._closed:
                _LOG.error("%s", self._engine.lost)
        else:
            self._model = self._engine.model
            _LOG.warning(
                "the engine is ready again on %s after %.1f s", self._model.device, time.monotonic() - began
            )
        finally:
            self._restart = None
