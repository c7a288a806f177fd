"""Use the local model while the server is unreachable, if the user asked for that (`engine_fallback`).

Prompts are made for one vocabulary, so the local model must have the vocabulary of the server's model. It is
loaded in the background when the server is unreachable for the first time, and stays loaded. Runs on the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing

from midfill.engine.api import Adaptable, AdapterSource, Engine, ModelInfo, Progress, Request, Token
from midfill.engine.remote.client.detection import vocabulary_of
from midfill.errors import EngineOverloadedError, EngineUnavailableError, MidfillError, ModelError

_TRY_S = 30.0
"""How long to wait before trying a server again that was unreachable at the start."""

_LOG = logging.getLogger(__name__)


class FallbackEngine:
    """`Engine`: the first one while it answers, else the second.

    Args:
        first: the server's engine.
        make_second: makes the local one; may be slow, runs in a thread.
    """

    def __init__(self, first: Engine, make_second: Callable[[], Engine]) -> None:
        self._first = first
        self._make_second = make_second
        self._reached = False
        self._tried_s = 0.0
        self._second: Engine | None = None
        self._failure: str | None = None  # why the second cannot be used
        self._task: asyncio.Task[None] | None = None
        self._model: ModelInfo | None = None
        self._adapters: tuple[AdapterSource, ...] = ()

    @property
    def model(self) -> ModelInfo:
        """The model that prompts are made for; see `Engine.model`."""
        if self._model is None:
            raise EngineUnavailableError("The engine has not been reached yet.")
        return self._model

    async def start(self, progress: Progress) -> None:
        """Reach the first engine, or else load the second. See `Engine.start`."""
        self._tried_s = time.monotonic()
        try:
            await self._first.start(progress)
        except EngineUnavailableError as error:
            _LOG.warning("%s The local model is loaded instead (`engine_fallback`).", error)
            second = await asyncio.to_thread(self._make_second)
            self._second = second
            await second.start(progress)
            self._model = second.model
        else:
            self._reached = True
            self._model = self._first.model

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens, all of them from one of the engines; see `Engine.generate`."""
        why = "The engine has not been reached."
        begun = False
        if self._reached:
            try:
                async with aclosing(self._first.generate(request)) as tokens:
                    async for token in tokens:
                        begun = True
                        yield token
            except (EngineUnavailableError, EngineOverloadedError) as error:
                if begun:
                    raise
                why = str(error)
            else:
                return
        elif time.monotonic() - self._tried_s > _TRY_S:
            self._begin(self._reach())
        if self._second is None:
            self._begin(self._load())
            raise EngineUnavailableError(
                f"{why} {self._failure or 'The local model is being loaded instead.'}"
            )
        async with aclosing(self._second.generate(request)) as tokens:
            async for token in tokens:
                yield token

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute a prompt on the engine in use; see `Engine.prewarm`."""
        engine = self._first if self._reached else self._second
        if engine is not None:
            engine.prewarm(tokens, adapter, user=user)

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Set the adapters of both engines, of the second once it is loaded; see `Adaptable.set_adapters`."""
        for engine in (self._first, self._second):
            if isinstance(engine, Adaptable):
                await engine.set_adapters(adapters)
        self._adapters = tuple(adapters)

    async def close(self) -> None:
        """Close both engines; see `Engine.close`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._first.close()
        if self._second is not None:
            await self._second.close()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(work)
        else:
            work.close()

    async def _reach(self) -> None:
        """Try the first engine again, which was unreachable at the start."""
        self._tried_s = time.monotonic()
        try:
            await self._first.start(lambda _message, _share: None)
            self._reached = self._second is not None and await _same(self._first, self._second)
        except MidfillError as error:
            _LOG.info("%s", error)

    async def _load(self) -> None:
        """Load the second engine, once."""
        if self._failure is not None:
            return
        second: Engine | None = None
        try:
            second = await asyncio.to_thread(self._make_second)
            await second.start(lambda _message, _share: None)
            if not await _same(self._first, second):
                raise ModelError("`model` and the model of the server have different vocabularies.")
            if self._adapters and isinstance(second, Adaptable):
                await second.set_adapters(self._adapters)
            self._second, second = second, None
        except MidfillError as error:
            self._failure = f"`engine_fallback` cannot be used: {error}"
        finally:
            if second is not None:
                await second.close()
        if self._failure is not None:
            _LOG.warning("%s", self._failure)


async def _same(one: Engine, other: Engine) -> bool:
    """Return whether a prompt for one engine's model is valid for the other's."""
    pair = [await asyncio.to_thread(vocabulary_of, engine.model.tokenizer) for engine in (one, other)]
    return pair[0] == pair[1]
