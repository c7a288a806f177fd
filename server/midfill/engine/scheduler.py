"""What the next forward pass computes: newest first, none for ever last, in chunks, under a token budget.

Where several users share the model, each has an equal share of the places and of the slots, and of the passes
if there are more users than places: what one of them sends costs another no more than a share.

There is no prefill phase and no decode phase. Every sequence has tokens that are known and a count of
those whose keys and values are computed; each step lets the second catch up with the first, and a
sequence that has caught up gets one more known token from the model. Knows token ids and slot numbers,
nothing of tensors, threads or editors. Runs on the engine thread only.
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
"""At every second step the oldest request goes first: a newer one is slowed by half while several wait, and
with eight who type without end it is answered within 7 s (3: 10 s, 4: 11 s) instead of never."""


_PASS = 3 / 8
"""What taking part in a pass costs, in chunks: on two cores one token takes 25 ms, a chunk of 64 takes 80."""

_TURN = 64
"""How far, in chunks, a user who runs may get ahead of one who waits (four seconds of decoding on two cores):
each change may cost a prompt that must be computed again. Nobody saves up more by being away."""

_RECENT_STEPS = 2000
"""A user keeps a share of the slots, and so the computed prompt in it, for so many steps after a request."""


class Priority(IntEnum):
    """Who goes first. A lower one gets nothing while a higher one is there."""

    IDLE = 0
    INTERACTIVE = 1


@dataclass(slots=True, eq=False)
class SequenceState:
    """One prompt and what was generated after it.

    Attributes:
        key: whose keys and values it may share: those of its adapter, or None for the base.
        tokens: all known tokens: the prompt, then the generated ones.
        priority: see `Priority`.
        samples: whether a token is chosen once all known tokens are computed (a prewarm wants none).
        num_computed: how many of `tokens` have their keys and values in the slot.
        slot: the slot it runs in, or None while it waits.
        num_reused: how many tokens were found computed when it first got a slot; None before.
        draft_tokens: tokens that may well follow the known ones; computed along with the last of these, so that
            one pass can yield several tokens. Wrong ones cost a little time and nothing else.
        order: arrival number, given by the scheduler.
        user: who asked, where several people share the model. Nobody shares what another user had computed:
            how much was found computed would tell what that user's text begins with.
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
        sequence: whose tokens they are.
        slot: where keys and values go.
        start: how many tokens precede these.
        tokens: the ids to compute, draft_tokens included; at least one that is known.
        samples: whether the next token is to be chosen, from the logits of the last known one.
        num_draft_tokens: how many of `tokens`, at the end, are draft tokens. The choice after each is wanted too,
            as long as the draft token before it was accepted.
        copy_from: the slot whose first `start` entries are to be copied into `slot` first, or None. All
            copies of a step come before its first forward pass.
    """

    sequence: SequenceState
    slot: int
    start: int
    tokens: list[int]
    samples: bool
    copy_from: int | None = None
    num_draft_tokens: int = 0

    def verify(self, choose: Callable[[int], Choice]) -> list[Choice]:
        """The choices of this chunk: one, and one more for each guess that came true.

        `choose(n)` gives the choice after the n-th guess, 0 being the last known token; it is asked in
        order, and not beyond a guess that was wrong.
        """
        draft_tokens = self.tokens[len(self.tokens) - self.num_draft_tokens :]
        choices = [choose(0)]
        for number, guess in enumerate(draft_tokens, start=1):
            if guess != choices[-1].id:
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
    """A user's: what was computed for them, in tokens, and the step in which they last had a request here."""

    served: int = 0
    last_step: int = 0


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
        self._pass_tokens = int(_PASS * chunk_tokens)
        self._turn_tokens = _TURN * chunk_tokens
        self._sequences: list[SequenceState] = []  # oldest first
        self._arrivals = 0
        self._contended = 0  # steps in which not all had a place
        self._accounts: dict[str, _Account] = {}  # of the users who have been here lately
        self._steps = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: SequenceState) -> bool:
        return sequence in self._sequences

    def add(self, sequence: SequenceState) -> list[SequenceState]:
        """Take a new sequence; returns those that were dropped to make room.

        Idle ones go first; then one of the user who has the most here, if that is more than this one's has.

        Raises `EngineOverloadedError` if there is no room and nothing to drop. An idle sequence
        itself is dropped, not refused: it comes back in the result.
        """
        dropped: list[SequenceState] = []
        if len(self._sequences) >= self._max_waiting:
            idle = next((other for other in self._sequences if other.priority is Priority.IDLE), None)
            if idle is None and sequence.priority is Priority.IDLE:
                return [sequence]
            victim = idle or self._newest_of_the_heaviest(sequence.user)
            if victim is None:
                raise EngineOverloadedError(
                    f"The model has {self._max_waiting} requests waiting already; "
                    "this one was not taken. Try again in a moment."
                )
            self.remove(victim)
            dropped.append(victim)
        self._arrivals += 1
        sequence.order = self._arrivals
        self._open_account(sequence.user)
        self._sequences.append(sequence)
        return dropped

    def _newest_of_the_heaviest(self, user: str) -> SequenceState | None:
        """A sequence to drop for one of this user: of who has the most, if not of the same user."""
        counts = Counter(sequence.user for sequence in self._sequences)
        heaviest, most = counts.most_common(1)[0]
        if most <= counts[user] + 1:
            return None
        return next(sequence for sequence in reversed(self._sequences) if sequence.user == heaviest)

    def _open_account(self, user: str) -> None:
        """Of a user who has come: being away saves up one turn, no more."""
        present = {sequence.user for sequence in self._sequences}
        if user not in present:
            account = self._accounts.setdefault(user, _Account())
            others = [self._accounts[name].served for name in present]
            if others:
                account.served = max(account.served, min(others) - self._turn_tokens)
        # Who has not been here for long is forgotten, so that there are never more accounts than that.
        recent = {name for name, one in self._accounts.items() if self._is_recent(one)}
        for name in set(self._accounts) - present - recent - {user}:
            del self._accounts[name]

    def _is_recent(self, account: _Account) -> bool:
        return self._steps - account.last_step < _RECENT_STEPS

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty only if there is nothing to do.

        A sequence without a slot takes a free one or, if none is free, that of the least-ranking running
        one, which waits again; its keys and values stay and are found again by their prefix.
        """
        self._steps += bool(self._sequences)
        for user in {sequence.user for sequence in self._sequences}:
            self._accounts[user].last_step = self._steps
        share = self._share()
        ranked = self._ranked() if share is None else self._in_turns(share)
        if ranked and ranked[0].priority is Priority.INTERACTIVE:
            # Idle work stands aside with its slot: what it prewarmed is most likely what is asked for now.
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
        """How many sequences one step takes; there may be fewer slots once memory has run out."""
        return min(self._step_sequences, len(self._slots))

    def _split(self, chosen: list[SequenceState], ranked: list[SequenceState], share: int) -> list[Chunk]:
        """Chunks of several users: equal parts of the budget; who needs less leaves the rest to others.

        Each further user makes a pass longer by at most half of what it takes for the one with the least to
        compute: who decodes is not slowed down by somebody's long prompt.
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
        """Who goes first: the newest; where not all have a place, at every second step the oldest.

        So nobody waits for ever. The oldest is second otherwise: it is not the one that gives its slot away.
        """
        ranked = sorted(self._sequences, key=lambda sequence: sequence.rank, reverse=True)
        num_interactive = sum(sequence.priority is Priority.INTERACTIVE for sequence in ranked)
        if num_interactive > self._places:
            self._contended += 1
            place = 0 if self._contended % _OLDEST_AT == 0 else 1
            ranked.insert(place, ranked.pop(num_interactive - 1))
        return ranked

    def _share(self) -> int | None:
        """How many places and slots a user may have; None while there is one user only."""
        recent = sum(self._is_recent(account) for account in self._accounts.values())
        if recent < 2:
            return None
        if recent > len(self._slots):
            # What they had computed cannot be kept for all of them anyway.
            recent = len({sequence.user for sequence in self._sequences})
        return max(1, self._places // max(1, recent))

    def _in_turns(self, share: int) -> list[SequenceState]:
        """Who goes first among several users: one of each, then a second one of each, and so on.

        The user for whom the least was computed comes first; one who has a slot stays before others for a
        turn. Of each, the newest is first and the oldest second. Those beyond the share come last.
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
        """The least goes first. Of equal ones, who has asked last."""
        has_slot = any(sequence.slot is not None for sequence in queue)
        return self._accounts[user].served - has_slot * self._turn_tokens, -queue[0].order

    def computed(self, chunk: Chunk, num_right: int = 0) -> None:
        """Note that a forward pass has computed this chunk, `num_right` of whose draft_tokens came true."""
        kept = chunk.tokens[: len(chunk.tokens) - chunk.num_draft_tokens + num_right]
        if (account := self._accounts.get(chunk.sequence.user)) is not None:
            account.served += len(chunk.tokens) + self._pass_tokens
        chunk.sequence.num_computed += len(kept)
        self._slots.extend(chunk.slot, kept)

    def remove(self, sequence: SequenceState, *, forget: bool = False) -> None:
        """A sequence leaves: finished, cancelled or failed. `forget` if its slot cannot be trusted."""
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
        """Give a waiting sequence a slot; returns the slot to copy its computed tokens from, if any."""
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
    """These, without what is more than `share` of one user."""
    counts: Counter[str] = Counter()
    kept = []
    for sequence in sequences:
        counts[sequence.user] += 1
        if counts[sequence.user] <= share:
            kept.append(sequence)
    return kept


def _need(sequence: SequenceState) -> int:
    """How many known tokens are not computed."""
    return len(sequence.tokens) - sequence.num_computed


def _chunk(sequence: SequenceState, room: int, copy_from: int | None) -> Chunk:
    """What comes next of a sequence that has a slot, in `room` tokens; draft_tokens if they fit."""
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
