"""A model on this machine: one thread that owns it, a mailbox, the step loop, cancellation.

The event loop's side (`start`, `generate`, `prewarm`, `close`) only puts messages into the mailbox and reads
tokens from a queue of its own. The engine thread loads the model, and then, step by step: reads the
mailbox, drops cancelled requests, runs the forward pass that the scheduler planned, sends out tokens.
So a cancelled request costs at most the pass that is under way, or a part of it, if the runner asks in the
middle whether anybody wants the rest. Knows nothing of editors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from midfill.engine.adapters.loaded import AdapterSwap
from midfill.engine.api import AdapterSource, EngineSpec, ModelInfo, Progress, Request, TextStream, Token
from midfill.engine.kv_slots import NUM_SLOTS, Slots
from midfill.engine.loading import LoadedModel, load
from midfill.engine.scheduler import Choice, Chunk, Priority, Scheduler, SequenceState
from midfill.engine.speculation import NgramProposer
from midfill.errors import EngineError, EngineOverloadedError, EngineUnavailableError, MidfillError

_LOG = logging.getLogger(__name__)

_SHUT_DOWN = "The model was shut down."

MAX_WAITING = 64
"""Requests that may wait. One person causes at most a few; more means that clients do not cancel."""

_PAUSE_S = 0.5
"""Without a message for so long, nobody types: most keys come within 0.2 s of the one before."""

Load = Callable[[EngineSpec, Progress], LoadedModel]


class _End:
    """The end of an output, in a active's inbox."""


_END = _End()


@dataclass(slots=True, eq=False)
class _ActiveRequest:
    """A request under way: what the two threads share of it.

    `cancelled` is written by the event loop and read by the engine thread, `inbox` the other way round;
    the rest belongs to the engine thread.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[Token | BaseException | _End] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    sequence: SequenceState | None = None
    stop_ids: frozenset[int] = frozenset()
    stream: TextStream | None = None
    forced_prefix: bytes = b""  # what is left of `forced_prefix`
    allowed: array[int] | None = None  # the ids that agree with it
    draft_context: int = 0  # see `NgramProposer.guess`

    def push(self, token: int) -> str:
        """The characters that a token completes."""
        return "" if self.stream is None else self.stream.push(token)

    def send(self, item: Token | BaseException | _End) -> None:
        """Engine thread: hand an item to the event loop."""
        try:
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, item)
        except RuntimeError:  # the loop is closed, and with it whoever waited
            self.cancelled = True


@dataclass(frozen=True, slots=True)
class _Prewarm:
    """A prompt to compute when nothing else is to be done."""

    tokens: list[int]
    adapter: str | None
    user: str


class _ClosedError(Exception):
    """Unwinds the engine thread when `close` comes while it loads."""


class LocalEngine:
    """`Engine` for a model in this process.

    Args:
        spec: which model.
        load: loads it; another one is given in tests.

    Attributes:
        turn_started_s: `time.monotonic()` when the turn under way began (a forward pass, as a rule), or
            None while the thread waits for work. Read by whoever watches for a pass that never ends.
        lost: why a model that was loaded serves no more though nobody closed it; None while it does.
        mailbox: to the engine thread; None only wakes it.
        closing: tells the engine thread to end.
    """

    def __init__(self, spec: EngineSpec, *, load: Load = load) -> None:
        self.turn_started_s: float | None = None
        self.lost: str | None = None
        self._spec = spec
        self._load = load
        self.mailbox: SimpleQueue[_ActiveRequest | _Prewarm | AdapterSwap | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()  # set on the loop once the thread is about to return
        self.closing = False
        self._abandoned = False
        self._unavailable: str | None = "The model is not loaded yet."
        self._loaded: LoadedModel | None = None
        self._swapping = asyncio.Lock()
        self._open: set[_ActiveRequest] = set()  # those whose iterators are open; the event loop's own

    # The event loop's side.

    @property
    def model(self) -> ModelInfo:
        """The running model. Raises `EngineUnavailableError` until `start` has returned."""
        if self._loaded is None or self._unavailable is not None:
            raise EngineUnavailableError(self._unavailable or "The model is not loaded yet.")
        return self._loaded.info

    @property
    def warm_up_s(self) -> float:
        """How long a turn may well take on this machine: that of the warm-up. 0 before it is known."""
        return 0.0 if self._loaded is None else self._loaded.warm_up_s

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute and nobody waits. A prewarm that waits does not count."""
        return self.turn_started_s is None and not self._open

    async def start(self, progress: Progress) -> None:
        """Start the thread and wait until it has loaded the model; see `Engine.start`."""
        if self._thread is not None or self.closing:
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
            self.closing = True
            raise

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Tokens as they are computed; see `Engine.generate`."""
        if self._unavailable is not None:
            raise EngineUnavailableError(self._unavailable)
        request.stats.submitted_s = time.monotonic()
        active = _ActiveRequest(request, asyncio.get_running_loop())
        self.mailbox.put(active)
        if self._unavailable is not None:
            # The thread ended between the two lines; it may have read the mailbox for the last time.
            raise EngineUnavailableError(self._unavailable)
        self._open.add(active)
        try:
            while not isinstance(item := await active.inbox.get(), _End):
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._open.discard(active)
            active.cancelled = True
            self.mailbox.put(None)  # wakes the thread, which then looks at the flags

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute a prompt when idle; a newer call replaces an older one. See `Engine.prewarm`."""
        if self._unavailable is None:
            self.mailbox.put(_Prewarm(list(tokens), adapter, user))

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Have these adapters in the model; see `Adaptable.set_adapters`."""
        # What was begun is brought to its end, whoever waits for it.
        await asyncio.shield(self._swap(adapters))

    async def _swap(self, sources: Sequence[AdapterSource]) -> None:
        async with self._swapping:
            loaded = self._loaded
            if loaded is None or self._unavailable is not None:
                raise EngineUnavailableError(self._unavailable or _SHUT_DOWN)
            loop = asyncio.get_running_loop()
            ready = loaded.adapters.ready
            swap = await asyncio.to_thread(ready, sources, self._spec.model.path, loop, loop.create_future())
            if swap is None:
                return
            self.mailbox.put(swap)
            if self._unavailable is not None:  # the thread may have read the mailbox for the last time
                raise EngineUnavailableError(self._unavailable)
            await swap.done
            await asyncio.to_thread(swap.retired.clear)

    async def close(self) -> None:
        """Stop the thread after at most one forward pass and free the model; see also `abandon`."""
        self.closing = True
        self._unavailable = _SHUT_DOWN
        if self._thread is None:
            return
        self.mailbox.put(None)
        await self._ended.wait()
        if not self._abandoned:
            self._thread.join()

    def abandon(self, reason: str) -> None:
        """Give up a thread that hangs: all requests end with `reason`, and nothing waits for it any more.

        Nothing can stop a thread; it and its model remain until the pass returns, if it ever does.
        """
        self._abandoned = self.closing = True
        self.lost = self._unavailable = reason
        for active in self._open:
            active.inbox.put_nowait(EngineUnavailableError(reason))
        self._ended.set()

    # The engine thread's side.

    def _run(self, progress: Progress, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> None:
        steps: _Steps | None = None
        reason = _SHUT_DOWN
        try:
            failure = self._start(progress)
            _call(loop, _resolve, ready, failure)
            if self._loaded is not None:
                steps = _Steps(self, self._loaded, drafts=self._spec.drafts)
                steps.run()
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            _LOG.critical("the engine thread ended", exc_info=True)
            reason = f"The engine stopped after an internal error ({type(error).__name__})."
            self.lost = self.lost or reason
        finally:
            # First refuse new requests, then end those that came before: none can slip between.
            self._unavailable = self._unavailable or reason
            self.turn_started_s = None
            if steps is not None:
                steps.refuse_all(self._unavailable)
            while not self.mailbox.empty():
                message = self.mailbox.get()
                if isinstance(message, _ActiveRequest):
                    message.send(EngineUnavailableError(self._unavailable))
                elif isinstance(message, AdapterSwap):
                    message.end(EngineUnavailableError(self._unavailable))
            self._loaded = None
            _call(loop, self._ended.set)

    def _start(self, progress: Progress) -> MidfillError | None:
        """Load the model; returns what went wrong."""

        def checked(message: str, share: float | None) -> None:
            if self.closing:
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
        except Exception as error:  # noqa: BLE001 - transformers and torch raise anything
            _LOG.exception("loading failed")
            failure = EngineError(f"The model could not be loaded: {type(error).__name__}: {error}")
        else:
            self._unavailable = None
            if self.closing:  # `close` may have set its own sentence just before
                self._unavailable = _SHUT_DOWN
            return None
        self._unavailable = str(failure)
        return failure


class _Steps:
    """The step loop. Lives on the engine thread."""

    def __init__(self, engine: LocalEngine, loaded: LoadedModel, *, drafts: bool) -> None:
        self._engine = engine
        self._runner = loaded.runner
        self._tokenizer = loaded.info.tokenizer
        self._control_ids = self._tokenizer.control_ids
        self._vocab = self._tokenizer.vocab_bytes()
        self._index = loaded.index
        self._adapters = loaded.adapters
        self._slots = Slots(NUM_SLOTS)
        self._scheduler = Scheduler(
            self._slots,
            chunk_tokens=self._runner.chunk_tokens,
            step_tokens=self._runner.chunk_tokens,
            step_sequences=self._runner.step_sequences,
            max_waiting=MAX_WAITING,
        )
        self._active: dict[SequenceState, _ActiveRequest] = {}
        self._prewarm: SequenceState | None = None
        self._proposer = NgramProposer() if drafts else None
        self._aborted = False  # whether the latest pass was

    def run(self) -> None:
        """Until the engine closes: read the mailbox, drop cancelled requests, compute one step."""
        while True:
            self._change_adapters()
            self._receive()
            self._engine.turn_started_s = time.monotonic()
            if self._engine.closing:
                return
            for active in [active for active in self._active.values() if active.cancelled]:
                self._finish(active)
            for sequence, active in self._active.items():
                sequence.priority = _priority(active.request)
            if chunks := self._scheduler.schedule():
                self._step(chunks)

    def refuse_all(self, reason: str) -> None:
        """End every request under way."""
        for active in self._active.values():
            active.send(EngineUnavailableError(reason))
        self._active.clear()
        self._adapters.refuse(reason)

    def _change_adapters(self) -> None:
        """Put other adapters in if they wait for that, and nobody uses those that leave."""
        if self._prewarm is not None and self._prewarm.key in self._adapters.leaving:
            self._scheduler.remove(self._prewarm)
            self._prewarm = None
        self._adapters.swap(sequence.key for sequence in self._active)

    def _receive(self) -> None:
        """Take in all messages; wait for one if there is nothing to compute."""
        mailbox = self._engine.mailbox
        while not len(self._scheduler) or not mailbox.empty():
            self._engine.turn_started_s = None
            message = self._next_message()
            self._engine.turn_started_s = time.monotonic()
            if isinstance(message, _ActiveRequest):
                self._admit(message)
            elif isinstance(message, _Prewarm):
                self._replace_prewarm(message)
            elif isinstance(message, AdapterSwap):
                self._adapters.add(message)
                self._change_adapters()
            if self._engine.closing:
                return

    def _next_message(self) -> _ActiveRequest | _Prewarm | AdapterSwap | None:
        """Wait for a message. In a pause that lasts, the runner does what it has put off, piece by piece."""
        mailbox = self._engine.mailbox
        more = not len(self._scheduler)
        while more:
            try:
                return mailbox.get(timeout=_PAUSE_S)
            except Empty:
                self._engine.turn_started_s = time.monotonic()
                more = self._runner.idle()
                self._engine.turn_started_s = None
        return mailbox.get()

    def _admit(self, active: _ActiveRequest) -> None:
        request = active.request
        if active.cancelled:
            request.stats.ended_s = time.monotonic()
            return
        try:
            self._check(request.tokens)
            key = self._adapters.key_of(request.adapter)
            active.sequence = SequenceState(key, list(request.tokens), _priority(request), user=request.user)
            dropped = self._scheduler.add(active.sequence)
        except EngineError as error:
            active.send(error)
            return
        for sequence in dropped:
            other = active if sequence is active.sequence else self._active.get(sequence)
            if other is not None:
                self._finish(other, EngineOverloadedError("There was no room for it among those that wait."))
        if active.sequence in dropped:
            return
        request.stats.num_prompt = len(request.tokens)
        active.stop_ids = request.stop_ids | self._control_ids
        active.stream = self._tokenizer.stream()
        self._active[active.sequence] = active
        self._set_forced_prefix(active, request.forced_prefix.encode("utf-8", errors="replace"))
        if active.sequence in self._active:
            self._propose_draft(active, active.sequence)

    def _check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise EngineError("The prompt is empty.")
        if len(tokens) >= self._runner.context:
            raise EngineError(
                f"The prompt has {len(tokens)} tokens; the model takes at most {self._runner.context - 1}."
            )
        # On a GPU an id out of range would not raise but break the device for good.
        if min(tokens) < 0 or max(tokens) >= self._runner.vocab_size:
            raise EngineError("The prompt has token ids that the model does not know.")

    def _replace_prewarm(self, prewarm: _Prewarm) -> None:
        if self._prewarm is not None:
            self._scheduler.remove(self._prewarm)
            self._prewarm = None
        try:
            self._check(prewarm.tokens)
            key = self._adapters.key_of(prewarm.adapter)
        except EngineError:
            return
        sequence = SequenceState(key, prewarm.tokens, Priority.IDLE, samples=False, user=prewarm.user)
        if sequence not in self._scheduler.add(sequence):
            self._prewarm = sequence

    def _step(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._note_start(chunk.sequence, time.monotonic())
        began, resumed, self._aborted = time.monotonic(), self._aborted, False
        try:
            choices = self._runner.forward(
                chunks, [self._allowed(chunk) for chunk in chunks], lambda: self._may_abort(chunks)
            )
        except MemoryError:
            self._fail(
                chunks,
                "There was not enough memory for this request. Kept computations were dropped; if it happens "
                "again, use a smaller model or a shorter context.",
                out_of_memory=True,
            )
            return
        except Exception as error:  # noqa: BLE001 - a failed step costs its requests, not the engine
            _LOG.exception("a step failed")
            self._fail(
                chunks, f"The model failed on this request ({type(error).__name__}); the log has more."
            )
            return
        if choices is None:
            self._aborted = True
            return
        self._record_speculation(chunks, choices, None if resumed else time.monotonic() - began)
        for chunk, chosen in zip(chunks, choices, strict=True):
            self._scheduler.computed(chunk, max(0, len(chosen) - 1))
            if (active := self._active.get(chunk.sequence)) is not None:
                active.request.stats.computed(chunk.start, len(chunk.tokens))
            self._advance(chunk.sequence, chosen)

    def _may_abort(self, chunks: list[Chunk]) -> bool:
        """Whether a pass may be left in the middle: nobody wants it, or it is idle work and there is news."""
        return self._engine.closing or not any(self._is_wanted(chunk.sequence) for chunk in chunks)

    def _is_wanted(self, sequence: SequenceState) -> bool:
        active = self._active.get(sequence)
        if active is None or active.request.idle:
            return self._engine.mailbox.empty()
        return not active.cancelled

    def _note_start(self, sequence: SequenceState, now: float) -> None:
        active = self._active.get(sequence)
        if active is not None and not active.request.stats.started_s:
            active.request.stats.started_s = now
            active.request.stats.num_reused = sequence.num_reused or 0
            if self._proposer is not None:
                self._proposer.learn(sequence.tokens, active.request.stats.num_reused)

    def _allowed(self, chunk: Chunk) -> array[int] | None:
        active = self._active.get(chunk.sequence)
        return active.allowed if active is not None and chunk.samples else None

    def _record_speculation(
        self, chunks: list[Chunk], choices: list[list[Choice]], seconds: float | None
    ) -> None:
        """Take note of what was guessed, what came of it and what it took, if that is known."""
        if self._proposer is None:
            return
        for chunk, chosen in zip(chunks, choices, strict=True):
            active = self._active.get(chunk.sequence)
            if active is not None and chunk.num_draft_tokens:
                self._proposer.record_acceptance(
                    active.draft_context, chunk.num_draft_tokens, len(chosen) - 1
                )
        if seconds and len(chunks) == 1 and len(chunks[0].tokens) == chunks[0].num_draft_tokens + 1:
            self._proposer.record_duration(len(chunks[0].tokens), seconds)

    def _propose_draft(self, active: _ActiveRequest, sequence: SequenceState) -> None:
        """Guess what may follow, no more than may be generated; nothing while some text is forced_prefix."""
        sequence.draft_tokens, active.draft_context = [], 0
        if self._proposer is None or active.forced_prefix or not self._runner.max_draft_tokens:
            return
        stats, request = active.request.stats, active.request
        room = min(request.max_new_tokens - stats.num_generated, self._runner.context - len(sequence.tokens))
        draft_tokens, active.draft_context = self._proposer.propose(sequence.tokens)
        sequence.draft_tokens = draft_tokens[: min(room - 1, self._runner.max_draft_tokens)]

    def _advance(self, sequence: SequenceState, choices: list[Choice]) -> None:
        """What a computed chunk means for its request."""
        active = self._active.get(sequence)
        if active is None:
            if sequence.num_computed == len(sequence.tokens):
                self._scheduler.remove(sequence)
                self._prewarm = None
            return
        for choice in choices:
            self._emit(active, sequence, choice)
            if sequence not in self._active:
                return
        if choices:
            self._propose_draft(active, sequence)

    def _emit(self, active: _ActiveRequest, sequence: SequenceState, choice: Choice) -> None:
        """Send a chosen token out, or end the request."""
        # Models have more logits than the tokenizer has tokens; the surplus ids mean nothing.
        if choice.id in active.stop_ids or choice.id >= len(self._vocab):
            self._finish(active, _END)
            return
        stats = active.request.stats
        stats.num_generated += 1
        stats.first_token_s = stats.first_token_s or time.monotonic()
        sequence.tokens.append(choice.id)
        active.send(Token(choice.id, active.push(choice.id), choice.logprob))
        if (
            stats.num_generated >= active.request.max_new_tokens
            or len(sequence.tokens) >= self._runner.context
        ):
            self._finish(active, _END)
        elif active.forced_prefix:
            self._set_forced_prefix(active, active.forced_prefix[len(self._vocab[choice.id]) :])

    def _set_forced_prefix(self, active: _ActiveRequest, forced_prefix: bytes) -> None:
        """The output must go on with these bytes; it ends here if no token can."""
        active.forced_prefix = forced_prefix
        active.allowed = None
        if forced_prefix:
            active.allowed = self._index.allowed(forced_prefix)
            if not active.allowed:
                self._finish(active, _END)

    def _fail(self, chunks: list[Chunk], reason: str, *, out_of_memory: bool = False) -> None:
        """The requests of a failed step end; what their slots hold cannot be trusted.

        Who hears of it may ask again at once, so first everything is freed.
        """
        for chunk in chunks:
            self._scheduler.remove(chunk.sequence, forget=True)
        self._runner.drop([chunk.slot for chunk in chunks])
        if out_of_memory:
            self._shrink()
        for chunk in chunks:
            active = self._active.get(chunk.sequence)
            if active is None:
                self._prewarm = None
            else:
                self._finish(active, EngineError(reason))

    def _shrink(self) -> None:
        """Keep the past of fewer documents, since memory ran out."""
        before = len(self._slots)
        self._runner.drop(self._slots.shrink())
        if len(self._slots) < before:
            _LOG.warning(
                "out of memory: the computations of %d documents are kept from now on, not of %d",
                len(self._slots),
                before,
            )

    def _finish(self, active: _ActiveRequest, last: _End | EngineError | None = None) -> None:
        """A request ends; `last` tells the event loop, unless it has gone away itself."""
        if active.sequence is not None:
            if self._proposer is not None:
                self._proposer.learn(active.sequence.tokens, len(active.request.tokens))
            self._scheduler.remove(active.sequence)
            self._active.pop(active.sequence, None)
        active.request.stats.ended_s = time.monotonic()
        if last is not None:
            active.send(last)


def _priority(request: Request) -> Priority:
    return Priority.IDLE if request.idle else Priority.INTERACTIVE


def _resolve(future: asyncio.Future[None], error: MidfillError | None) -> None:
    if future.done():  # whoever awaited it was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Run a function on the event loop; nothing if the loop is closed, for then nobody waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
