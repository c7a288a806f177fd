"""Predict a load test without a model: a discrete event simulation of virtual users and engine replicas.

Keys and requests come as in the typing sessions. A request is answered from the cache, joins an in-flight
completion, or starts one; keys cancel requests and end completions that they contradict, as in the real
pipeline. A replica works in steps, which the engine's own scheduler and KV slots fill, on made-up tokens.
Service times come from an `EngineProfile`. Pure: no clock, no model.

Not simulated: context from other files; speculative decoding except its mean effect on a single request; the
network except its mean delay.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from midfill.bench.backends import CANCELLED, EngineJob, SuggestionRequest
from midfill.bench.engine_profile import CompletionCost, EngineProfile, SessionProfile
from midfill.bench.load import LoadPlan, figures
from midfill.completion.idle import IDLE_DELAY_S, PREFETCH_DELAY_S
from midfill.completion.in_flight import LINGER_S
from midfill.engine.kv_slots import Slots
from midfill.engine.local import MAX_WAITING
from midfill.engine.scheduler import Chunk, Priority, Scheduler
from midfill.engine.scheduler import SequenceState as Tokens
from midfill.errors import EngineOverloadedError


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """The replicas of an engine, and how requests are routed to them.

    Attributes:
        replicas: number of engines, each as measured.
        sticky: send a user's requests to the same replica, which has the prompt in its KV cache, unless that
            is much busier than another (`spill`); otherwise send each to the least loaded replica.
        spill: requests above those of the least loaded replica from which on a replica is too busy.
        same_files: whether users who type the same session share the KV cache, as in a measured run; in a
            team hardly any two users type the same text.
    """

    replicas: int = 1
    sticky: bool = True
    spill: int = 8
    same_files: bool = False


@dataclass(slots=True, eq=False)
class _InFlight:
    """A completion that is being computed for a virtual user.

    Attributes:
        key: after which it was asked for.
        num_prompt: tokens of its prompt.
        ahead: whether it is a prefetch, while the user is idle.
        waiting: whether the user waits for it.
        num_steps: that are done, the one of the first token included.
        lingers: how often it was left without a waiting user.
    """

    virtual_user: _VirtualUser
    visit: int
    key: int
    cost: CompletionCost
    launched_s: float
    sequence: Tokens
    num_prompt: int
    replica: _Replica
    ahead: bool = False
    waiting: bool = True
    num_steps: int = 0
    lingers: int = 0
    over: bool = False

    def agrees(self, key: int) -> bool:
        """Return whether the text after a key agrees with the tokens generated so far."""
        typed, same = _follows(self.cost, self.key, key)
        if same < 0:
            return False
        if self.ahead:
            return typed == same
        cost = self.cost
        part = (self.num_steps - cost.held) / max(1, cost.steps + 1 - cost.held)
        written = math.ceil(cost.chars * min(1.0, max(0.0, part)))
        return min(typed, written) <= same


def _follows(cost: CompletionCost, at: int, key: int) -> tuple[int, int]:
    if key <= at:
        return 0, 0
    if key - at <= len(cost.follow):
        return cost.follow[key - at - 1]
    last = cost.follow[-1][1] if cost.follow else 0
    return 1_000_000, min(last, cost.chars)


@dataclass(slots=True, eq=False)
class _Pass:
    """A step that runs from `began_s` on for `seconds`, in parts of `part_s` each."""

    chunks: list[Chunk]
    began_s: float
    seconds: float
    part_s: float
    leaves: bool = False  # whether it is to be aborted at the end of the present part

    @property
    def work(self) -> list[tuple[int, int, list[int]]]:
        """The tokens that the step computes."""
        return [(chunk.slot, chunk.start, chunk.tokens) for chunk in self.chunks]


class _Replica:
    """A replica of the engine."""

    def __init__(self, simulation: Simulation, profile: EngineProfile, most: int) -> None:
        capacity = profile.capacity
        self._simulation = simulation
        self._profile = profile
        # More slots than there can be documents make no difference but time.
        self.scheduler = Scheduler(
            Slots(max(1, min(capacity.slots, most))),
            chunk_tokens=capacity.chunk_tokens,
            step_tokens=capacity.chunk_tokens,
            step_sequences=capacity.sequences,
            max_waiting=MAX_WAITING if capacity.newest_first else 1_000_000,
        )
        self.queue: deque[_InFlight] = deque()
        self.completions: dict[Tokens, _InFlight] = {}
        self.gone: list[_InFlight] = []
        self._pass: _Pass | None = None
        self._left: tuple[list[tuple[int, int, list[int]]], float] | None = None  # what, seconds of it done
        self._has_news = False
        self._warming: Tokens | None = None
        self._to_warm: Tokens | None = None
        self._stops_warming = False

    @property
    def load(self) -> int:
        """Number of requests, running and queued."""
        return len(self.completions) + len(self.queue)

    def take(self, completion: _InFlight, now: float) -> bool:
        """Accept a request; return False if it is rejected for overload."""
        self._stops_warming |= self._profile.capacity.apart
        if self._profile.capacity.newest_first:
            try:
                dropped = self.scheduler.add(completion.sequence)
            except EngineOverloadedError:
                return False
            self.completions[completion.sequence] = completion
            for sequence in dropped:
                if sequence in self.completions:
                    self.completions.pop(sequence).over = True
        else:
            self.queue.append(completion)
        self.look(now)
        return True

    def warm(self, sequence: Tokens, now: float) -> None:
        """Compute a prompt ahead when idle; it replaces an older one."""
        capacity = self._profile.capacity
        if not capacity.warms or (capacity.apart and self.load):
            return
        self._to_warm = sequence
        self.look(now)

    def _change_warming(self) -> None:
        if self._warming is not None and (self._stops_warming or self._to_warm is not None):
            self.scheduler.remove(self._warming)
            self._warming = None
        if self._to_warm is not None and not self._stops_warming:
            dropped = self.scheduler.add(self._to_warm)
            self._warming = None if self._to_warm in dropped else self._to_warm
        self._to_warm, self._stops_warming = None, False

    def begin(self, now: float) -> None:
        """Begin a step, if there is anything to do."""
        for completion in self.gone:
            self.leave(completion)
        self.gone.clear()
        self._has_news = False
        self._change_warming()
        capacity = self._profile.capacity
        self._admit()
        if capacity.knows_idle:
            for sequence, completion in self.completions.items():
                sequence.priority = Priority.INTERACTIVE if completion.waiting else Priority.IDLE
        chunks = self.scheduler.schedule()
        self._pass = None
        if chunks:
            seconds = self._profile.step_s(len(chunks), sum(len(chunk.tokens) for chunk in chunks))
            if self._profile.begin_ms:
                begun = sum(chunk.start == (chunk.sequence.num_reused or 0) for chunk in chunks)
                seconds += begun * self._profile.begin_ms / 1000
            this = self._pass = _Pass(chunks, now, seconds, seconds / capacity.parts)
            if self._left is not None and self._left[0] == this.work:
                this.began_s -= self._left[1]
            self._left = None
            self._simulation.later(this.began_s + seconds, self.end, this)

    def look(self, now: float, *, news: bool = True) -> None:
        """React to a change: abort the step after its present part if it is not needed any more.

        Args:
            now: the time.
            news: whether the engine is notified; if not, it notices at the next notification.
        """
        self._has_news |= news
        this = self._pass
        if this is None:
            if news:
                self.begin(now)
        elif not (this.leaves or self._is_wanted(this)):
            at_s = this.began_s + (math.floor((now - this.began_s) / this.part_s) + 1) * this.part_s
            if at_s < this.began_s + this.seconds - this.part_s / 2:
                this.leaves = True
                self._simulation.later(at_s, self._leave_pass, this)

    def _is_wanted(self, this: _Pass) -> bool:
        for chunk in this.chunks:
            completion = self.completions.get(chunk.sequence)
            if completion is not None and completion.over:
                continue
            is_idle = completion is None or (not completion.waiting and self._profile.capacity.knows_idle)
            if not (is_idle and self._has_news):
                return True
        return False

    def _leave_pass(self, now: float, this: _Pass) -> None:
        this.leaves = False
        if this is self._pass and not self._is_wanted(this):
            self._left = this.work, now - this.began_s
            self.begin(now)

    def _admit(self) -> None:
        """Admit queued requests, first come, first served; idle work only if no request waits."""
        capacity = self._profile.capacity
        while self.queue:
            held = sum(one.waiting or not capacity.knows_idle for one in self.completions.values())
            if held >= capacity.sequences:
                return
            completion = next((one for one in self.queue if one.waiting), self.queue[0])
            if not completion.waiting and self.completions and capacity.knows_idle:
                return
            self.queue.remove(completion)
            if not completion.over:
                self.scheduler.add(completion.sequence)
                self.completions[completion.sequence] = completion

    def end(self, now: float, this: _Pass) -> None:
        """End a step: each of its requests has one more token, or more of its prompt computed."""
        if this is not self._pass:
            return
        for chunk in this.chunks:
            self.scheduler.computed(chunk)
            if chunk.sequence is self._warming:
                if chunk.sequence.num_computed == len(chunk.sequence.tokens):
                    self.scheduler.remove(chunk.sequence)
                    self._warming = None
                continue
            completion = self.completions[chunk.sequence]
            if not chunk.samples or completion.over:
                continue
            completion.num_steps += 1
            if completion.num_steps > completion.cost.steps:
                self.leave(completion)
                completion.over = True
                completion.virtual_user.finished(completion, now)
            else:
                chunk.sequence.tokens.append(-1)
                completion.virtual_user.written(completion, now)
        self.begin(now)

    def leave(self, completion: _InFlight) -> None:
        """Remove a request."""
        if self.completions.pop(completion.sequence, None) is not None:
            self.scheduler.remove(completion.sequence)


class _VirtualUser:
    """A virtual user with the pipeline that answers it."""

    def __init__(self, simulation: Simulation, number: int, order: Iterator[int]) -> None:
        self._simulation = simulation
        self.number = number
        self._order = order
        self._visit = 0
        self._begin_session()

    def _begin_session(self) -> None:
        number = next(self._order)
        self._session_number = number
        self._session: SessionProfile = self._simulation.profile.sessions[number]
        self._visit += 1
        self._key = -1
        self._next_key_s = math.inf
        self._completions: list[_InFlight] = []
        self._kept: dict[int, CompletionCost] = {}
        self._ahead: set[int] = set()
        self._request: SuggestionRequest | None = None

    def start(self, now: float, _: Any) -> None:
        """Open the document."""
        keys = self._session.keys
        self._next_key_s = now + (keys[0][0] if keys else self._session.rest_s)
        self._simulation.later(self._next_key_s, self.type, None)
        self._warm_up_when_idle(now)

    def _warm_up_when_idle(self, now: float) -> None:
        """Compute the prompt at the cursor ahead if the user stays idle; at first, at the end of the text."""
        if now + IDLE_DELAY_S < self._next_key_s:
            self._simulation.later(now + IDLE_DELAY_S, self._warm, (self._visit, self._key))

    def _warm(self, now: float, what: tuple[int, int]) -> None:
        if what != (self._visit, self._key):
            return
        costs = self._session.costs
        key = max((key for key in costs if key <= self._key), default=-1)
        tokens = self._simulation.prompt(self._session_number, key, costs.get(key))
        sequence = Tokens(self._owner, tokens, Priority.IDLE, samples=False)
        self._simulation.route(self.number).warm(sequence, now)

    @property
    def _owner(self) -> str | None:
        """The owner of the KV cache that its requests may reuse; None is everybody."""
        return None if self._simulation.replica_set.same_files else str(self.number)

    def type(self, now: float, _: Any) -> None:
        """Type the next key, or end the session."""
        session = self._session
        self._cancel(now)
        if self._key + 1 >= len(session.keys):
            for completion in self._completions:
                self._end(completion, now)
            self._begin_session()
            self.start(now, None)
            return
        self._key += 1
        for completion in list(self._completions):
            if not completion.agrees(self._key):
                self._end(completion, now)
            elif not completion.waiting and not completion.ahead:
                self._linger(completion, now)
        last = self._key + 1 == len(session.keys)
        self._next_key_s = now + (session.rest_s if last else session.keys[self._key + 1][0])
        after_s = session.keys[self._key][1]
        if after_s is not None and now + after_s < self._next_key_s:
            self._simulation.later(now + after_s, self.ask, None)
        self._simulation.later(self._next_key_s, self.type, None)

    def _cancel(self, now: float) -> None:
        request, self._request = self._request, None
        if request is None:
            return
        request.cancelled_s = request.answered_s = now
        request.code = CANCELLED
        for completion in self._completions:
            if completion.waiting:
                self._linger(completion, now)

    def _linger(self, completion: _InFlight, now: float) -> None:
        completion.waiting = False
        completion.replica.look(now, news=False)
        completion.lingers += 1
        self._simulation.later(now + LINGER_S, self._stop_lingering, (completion, completion.lingers))

    def _stop_lingering(self, now: float, what: tuple[_InFlight, int]) -> None:
        completion, lingers = what
        if not completion.waiting and completion.lingers == lingers and not completion.over:
            self._end(completion, now)

    def _end(self, completion: _InFlight, now: float) -> None:
        if completion in self._completions:
            self._completions.remove(completion)
        if not completion.over:
            completion.over = True
            completion.replica.gone.append(completion)
            completion.replica.look(now)

    def ask(self, now: float, _: Any) -> None:
        """Send the editor's request."""
        request = self._request = SuggestionRequest(self._session_number, now)
        self._simulation.requests.append(request)
        if self._key not in self._session.costs and self._key not in self._session.covered:
            self._answer(now + self._simulation.profile.reuse_ms / 1000, "", "none", "mid-word")
            return
        self._resolve(now)

    def _resolve(self, now: float) -> None:
        """Answer from the cache, or join an in-flight completion, or start one."""
        for key, cost in reversed(self._kept.items()):
            if self._covers(key, cost):
                at_s = now + self._simulation.profile.reuse_ms / 1000
                self._answer(at_s, "x", "typed-through")
                self._look_ahead(key, cost, at_s)
                return
        for completion in reversed(self._completions):
            if not completion.ahead and not completion.over and completion.agrees(self._key):
                completion.waiting = True
                return
        self._launch(now, self._cost(), self._key)

    def _covers(self, key: int, cost: CompletionCost) -> bool:
        """Return whether the suggestion of an earlier key answers the present request."""
        typed, same = _follows(cost, key, self._key)
        covered = self._session.covered
        # Beyond the shown suggestion, the rest of the model's text may do, if it did in the profile.
        goes_on = self._key in covered and covered[self._key] == covered.get(key, key)
        return typed == same and (typed < cost.shown or (goes_on and typed < cost.chars))

    def _cost(self) -> CompletionCost:
        """Return the cost of a completion here; where the profile reused a result, that of its rest."""
        session = self._session
        if (cost := session.costs.get(self._key)) is not None:
            return cost
        of = session.covered[self._key]
        whole = session.costs[of]
        typed, _ = _follows(whole, of, self._key)
        left = max(0.0, 1 - typed / max(whole.chars, 1))
        return CompletionCost(
            whole.num_prompt + 1,
            whole.num_prompt,
            round(whole.steps * left),
            0,
            max(1, round(whole.chars * left)),
            max(1, whole.shown - typed),
            tuple((d - typed, same - typed) for d, same in whole.follow[self._key - of :]),
        )

    def _launch(self, now: float, cost: CompletionCost, key: int, *, ahead: bool = False) -> None:
        tokens = self._simulation.prompt(self._session_number, key, cost, ahead=ahead)
        sequence = Tokens(self._owner, tokens, Priority.IDLE if ahead else Priority.INTERACTIVE)
        replica = self._simulation.route(self.number)
        completion = _InFlight(
            self, self._visit, key, cost, now, sequence, len(tokens), replica, ahead=ahead, waiting=not ahead
        )
        self._simulation.launched.append(completion)
        self._completions.append(completion)
        if not replica.take(completion, now):
            self._fail(completion, now)
            return
        self._simulation.later(now + self._simulation.profile.deadline_s, self._time_out, completion)

    def _time_out(self, now: float, completion: _InFlight) -> None:
        if not completion.over:
            self._end(completion, now)
            self._fail(completion, now)

    def _fail(self, completion: _InFlight, now: float) -> None:
        if completion in self._completions:
            self._completions.remove(completion)
        completion.over = True
        if completion.waiting and self._request is not None:
            self._answer(now, "", "none", "deadline")

    def written(self, completion: _InFlight, now: float) -> None:
        """Handle one more token of a completion."""
        if not completion.agrees(self._key):
            self._end(completion, now)
            if completion.waiting and self._request is not None:
                self._resolve(now)

    def finished(self, completion: _InFlight, now: float) -> None:
        """Handle the end of a completion."""
        if completion not in self._completions:
            return
        self._completions.remove(completion)
        if completion.ahead:
            return
        self._kept[completion.key] = completion.cost
        if not completion.waiting or self._request is None:
            return
        typed, same = _follows(completion.cost, completion.key, self._key)
        at_s = now + self._simulation.profile.overhead_ms / 1000
        source = "model" if completion.launched_s >= self._request.asked_s else "joined"
        if not typed:
            self._answer(at_s, "x" if completion.cost.shown else "", source, "low-confidence")
            if completion.cost.shown:
                self._look_ahead(completion.key, completion.cost, at_s)
        elif typed == same and typed < completion.cost.shown:
            self._answer(at_s, "x", "joined")
            self._look_ahead(completion.key, completion.cost, at_s)
        else:
            self._resolve(now)

    def _answer(self, at_s: float, text: str, source: str, reason: str | None = None) -> None:
        """Answer the request at a time, unless the next key cancels it before."""
        if self._request is None or at_s >= self._next_key_s:
            return
        self._warm_up_when_idle(at_s)
        request, self._request = self._request, None
        request.answered_s, request.text = at_s, text
        request.source, request.reason = (source, None) if text else ("none", reason)

    def _look_ahead(self, key: int, cost: CompletionCost, at_s: float) -> None:
        """Prefetch as if the suggestion had been accepted, if the user stays idle."""
        if at_s + PREFETCH_DELAY_S < self._next_key_s:
            self._simulation.later(
                at_s + PREFETCH_DELAY_S, self._prefetch, (self._visit, self._key, key, cost)
            )

    def _prefetch(self, now: float, what: tuple[int, int, int, CompletionCost]) -> None:
        visit, at_key, key, cost = what
        if (visit, at_key) == (self._visit, self._key) and key not in self._ahead:
            self._ahead.add(key)
            self._launch(now, cost, key, ahead=True)


@dataclass(slots=True)
class Simulation:
    """One simulation; call `run` once."""

    profile: EngineProfile
    plan: LoadPlan
    replica_set: ReplicaSet
    requests: list[SuggestionRequest] = field(default_factory=list)
    launched: list[_InFlight] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[float, Any], None], Any]] = field(default_factory=list)
    _counter: Iterator[int] = field(default_factory=itertools.count)
    _replicas: list[_Replica] = field(default_factory=list)
    _prompts: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        most = 2 * math.ceil(self.plan.users / self.replica_set.replicas) + 4
        self._replicas = [_Replica(self, self.profile, most) for _ in range(self.replica_set.replicas)]
        fresh = itertools.count(1)
        for number, session in enumerate(self.profile.sessions):
            before: list[int] = []
            sizes = [cost.num_prompt for cost in session.costs.values()]
            self._prompts[number, -1] = [next(fresh) for _ in range(max(sizes, default=1))]
            for key, cost in sorted(session.costs.items()):
                same = min(cost.num_same, len(before))
                before = before[:same] + [next(fresh) for _ in range(max(1, cost.num_prompt - same))]
                self._prompts[number, key] = before

    def run(self) -> dict[str, Any]:
        """Run the simulation; return `load.figures` of it."""
        for user in range(self.plan.users):
            delay_s, order = self.plan.order(user, len(self.profile.sessions))
            virtual_user = _VirtualUser(self, user, order)
            self.later(delay_s, virtual_user.start, None)
        events = self._events
        while events and events[0][0] < self.plan.seconds:
            now, _, action, what = heapq.heappop(events)
            action(now, what)
        for request in self.requests:
            if request.answered_s is None:
                # The last request of each user is cancelled at the end.
                request.cancelled_s = request.answered_s = self.plan.seconds
                request.code = CANCELLED
        return figures(self.requests, [_job(completion) for completion in self.launched], 0.0, self.plan)

    def later(self, at_s: float, action: Callable[[float, Any], None], what: Any) -> None:
        """Schedule the call `action(at_s, what)`."""
        heapq.heappush(self._events, (at_s, next(self._counter), action, what))

    def prompt(
        self, session: int, key: int, cost: CompletionCost | None, *, ahead: bool = False
    ) -> list[int]:
        """Return made-up tokens of a key's prompt (-1: end of the text), with the real common prefixes."""
        known = self._prompts.get((session, key))
        if known is None:
            before = max(at for number, at in self._prompts if number == session and at < key)
            known = [*self._prompts[session, before], -2]
        return [*known, *([-3] * (cost.steps + 1))] if ahead and cost is not None else list(known)

    def route(self, user: int) -> _Replica:
        """Return the replica for a user's request."""
        if self.replica_set.replicas == 1:
            return self._replicas[0]
        least = min(self._replicas, key=lambda replica: replica.load)
        if not self.replica_set.sticky:
            return least
        own = self._replicas[user % self.replica_set.replicas]
        return own if own.load <= least.load + self.replica_set.spill else least


def _job(completion: _InFlight) -> EngineJob:
    reused = completion.sequence.num_reused  # None until its turn has come
    return EngineJob(
        -1,
        None,
        "finished",
        idle=completion.ahead,
        num_prompt=completion.num_prompt,
        num_reused=reused,
        num_computed=None if reused is None else completion.num_prompt - reused,
        submitted_s=completion.launched_s,
    )


def predict(profile: EngineProfile, plan: LoadPlan, replica_set: ReplicaSet | None = None) -> dict[str, Any]:
    """Predict the figures that `load.play` would measure; see `load.figures`."""
    return Simulation(profile, plan, replica_set or ReplicaSet(same_files=True)).run()
