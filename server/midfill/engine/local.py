"""A model in this process, as the event loop sees it: one thread owns the model and reads a mailbox.

The methods of `LocalEngine` put messages into the mailbox and read tokens from a queue per request. The
engine thread loads the model and then runs `step_loop.StepLoop` until the engine closes. Knows nothing of
editors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from midfill.engine.adapters.loaded import AdapterSwap
from midfill.engine.api import AdapterSource, EngineSpec, ModelInfo, Progress, Request, Token
from midfill.engine.loading import LoadedModel, load
from midfill.engine.runner import DeviceLostError
from midfill.engine.step_loop import ActiveRequest, End, Prewarm, SharedState, StepLoop
from midfill.errors import EngineError, EngineUnavailableError, MidfillError

_LOG = logging.getLogger(__name__)

_SHUT_DOWN = "The model was shut down."

MAX_WAITING = 64
"""Maximum number of waiting requests. One user causes a few; more means that clients do not cancel."""

Load = Callable[[EngineSpec, Progress], LoadedModel]


class _ClosedError(Exception):
    """Unwinds the engine thread when `close` is called while the model loads."""


class LocalEngine:
    """`Engine` for a model in this process.

    Args:
        spec: the model to load, and how to run it.
        load: loads it; tests pass another function.

    Attributes:
        lost: why a model that was loaded serves no longer although nobody closed it; None while it serves.
            Set by whichever thread notices.
        device_lost: whether it was lost with its GPU, so that loading it there again would fail too.
    """

    def __init__(self, spec: EngineSpec, *, load: Load = load) -> None:
        self.lost: str | None = None
        self.device_lost = False
        self._spec = spec
        self._load = load
        self._shared = SharedState()
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()  # set on the loop once the thread is about to return
        self._abandoned = False
        self._loaded: LoadedModel | None = None  # set and cleared by the engine thread
        self._swapping = asyncio.Lock()
        self._open: set[ActiveRequest] = set()  # requests whose iterators are open; the event loop's own

    # On the event loop.

    @property
    def model(self) -> ModelInfo:
        """The running model. Raises `EngineUnavailableError` until `start` has returned."""
        return self._running_model().info

    def _running_model(self) -> LoadedModel:
        """Return the loaded model. Raises `EngineUnavailableError` if there is none."""
        if self._loaded is None or self._shared.unavailable is not None:
            raise EngineUnavailableError(self._shared.unavailable or _SHUT_DOWN)
        return self._loaded

    @property
    def warm_up_s(self) -> float:
        """Duration of the warm-up, a measure of how long a step may take here; 0 before it is known."""
        return 0.0 if self._loaded is None else self._loaded.warm_up_s

    @property
    def step_started_s(self) -> float | None:
        """`time.monotonic()` at the start of the current step, or None while the thread waits for work."""
        return self._shared.step_started_s

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute and no open request. A waiting prewarm does not count."""
        return self._shared.step_started_s is None and not self._open

    async def start(self, progress: Progress) -> None:
        """Start the thread and wait until it has loaded the model; see `Engine.start`."""
        if self._thread is not None or self._shared.closing:
            raise EngineError("An engine can be started only once.")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        engine = threading.Thread(
            target=self._run, args=(progress, loop, ready), name="midfill-engine", daemon=True
        )
        self._thread = engine
        engine.start()
        try:
            await ready
        except asyncio.CancelledError:
            self._shared.closing = True
            raise

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens as they are computed; see `Engine.generate`."""
        self._check_available()
        request.stats.submitted_s = time.monotonic()
        active = ActiveRequest(request, asyncio.get_running_loop())
        self._shared.mailbox.put(active)
        # The thread may have ended since the first check, and have read the mailbox for the last time.
        self._check_available()
        self._open.add(active)
        try:
            while not isinstance(item := await active.inbox.get(), End):
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._open.discard(active)
            active.cancelled = True
            self._shared.mailbox.put(None)  # wakes the thread, which then looks at `cancelled`

    def _check_available(self) -> None:
        if self._shared.unavailable is not None:
            raise EngineUnavailableError(self._shared.unavailable)

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute a prompt when idle; a newer call replaces an older one. See `Engine.prewarm`."""
        if self._shared.unavailable is None:
            self._shared.mailbox.put(Prewarm(list(tokens), adapter, user))

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Have exactly these adapters in the model; see `Adaptable.set_adapters`."""
        # A swap that has begun is completed even if the caller is cancelled.
        await asyncio.shield(self._swap(adapters))

    async def _swap(self, sources: Sequence[AdapterSource]) -> None:
        async with self._swapping:
            adapters = self._running_model().adapters
            loop = asyncio.get_running_loop()
            swap = await asyncio.to_thread(
                adapters.prepare_swap, sources, self._spec.model.path, loop, loop.create_future()
            )
            if swap is None:
                return
            self._shared.mailbox.put(swap)
            self._check_available()  # the thread may have read the mailbox for the last time
            await swap.done
            await asyncio.to_thread(swap.retired.clear)

    async def close(self) -> None:
        """Stop the thread after at most one forward pass and free the model; see also `abandon`."""
        self._shared.closing = True
        self._shared.unavailable = _SHUT_DOWN
        if self._thread is None:
            return
        self._shared.mailbox.put(None)
        await self._ended.wait()
        if not self._abandoned:
            self._thread.join()

    def abandon(self, reason: str) -> None:
        """Give up a thread that hangs: end all requests with `reason`, and do not wait for the thread.

        Nothing can stop a thread; it and its model remain until the pass returns, if it ever does.
        """
        self._abandoned = self._shared.closing = True
        self.lost = self._shared.unavailable = reason
        # The pass may never end, and then its memory on the GPU is never free again.
        self.device_lost = self._loaded is not None and self._loaded.info.device != "cpu"
        for active in self._open:
            active.inbox.put_nowait(EngineUnavailableError(reason))
        self._ended.set()

    # On the engine thread.

    def _run(self, progress: Progress, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> None:
        shared = self._shared
        steps: StepLoop | None = None
        reason = _SHUT_DOWN
        try:
            failure = self._start(progress)
            _call(loop, _resolve, ready, failure)
            if self._loaded is not None:
                steps = StepLoop(shared, self._loaded, max_waiting=MAX_WAITING, speculate=self._spec.drafts)
                steps.run()
        except DeviceLostError as error:
            reason = f"The GPU has failed ({error})."
            self.lost, self.device_lost = self.lost or reason, True
        except BaseException as error:
            _LOG.critical("the engine thread ended", exc_info=True)
            reason = f"The engine stopped after an internal error ({type(error).__name__})."
            self.lost = self.lost or reason
        finally:
            # First refuse new requests, then end those that came before: none can slip between.
            shared.unavailable = shared.unavailable or reason
            shared.step_started_s = None
            if steps is not None:
                steps.refuse_all(shared.unavailable)
            while not shared.mailbox.empty():
                message = shared.mailbox.get()
                if isinstance(message, ActiveRequest):
                    message.send(EngineUnavailableError(shared.unavailable))
                elif isinstance(message, AdapterSwap):
                    message.end(EngineUnavailableError(shared.unavailable))
            self._loaded = None
            _call(loop, self._ended.set)

    def _start(self, progress: Progress) -> MidfillError | None:
        """Load the model. Return the error for the user, or None."""
        shared = self._shared

        def checked(message: str, share: float | None) -> None:
            if shared.closing:
                raise _ClosedError
            progress(message, share)

        failure: MidfillError
        try:
            self._loaded = self._load(self._spec, checked)
        except _ClosedError:
            failure = EngineUnavailableError("The engine was closed while it loaded.")
        except MidfillError as error:
            failure = error
        except MemoryError:
            name = self._spec.model.name
            failure = EngineError(f"There is not enough memory for {name}; choose a smaller model.")
        except ImportError as error:
            failure = EngineError(f"A library for local models is missing: {error}. Install midfill again.")
        except Exception as error:
            _LOG.exception("loading failed")
            failure = EngineError(f"The model could not be loaded: {type(error).__name__}: {error}")
        else:
            shared.unavailable = None
            if shared.closing:  # `close` may have set its own sentence just before
                shared.unavailable = _SHUT_DOWN
            return None
        shared.unavailable = str(failure)
        return failure


def _resolve(future: asyncio.Future[None], error: MidfillError | None) -> None:
    if future.done():  # the waiting task was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Run a function on the event loop. Do nothing if the loop is closed, because then nobody waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
