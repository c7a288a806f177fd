"""The engine thread's loop: read messages, drop cancelled requests, run one forward pass, send out tokens.

The loop owns the runner, the scheduler and the slots. A cancelled request costs at most the pass in progress,
or a part of it if the runner can abort a pass. Everything that the event loop and this thread share is in
`SharedState` and `ActiveRequest`. Knows nothing of editors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from midfill.engine.adapters.loaded import AdapterSwap
from midfill.engine.api import Request, TextStream, Token
from midfill.engine.kv_slots import NUM_SLOTS, Slots
from midfill.engine.loading import LoadedModel
from midfill.engine.runner import DeviceLostError, FixedMemoryError
from midfill.engine.scheduler import Choice, Chunk, Priority, Scheduler, SequenceState
from midfill.engine.speculation import NgramProposer
from midfill.errors import EngineError, EngineOverloadedError, EngineUnavailableError

_LOG = logging.getLogger(__name__)

_PAUSE_S = 0.5
"""After this long without a message nobody is typing: most keys come within 0.2 s of the one before."""


class End:
    """Marks the end of an output in the inbox of an `ActiveRequest`."""


END = End()


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A submitted request, shared by both threads.

    `cancelled` is written by the event loop and read by the engine thread; items of `inbox` go the other way.
    All other attributes belong to the engine thread.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[Token | BaseException | End] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    sequence: SequenceState | None = None
    stop_ids: frozenset[int] = frozenset()
    stream: TextStream | None = None
    forced_prefix: bytes = b""  # the part of `Request.forced_prefix` that has not been generated yet
    allowed: array[int] | None = None  # the ids that agree with it
    draft_context: int = 0  # see `NgramProposer.propose`

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        return "" if self.stream is None else self.stream.push(token)

    def send(self, item: Token | BaseException | End) -> None:
        """Hand an item to the event loop. Engine thread."""
        try:
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, item)
        except RuntimeError:  # the loop is closed, so nobody waits for the request
            self.cancelled = True


@dataclass(frozen=True, slots=True)
class Prewarm:
    """A prompt to compute when there is no other work."""

    tokens: list[int]
    adapter: str | None
    user: str


Message = ActiveRequest | Prewarm | AdapterSwap | None
"""To the engine thread; None only wakes it."""


@dataclass(slots=True)
class SharedState:
    """State that the event loop and the engine thread share. Each attribute is read and written as a whole.

    Attributes:
        mailbox: filled by the event loop, read by the engine thread.
        closing: set by the event loop to end the engine thread; never reset.
        step_started_s: `time.monotonic()` at the start of the current step (a forward pass, as a rule), or
            None while the engine thread waits for work. Set by the engine thread.
        unavailable: why requests are refused, or None while they are served. Set by both.
    """

    mailbox: SimpleQueue[Message] = field(default_factory=SimpleQueue)
    closing: bool = False
    step_started_s: float | None = None
    unavailable: str | None = "The model is not loaded yet."


class StepLoop:
    """The loop over steps. Lives on the engine thread.

    Args:
        shared: see `SharedState`.
        loaded: the model.
        max_waiting: maximum number of requests that wait or run.
        speculate: propose draft tokens and verify several per pass.
    """

    def __init__(
        self, shared: SharedState, loaded: LoadedModel, *, max_waiting: int, speculate: bool
    ) -> None:
        self._shared = shared
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
            max_waiting=max_waiting,
        )
        self._active: dict[SequenceState, ActiveRequest] = {}
        self._prewarm: SequenceState | None = None
        self._proposer = NgramProposer() if speculate else None
        self._aborted = False  # the latest pass was aborted

    def run(self) -> None:
        """Run steps until the engine closes."""
        while True:
            self._swap_adapters()
            self._receive()
            self._shared.step_started_s = time.monotonic()
            if self._shared.closing:
                return
            for active in [active for active in self._active.values() if active.cancelled]:
                self._finish(active)
            for sequence, active in self._active.items():
                sequence.priority = _priority(active.request)
            if chunks := self._scheduler.schedule():
                self._step(chunks)

    def refuse_all(self, reason: str) -> None:
        """End every active request and every waiting adapter swap with `EngineUnavailableError`."""
        for active in self._active.values():
            active.send(EngineUnavailableError(reason))
        self._active.clear()
        self._adapters.refuse(reason)

    # Messages.

    def _swap_adapters(self) -> None:
        """Install the next waiting adapters, unless an active request uses one that is to be removed."""
        if self._prewarm is not None and self._prewarm.key in self._adapters.leaving:
            self._scheduler.remove(self._prewarm)
            self._prewarm = None
        self._adapters.swap(sequence.key for sequence in self._active)

    def _receive(self) -> None:
        """Handle all messages; wait for one if there is nothing to compute."""
        mailbox = self._shared.mailbox
        while not len(self._scheduler) or not mailbox.empty():
            self._shared.step_started_s = None
            message = self._next_message()
            self._shared.step_started_s = time.monotonic()
            if isinstance(message, ActiveRequest):
                self._admit(message)
            elif isinstance(message, Prewarm):
                self._replace_prewarm(message)
            elif isinstance(message, AdapterSwap):
                self._adapters.add(message)
                self._swap_adapters()
            if self._shared.closing:
                return

    def _next_message(self) -> Message:
        """Wait for a message. During a long pause, run the runner's deferred work piece by piece."""
        mailbox = self._shared.mailbox
        more = not len(self._scheduler)
        while more:
            try:
                return mailbox.get(timeout=_PAUSE_S)
            except Empty:
                self._shared.step_started_s = time.monotonic()
                more = self._runner.idle()
                self._shared.step_started_s = None
        return mailbox.get()

    def _admit(self, active: ActiveRequest) -> None:
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
                self._finish(
                    other,
                    EngineOverloadedError("The request was dropped because too many requests are waiting."),
                )
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

    def _replace_prewarm(self, prewarm: Prewarm) -> None:
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

    # One step.

    def _step(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._record_start(chunk.sequence, time.monotonic())
        began, resumed, self._aborted = time.monotonic(), self._aborted, False
        try:
            choices = self._runner.forward(
                chunks, [self._allowed(chunk) for chunk in chunks], lambda: self._may_abort(chunks)
            )
        except DeviceLostError:
            raise
        except MemoryError as error:
            self._fail(
                chunks,
                "There was not enough memory for this request; its KV cache was dropped. If it happens "
                "again, use a smaller model or a shorter context.",
                out_of_memory=not isinstance(error, FixedMemoryError),
            )
            return
        except Exception as error:
            _LOG.exception("a step failed")
            self._fail(
                chunks, f"The model failed on this request ({type(error).__name__}); see the log for details."
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
        """Return whether to abort the pass: all its requests are cancelled, or idle while a message waits."""
        return self._shared.closing or not any(self._is_wanted(chunk.sequence) for chunk in chunks)

    def _is_wanted(self, sequence: SequenceState) -> bool:
        active = self._active.get(sequence)
        if active is None or active.request.idle:
            return self._shared.mailbox.empty()
        return not active.cancelled

    def _record_start(self, sequence: SequenceState, now: float) -> None:
        active = self._active.get(sequence)
        if active is not None and not active.request.stats.started_s:
            active.request.stats.started_s = now
            active.request.stats.num_reused = sequence.num_reused or 0
            if self._proposer is not None:
                self._proposer.learn(sequence.tokens, active.request.stats.num_reused)

    def _allowed(self, chunk: Chunk) -> array[int] | None:
        active = self._active.get(chunk.sequence)
        return active.allowed if active is not None and chunk.samples else None

    def _advance(self, sequence: SequenceState, choices: list[Choice]) -> None:
        """Continue a request after one of its chunks was computed."""
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

    def _emit(self, active: ActiveRequest, sequence: SequenceState, choice: Choice) -> None:
        """Send a chosen token out, or end the request."""
        # Models have more logits than the tokenizer has tokens; the surplus ids mean nothing.
        if choice.id in active.stop_ids or choice.id >= len(self._vocab):
            self._finish(active, END)
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
            self._finish(active, END)
        elif active.forced_prefix:
            self._set_forced_prefix(active, active.forced_prefix[len(self._vocab[choice.id]) :])

    def _set_forced_prefix(self, active: ActiveRequest, remaining: bytes) -> None:
        """Require the output to continue with these bytes; end it if no token can."""
        active.forced_prefix = remaining
        active.allowed = None
        if remaining:
            active.allowed = self._index.allowed(remaining)
            if not active.allowed:
                self._finish(active, END)

    # Speculation.

    def _propose_draft(self, active: ActiveRequest, sequence: SequenceState) -> None:
        """Propose draft tokens, no more than may be generated; none while a forced prefix remains."""
        sequence.draft_tokens, active.draft_context = [], 0
        if self._proposer is None or active.forced_prefix or not self._runner.max_draft_tokens:
            return
        stats, request = active.request.stats, active.request
        room = min(request.max_new_tokens - stats.num_generated, self._runner.context - len(sequence.tokens))
        draft_tokens, active.draft_context = self._proposer.propose(sequence.tokens)
        sequence.draft_tokens = draft_tokens[: min(room - 1, self._runner.max_draft_tokens)]

    def _record_speculation(
        self, chunks: list[Chunk], choices: list[list[Choice]], seconds: float | None
    ) -> None:
        """Record how many draft tokens were accepted, and the duration of the pass if it is known."""
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

    # The end of a request.

    def _fail(self, chunks: list[Chunk], reason: str, *, out_of_memory: bool = False) -> None:
        """End the requests of a failed step; the contents of their slots cannot be trusted.

        A client may retry as soon as it is told, so everything is freed first.
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
        """Use fewer slots from now on, because memory ran out."""
        before = len(self._slots)
        self._runner.drop(self._slots.shrink())
        if len(self._slots) < before:
            _LOG.warning(
                "out of memory: the KV cache now keeps %d documents instead of %d", len(self._slots), before
            )

    def _finish(self, active: ActiveRequest, last: End | EngineError | None = None) -> None:
        """End a request; `last` tells the event loop, unless the request was cancelled there."""
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
