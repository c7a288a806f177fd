"""Plan the next forward pass: newest request first, no starvation, in chunks, under a token budget.

If several users share the model, each has an equal share of the places in a pass and of the slots, and of the
passes if there are more users than places: no request costs another user more than a share.

There is no prefill phase and no decode phase. Every sequence has known tokens and a count of those whose keys
and values are computed; each step lets the count catch up with the tokens, and a sequence that has caught up
gets one more known token from the model. Knows token ids and slot numbers, nothing of tensors, threads or
editors. Runs on the engine thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from fractions import Fraction

from midfill.engine.kv_slots import Slots
from midfill.errors import EngineOverloadedError

_OLDEST_AT = 2
"""At every second step the oldest request goes first.

This slows a newer one by half while several wait; with eight users who type without pause the oldest is
answered within 7 s (3: 10 s, 4: 11 s) instead of never.
"""


_PASS = 3 / 8
"""Cost of taking part in a pass, in chunks: on two cores one token takes 25 ms, a chunk of 64 takes 80."""

_TURN = 64
"""How far, in chunks, a running user may get ahead of a waiting one (four seconds of decoding on two cores).

Each change of users may cost a prompt that must be computed again. A user who is away saves up no more than
this.
"""

_RECENT_STEPS = 2000
"""A user keeps a share of the slots, and the computed prompt in it, for this many steps after a request."""


class Priority(IntEnum):
    """Scheduling class. Strict: IDLE runs only when no INTERACTIVE request is waiting."""

    IDLE = 0
    INTERACTIVE = 1


@dataclass(slots=True, eq=False)
class SequenceState:
    """One prompt and the tokens generated after it.

    Attributes:
        key: tells whose keys and values it may share: the key of its adapter, or None for the base model.
        tokens: all known tokens: the prompt, then the generated ones.
        priority: see `Priority`.
        samples: choose a token once all known tokens are computed (a prewarm chooses none).
        num_computed: number of `tokens` whose keys and values are in the slot.
        slot: the slot it runs in, or None while it waits.
        num_reused: number of tokens found computed when it first got a slot; None before.
        draft_tokens: proposed next tokens, computed together with the last known one, so that one pass can
            yield several tokens. A rejected one costs a little time and nothing else.
        order: arrival number, set by the scheduler.
        user: the user, if several share the model. Computed tokens are not shared between users: the number
            that was found computed would reveal the beginning of another user's text.
    """

    key: str | None
    tokens: list[int]
    priority: Priority = Priority.INTERACTIVE
    samples: bool = True
    num_computed: int = 0
    slot: int | None = None
    num_reused: int | None = None
    draft_tokens: list[int] = field(default_factory=list)
    order: int = field(default=0)
    user: str = ""

    @property
    def rank(self) -> tuple[Priority, int]:
        """The greatest rank runs first: by priority, then the newest."""
        return self.priority, self.order


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of one sequence to compute in one forward pass.

    Attributes:
        sequence: the sequence that the tokens belong to.
        slot: where keys and values go.
        start: number of tokens that precede these.
        tokens: the ids to compute, draft tokens included; at least one is known.
        samples: choose the next token, from the logits of the last known one.
        num_draft_tokens: how many of `tokens`, at the end, are draft tokens. The choice after each is wanted
            too, as long as the draft token before it was accepted.
        copy_from: the slot whose first `start` entries are copied into `slot` first, or None. All copies of a
            step come before its first forward pass.
    """

    sequence: SequenceState
    slot: int
    start: int
    tokens: list[int]
    samples: bool
    copy_from: int | None = None
    num_draft_tokens: int = 0

    def verify(self, choose: Callable[[int], Choice]) -> list[Choice]:
        """Return the choices of this chunk: one, and one more for each accepted draft token.

        `choose(n)` returns the choice after the n-th draft token, 0 being the last known token; it is called
        in order, and not beyond a rejected draft token.
        """
        draft_tokens = self.tokens[len(self.tokens) - self.num_draft_tokens :]
        choices = [choose(0)]
        for number, draft in enumerate(draft_tokens, start=1):
            if draft != choices[-1].id:
                break
            choices.append(choose(number))
        return choices


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token and its natural log-probability among all tokens, before any constraint."""

    id: int
    logprob: float


@dataclass(slots=True)
class _Account:
    """A user's account: tokens computed for the user, and the latest step with a request of the user."""

    served: int = 0
    last_step: int = 0


class Scheduler:
    """The waiting and running sequences.

    Args:
        slots: where keys and values are kept.
        chunk_tokens: maximum tokens of one sequence in one step; small where a step takes long, because a new
            request waits for its end.
        step_tokens: maximum tokens of all sequences in one step.
        step_sequences: maximum sequences in one step.
        max_waiting: maximum sequences, waiting and running; more are refused.
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
        self._pass_tokens = int(_PASS * chunk_tokens)
        self._turn_tokens = _TURN * chunk_tokens
        self._sequences: list[SequenceState] = []  # oldest first
        self._arrivals = 0
        self._contended = 0  # number of steps in which not all had a place
        self._accounts: dict[str, _Account] = {}  # of recent users
        self._steps = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: SequenceState) -> bool:
        return sequence in self._sequences

    def add(self, sequence: SequenceState) -> list[SequenceState]:
        """Add a new sequence; return the sequences that were dropped to make room.

        Idle ones are dropped first; then one of the user with the most sequences, if that user has more than
        this one.

        Raises `EngineOverloadedError` if there is no room and nothing to drop. An idle sequence itself is
        dropped, not refused: it is in the result.
        """
        dropped: list[SequenceState] = []
        if len(self._sequences) >= self._max_waiting:
            idle = next((other for other in self._sequences if other.priority is Priority.IDLE), None)
            if idle is None and sequence.priority is Priority.IDLE:
                return [sequence]
            victim = idle or self._newest_of_the_heaviest(sequence.user)
            if victim is None:
                raise EngineOverloadedError(
                    f"The request was refused because {self._max_waiting} requests are waiting already. "
                    "Try again in a moment."
                )
            self.remove(victim)
            dropped.append(victim)
        self._arrivals += 1
        sequence.order = self._arrivals
        self._open_account(sequence.user)
        self._sequences.append(sequence)
        return dropped

    def _newest_of_the_heaviest(self, user: str) -> SequenceState | None:
        """Return the sequence to drop for one of this user: the newest of the user with the most, or None."""
        counts = Counter(sequence.user for sequence in self._sequences)
        heaviest, most = counts.most_common(1)[0]
        if most <= counts[user] + 1:
            return None
        return next(sequence for sequence in reversed(self._sequences) if sequence.user == heaviest)

    def _open_account(self, user: str) -> None:
        """Give an arriving user an account. Being away saves up one turn, no more."""
        present = {sequence.user for sequence in self._sequences}
        if user not in present:
            account = self._accounts.setdefault(user, _Account())
            others = [self._accounts[name].served for name in present]
            if others:
                account.served = max(account.served, min(others) - self._turn_tokens)
        # Accounts of users who have been away for long are removed, which bounds their number.
        recent = {name for name, one in self._accounts.items() if self._is_recent(one)}
        for name in set(self._accounts) - present - recent - {user}:
            del self._accounts[name]

    def _is_recent(self, account: _Account) -> bool:
        return self._steps - account.last_step < _RECENT_STEPS

    def schedule(self) -> list[Chunk]:
        """Return the chunks of the next step; empty only if there is nothing to do.

        A sequence without a slot takes a free one or, if none is free, preempts the running sequence of the
        least rank, which waits again; its keys and values stay and are found again by their prefix.
        """
        self._steps += bool(self._sequences)
        for user in {sequence.user for sequence in self._sequences}:
            self._accounts[user].last_step = self._steps
        share = self._share()
        ranked = self._ranked() if share is None else self._in_turns(share)
        if ranked and ranked[0].priority is Priority.INTERACTIVE:
            # Idle work gives up its slot: the prompt that it has prewarmed is most likely this request's.
            for sequence in ranked:
                if sequence.priority is Priority.IDLE:
                    self._pause(sequence)
        chosen = [one for one in ranked[: self._places] if one.priority is ranked[0].priority]
        if share is not None:
            return self._split(_at_most(chosen, share), ranked, share)
        chunks: list[Chunk] = []
        budget = self._step_tokens
        for sequence in chosen:
            if budget == 0:
                break
            copy_from = self._admit(sequence, ranked) if sequence.slot is None else None
            chunks.append(_chunk(sequence, min(self._chunk_tokens, budget), copy_from))
            budget -= len(chunks[-1].tokens)
        return chunks

    @property
    def _places(self) -> int:
        """Number of sequences that one step takes; there may be fewer slots after memory has run out."""
        return min(self._step_sequences, len(self._slots))

    def _split(self, chosen: list[SequenceState], ranked: list[SequenceState], share: int) -> list[Chunk]:
        """Divide the budget equally between several users; what one does not need goes to the others.

        Each further user makes a pass longer by at most half of what it takes for the one with the least to
        compute, so that a long prompt of one user does not slow down another's decoding.
        """
        chosen = chosen[: self._step_tokens]
        copies = {one: self._admit(one, ranked, share=share) if one.slot is None else None for one in chosen}
        by_need = sorted(chosen, key=_need)
        counts = Counter(one.user for one in chosen)
        budget = self._step_tokens
        if len(counts) > 1:
            least = _need(by_need[0])
            most = least + (len(counts) - 1) * (self._pass_tokens + least) // 2
            budget = min(budget, max(most, len(chosen)))
        chunks: list[Chunk] = []
        for num_before, sequence in enumerate(by_need):
            others = by_need[num_before + 1 :]
            part = Fraction(1, counts[sequence.user])
            part /= part + sum(Fraction(1, counts[one.user]) for one in others)
            room = min(self._chunk_tokens, max(1, int(budget * part)), budget - len(others))
            chunks.append(_chunk(sequence, room, copies[sequence]))
            budget -= len(chunks[-1].tokens)
        return chunks

    def _ranked(self) -> list[SequenceState]:
        """Return the sequences, newest first; if some get no place, the oldest first at every second step.

        So none starves. Otherwise the oldest is second, so that it is not the one that is preempted.
        """
        ranked = sorted(self._sequences, key=lambda sequence: sequence.rank, reverse=True)
        num_interactive = sum(sequence.priority is Priority.INTERACTIVE for sequence in ranked)
        if num_interactive > self._places:
            self._contended += 1
            place = 0 if self._contended % _OLDEST_AT == 0 else 1
            ranked.insert(place, ranked.pop(num_interactive - 1))
        return ranked

    def _share(self) -> int | None:
        """Return how many places and slots a user may have; None while there is one user only."""
        recent = sum(self._is_recent(account) for account in self._accounts.values())
        if recent < 2:
            return None
        if recent > len(self._slots):
            # Their computed prompts cannot all be kept anyway.
            recent = len({sequence.user for sequence in self._sequences})
        return max(1, self._places // max(1, recent))

    def _in_turns(self, share: int) -> list[SequenceState]:
        """Return the sequences of several users in turn: one of each, then a second one of each, and so on.

        The user for whom the least was computed comes first; one who has a slot stays ahead for a turn. Of
        each user, the newest sequence is first and the oldest second. Those beyond the share come last.
        """
        ranked: list[SequenceState] = []
        for priority in sorted(Priority, reverse=True):
            queues: dict[str, list[SequenceState]] = {}
            for sequence in reversed(self._sequences):
                if sequence.priority is priority:
                    queues.setdefault(sequence.user, []).append(sequence)
            for queue in queues.values():
                if len(queue) > share:
                    queue.insert(1, queue.pop())
            users = sorted(queues, key=lambda user: self._standing(user, queues[user]))
            rounds = range(max(map(len, queues.values()), default=0))
            ranked += [queues[user][n] for n in rounds for user in users if n < len(queues[user])]
        return ranked

    def _standing(self, user: str, queue: list[SequenceState]) -> tuple[int, int]:
        """Return a sort key for users: the least computed first; of equal ones the latest to ask."""
        has_slot = any(sequence.slot is not None for sequence in queue)
        return self._accounts[user].served - has_slot * self._turn_tokens, -queue[0].order

    def computed(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """Record that a pass has computed this chunk, with `num_accepted` accepted draft tokens."""
        kept = chunk.tokens[: len(chunk.tokens) - chunk.num_draft_tokens + num_accepted]
        if (account := self._accounts.get(chunk.sequence.user)) is not None:
            account.served += len(chunk.tokens) + self._pass_tokens
        chunk.sequence.num_computed += len(kept)
        self._slots.extend(chunk.slot, kept)

    def remove(self, sequence: SequenceState, *, forget: bool = False) -> None:
        """Remove a finished, cancelled or failed sequence. `forget`: do not reuse what its slot holds."""
        if sequence not in self._sequences:
            return
        if forget and sequence.slot is not None:
            self._slots.forget(sequence.slot)
        self._pause(sequence)
        self._sequences.remove(sequence)

    def _pause(self, sequence: SequenceState) -> None:
        if sequence.slot is not None:
            self._slots.release(sequence.slot)
            sequence.slot = None
            sequence.num_computed = 0

    def _admit(
        self, sequence: SequenceState, ranked: list[SequenceState], *, share: int | None = None
    ) -> int | None:
        """Give a waiting sequence a slot; return the slot to copy its computed tokens from, or None."""
        running = [other for other in reversed(ranked) if other.slot is not None]
        own = [other for other in running if other.user == sequence.user]
        if share is not None and len(own) >= share:
            self._pause(own[0])
        elif self._slots.num_free == 0:
            self._pause(running[0])
        lease = self._slots.acquire(
            (sequence.user, sequence.key), sequence.tokens, owner=sequence.user, share=share
        )
        sequence.slot = lease.slot
        sequence.num_computed = lease.reused
        if sequence.num_reused is None:
            sequence.num_reused = lease.reused
        return lease.copy_from


def _at_most(sequences: list[SequenceState], share: int) -> list[SequenceState]:
    """Return these sequences without what exceeds `share` of one user."""
    counts: Counter[str] = Counter()
    kept = []
    for sequence in sequences:
        counts[sequence.user] += 1
        if counts[sequence.user] <= share:
            kept.append(sequence)
    return kept


def _need(sequence: SequenceState) -> int:
    """Return how many known tokens are not computed."""
    return len(sequence.tokens) - sequence.num_computed


def _chunk(sequence: SequenceState, room: int, copy_from: int | None) -> Chunk:
    """Return the next chunk of a sequence that has a slot, in `room` tokens, draft tokens if they fit."""
    start = sequence.num_computed
    end = min(len(sequence.tokens), start + room)
    samples = sequence.samples and end == len(sequence.tokens)
    draft_tokens = sequence.draft_tokens[: room - (end - start)] if samples else []
    tokens = sequence.tokens[start:end] + draft_tokens
    return Chunk(sequence, _slot_of(sequence), start, tokens, samples, copy_from, len(draft_tokens))


def _slot_of(sequence: SequenceState) -> int:
    if sequence.slot is None:
        raise AssertionError("a scheduled sequence has a slot")
    return sequence.slot
