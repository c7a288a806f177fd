"""What the next forward pass computes: newest first, none for ever last, in chunks, under a token budget.

There is no prefill phase and no decode phase. Every sequence has tokens that are known and a count of
those whose keys and values are computed; each step lets the second catch up with the first, and a
sequence that has caught up gets one more known token from the model. Knows token ids and slot numbers,
nothing of tensors, threads or editors. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from midfill.engine.slots import Slots
from midfill.errors import EngineOverloadedError

_OLDEST_AT = 2
"""At every second step the oldest request goes first: a newer one is slowed by half while several wait, and
with eight who type without end it is answered within 7 s (3: 10 s, 4: 11 s) instead of never."""


class Priority(IntEnum):
    """Who goes first. A lower one gets nothing while a higher one is there."""

    IDLE = 0
    INTERACTIVE = 1


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and what was generated after it.

    Attributes:
        key: whose keys and values it may share: those of its adapter, or None for the base.
        tokens: all known tokens: the prompt, then the generated ones.
        priority: see `Priority`.
        samples: whether a token is chosen once all known tokens are computed (a prewarm wants none).
        num_computed: how many of `tokens` have their keys and values in the slot.
        slot: the slot it runs in, or None while it waits.
        num_reused: how many tokens were found computed when it first got a slot; None before.
        guesses: tokens that may well follow the known ones; computed along with the last of these, so that
            one pass can yield several tokens. Wrong ones cost a little time and nothing else.
        order: arrival number, given by the scheduler.
    """

    key: str | None
    tokens: list[int]
    priority: Priority = Priority.INTERACTIVE
    samples: bool = True
    num_computed: int = 0
    slot: int | None = None
    num_reused: int | None = None
    guesses: list[int] = field(default_factory=list)
    order: int = field(default=0)

    @property
    def rank(self) -> tuple[Priority, int]:
        """The greatest rank runs first: by priority, then the newest."""
        return self.priority, self.order


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of one sequence to compute in one forward pass.

    Attributes:
        sequence: whose tokens they are.
        slot: where keys and values go.
        start: how many tokens precede these.
        tokens: the ids to compute, guesses included; at least one that is known.
        samples: whether the next token is to be chosen, from the logits of the last known one.
        num_guesses: how many of `tokens`, at the end, are guesses. The choice after each is wanted too, as
            long as the one before has come true.
        copy_from: the slot whose first `start` entries are to be copied into `slot` first, or None. All
            copies of a step come before its first forward pass.
    """

    sequence: Sequence
    slot: int
    start: int
    tokens: list[int]
    samples: bool
    copy_from: int | None = None
    num_guesses: int = 0

    def verify(self, choose: Callable[[int], Choice]) -> list[Choice]:
        """The choices of this chunk: one, and one more for each guess that came true.

        `choose(n)` gives the choice after the n-th guess, 0 being the last known token; it is asked in
        order, and not beyond a guess that was wrong.
        """
        guesses = self.tokens[len(self.tokens) - self.num_guesses :]
        choices = [choose(0)]
        for number, guess in enumerate(guesses, start=1):
            if guess != choices[-1].id:
                break
            choices.append(choose(number))
        return choices


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token and its natural log-probability among all tokens, before any constraint."""

    id: int
    logprob: float


class Scheduler:
    """Sequences that wait or run.

    Args:
        slots: where keys and values are kept.
        chunk_tokens: the most tokens of one sequence in one step; small where a step takes long, since who
            comes meanwhile waits for its end.
        step_tokens: the most tokens of all sequences in one step.
        step_sequences: the most sequences in one step.
        max_waiting: the most sequences that may be here; more are refused.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        chunk_tokens: int,
        step_tokens: int,
        step_sequences: int,
        max_waiting: int,
    ) -> None:
        self._slots = slots
        self._chunk_tokens = chunk_tokens
        self._step_tokens = step_tokens
        self._step_sequences = step_sequences
        self._max_waiting = max_waiting
        self._sequences: list[Sequence] = []  # oldest first
        self._arrivals = 0
        self._contended = 0  # steps in which not all had a place

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> list[Sequence]:
        """Take a new sequence; returns the idle ones that were dropped to make room.

        Raises `EngineOverloadedError` if there is no room and nothing idle to drop. An idle sequence
        itself is dropped, not refused: it comes back in the result.
        """
        dropped: list[Sequence] = []
        if len(self._sequences) >= self._max_waiting:
            idle = next((other for other in self._sequences if other.priority is Priority.IDLE), None)
            if idle is not None:
                self.remove(idle)
                dropped.append(idle)
            elif sequence.priority is Priority.IDLE:
                return [sequence]
            else:
                raise EngineOverloadedError(
                    f"The model has {self._max_waiting} requests waiting already; "
                    "this one was not taken. Try again in a moment."
                )
        self._arrivals += 1
        sequence.order = self._arrivals
        self._sequences.append(sequence)
        return dropped

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty only if there is nothing to do.

        A sequence without a slot takes a free one or, if none is free, that of the least-ranking running
        one, which waits again; its keys and values stay and are found again by their prefix.
        """
        ranked = self._ranked()
        if ranked and ranked[0].priority is Priority.INTERACTIVE:
            # Idle work stands aside with its slot: what it prewarmed is most likely what is asked for now.
            for sequence in ranked:
                if sequence.priority is Priority.IDLE:
                    self._pause(sequence)
        chunks: list[Chunk] = []
        budget = self._step_tokens
        for sequence in ranked[: self._step_sequences]:
            if sequence.priority is not ranked[0].priority or budget == 0:
                break
            copy_from = self._admit(sequence, ranked) if sequence.slot is None else None
            start = sequence.num_computed
            end = min(len(sequence.tokens), start + min(self._chunk_tokens, budget))
            samples = sequence.samples and end == len(sequence.tokens)
            room = min(self._chunk_tokens, budget) - (end - start)
            guesses = sequence.guesses[:room] if samples else []
            tokens = sequence.tokens[start:end] + guesses
            chunks.append(
                Chunk(sequence, _slot_of(sequence), start, tokens, samples, copy_from, len(guesses))
            )
            budget -= len(tokens)
        return chunks

    def _ranked(self) -> list[Sequence]:
        """Who goes first: the newest; where not all have a place, at every second step the oldest.

        So nobody waits for ever. The oldest is second otherwise: it is not the one that gives its slot away.
        """
        ranked = sorted(self._sequences, key=lambda sequence: sequence.rank, reverse=True)
        num_interactive = sum(sequence.priority is Priority.INTERACTIVE for sequence in ranked)
        if num_interactive > self._step_sequences:
            self._contended += 1
            place = 0 if self._contended % _OLDEST_AT == 0 else 1
            ranked.insert(place, ranked.pop(num_interactive - 1))
        return ranked

    def computed(self, chunk: Chunk, num_right: int = 0) -> None:
        """Note that a forward pass has computed this chunk, `num_right` of whose guesses came true."""
        kept = chunk.tokens[: len(chunk.tokens) - chunk.num_guesses + num_right]
        chunk.sequence.num_computed += len(kept)
        self._slots.extend(chunk.slot, kept)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """A sequence leaves: finished, cancelled or failed. `forget` if its slot cannot be trusted."""
        if sequence not in self._sequences:
            return
        if forget and sequence.slot is not None:
            self._slots.forget(sequence.slot)
        self._pause(sequence)
        self._sequences.remove(sequence)

    def _pause(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots.release(sequence.slot)
            sequence.slot = None
            sequence.num_computed = 0

    def _admit(self, sequence: Sequence, ranked: list[Sequence]) -> int | None:
        """Give a waiting sequence a slot; returns the slot to copy its computed tokens from, if any."""
        if self._slots.num_free == 0:
            self._pause(next(other for other in reversed(ranked) if other.slot is not None))
        lease = self._slots.acquire(sequence.key, sequence.tokens)
        sequence.slot = lease.slot
        sequence.num_computed = lease.reused
        if sequence.num_reused is None:
            sequence.num_reused = lease.reused
        return lease.copy_from


def _slot_of(sequence: Sequence) -> int:
    if sequence.slot is None:
        raise AssertionError("a scheduled sequence has a slot")
    return sequence.slot
