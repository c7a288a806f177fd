"""Many people who type, without a model: what `load` measures, computed from measured service times.

A discrete event simulation of typists and replicas of an engine. Keys and requests come as in the episodes;
a request is answered by what is there, joins what is being computed, or is computed; keys take requests back
and end what they contradict, as in `suggestions`. A replica works in steps. Which request gets what of
a step is decided by the engine's own scheduler and slots, on made-up tokens. Pure: no clock, no model.

What is left out: context from other files; guesses but for their mean effect on one request alone; the
network, but for its mean delay.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from midfill.bench.backends import CANCELLED, Asked, Job
from midfill.bench.load import Plan, figures
from midfill.bench.engine_profile import Place, Service, Typed
from midfill.completion.completer import IDLE_DELAY_S, PREFETCH_DELAY_S
from midfill.completion.suggestions import LINGER_S
from midfill.engine.kv_slots import Slots
from midfill.engine.local import MAX_WAITING
from midfill.engine.scheduler import Chunk, Priority, Scheduler
from midfill.engine.scheduler import SequenceState as Tokens
from midfill.errors import EngineOverloadedError


@dataclass(frozen=True, slots=True)
class Fleet:
    """What serves.

    Attributes:
        replicas: engines, each as measured.
        sticky: a typist's requests go to the same one, where the prompt is computed already, unless it is
            much busier than another (`spill`); else each goes to the least loaded one.
        spill: how many more requests than on the least loaded one that is.
        same_files: whether typists at the same place of the same episode share what is computed, as in a
            measured run; in a team hardly anybody types the same text.
    """

    replicas: int = 1
    sticky: bool = True
    spill: int = 8
    same_files: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """A place that is being computed for a typist.

    Attributes:
        key: after which it was asked for.
        num_prompt: tokens of its prompt.
        ahead: of its time, while the typist rests.
        waiting: whether the typist waits for it.
        num_steps: that are done, the one of the first token included.
        lingers: counts the moments in which nobody began to wait.
    """

    typist: _Typist
    visit: int
    key: int
    place: Place
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
        """Whether the text after that key agrees with what has been written by now."""
        typed, same = _follows(self.place, self.key, key)
        if same < 0:
            return False
        if self.ahead:
            return typed == same
        place = self.place
        part = (self.num_steps - place.held) / max(1, place.steps + 1 - place.held)
        written = math.ceil(place.chars * min(1.0, max(0.0, part)))
        return min(typed, written) <= same


def _follows(place: Place, at: int, key: int) -> tuple[int, int]:
    if key <= at:
        return 0, 0
    if key - at <= len(place.follow):
        return place.follow[key - at - 1]
    last = place.follow[-1][1] if place.follow else 0
    return 1_000_000, min(last, place.chars)


@dataclass(slots=True, eq=False)
class _Pass:
    """A step that is under way, from `began_s` on: it takes `seconds`, and each part of it `part_s`."""

    chunks: list[Chunk]
    began_s: float
    seconds: float
    part_s: float
    leaves: bool = False  # when the part under way ends, if nobody waits for it by then

    @property
    def work(self) -> list[tuple[int, int, list[int]]]:
        """What is computed."""
        return [(chunk.slot, chunk.start, chunk.tokens) for chunk in self.chunks]


class _Replica:
    """An engine."""

    def __init__(self, simulation: Simulation, service: Service, most: int) -> None:
        capacity = service.capacity
        self._simulation = simulation
        self._service = service
        # More slots than there can be documents make no difference but time.
        self.scheduler = Scheduler(
            Slots(max(1, min(capacity.slots, most))),
            chunk_tokens=capacity.chunk_tokens,
            step_tokens=capacity.chunk_tokens,
            step_sequences=capacity.sequences,
            max_waiting=MAX_WAITING if capacity.newest_first else 1_000_000,
        )
        self.queue: deque[_Flight] = deque()
        self.flights: dict[Tokens, _Flight] = {}
        self.gone: list[_Flight] = []
        self._pass: _Pass | None = None
        self._left: tuple[list[tuple[int, int, list[int]]], float] | None = None  # what, seconds of it done
        self._has_news = False
        self._warming: Tokens | None = None
        self._to_warm: Tokens | None = None
        self._stops_warming = False

    @property
    def load(self) -> int:
        """Requests that are here."""
        return len(self.flights) + len(self.queue)

    def take(self, flight: _Flight, now: float) -> bool:
        """A request comes. Returns whether it is let in."""
        self._stops_warming |= self._service.capacity.apart
        if self._service.capacity.newest_first:
            try:
                dropped = self.scheduler.add(flight.sequence)
            except EngineOverloadedError:
                return False
            self.flights[flight.sequence] = flight
            for sequence in dropped:
                if sequence in self.flights:
                    self.flights.pop(sequence).over = True
        else:
            self.queue.append(flight)
        self.look(now)
        return True

    def warm(self, sequence: Tokens, now: float) -> None:
        """Compute a prompt when there is nothing else to do; a newer one takes its place."""
        capacity = self._service.capacity
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
        for flight in self.gone:
            self.leave(flight)
        self.gone.clear()
        self._has_news = False
        self._change_warming()
        capacity = self._service.capacity
        self._admit()
        if capacity.knows_idle:
            for sequence, flight in self.flights.items():
                sequence.priority = Priority.INTERACTIVE if flight.waiting else Priority.IDLE
        chunks = self.scheduler.schedule()
        self._pass = None
        if chunks:
            seconds = self._service.step_s(len(chunks), sum(len(chunk.tokens) for chunk in chunks))
            if self._service.begin_ms:
                begun = sum(chunk.start == (chunk.sequence.num_reused or 0) for chunk in chunks)
                seconds += begun * self._service.begin_ms / 1000
            this = self._pass = _Pass(chunks, now, seconds, seconds / capacity.parts)
            if self._left is not None and self._left[0] == this.work:
                this.began_s -= self._left[1]
            self._left = None
            self._simulation.later(this.began_s + seconds, self.end, this)

    def look(self, now: float, *, news: bool = True) -> None:
        """Something has changed: a step that nobody waits for is left when the part under way ends.

        Args:
            now: the time.
            news: whether the engine is told; else it sees it when it is told something else.
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
            flight = self.flights.get(chunk.sequence)
            if flight is not None and flight.over:
                continue
            is_idle = flight is None or (not flight.waiting and self._service.capacity.knows_idle)
            if not (is_idle and self._has_news):
                return True
        return False

    def _leave_pass(self, now: float, this: _Pass) -> None:
        this.leaves = False
        if this is self._pass and not self._is_wanted(this):
            self._left = this.work, now - this.began_s
            self.begin(now)

    def _admit(self) -> None:
        """Who came first gets a place, where that decides. Idle work takes none from those who wait."""
        capacity = self._service.capacity
        while self.queue:
            held = sum(flight.waiting or not capacity.knows_idle for flight in self.flights.values())
            if held >= capacity.sequences:
                return
            flight = next((one for one in self.queue if one.waiting), self.queue[0])
            if not flight.waiting and self.flights and capacity.knows_idle:
                return
            self.queue.remove(flight)
            if not flight.over:
                self.scheduler.add(flight.sequence)
                self.flights[flight.sequence] = flight

    def end(self, now: float, this: _Pass) -> None:
        """A step has ended: each request has a token more, or more of its prompt is computed."""
        if this is not self._pass:
            return
        for chunk in this.chunks:
            self.scheduler.computed(chunk)
            if chunk.sequence is self._warming:
                if chunk.sequence.num_computed == len(chunk.sequence.tokens):
                    self.scheduler.remove(chunk.sequence)
                    self._warming = None
                continue
            flight = self.flights[chunk.sequence]
            if not chunk.samples or flight.over:
                continue
            flight.num_steps += 1
            if flight.num_steps > flight.place.steps:
                self.leave(flight)
                flight.over = True
                flight.typist.finished(flight, now)
            else:
                chunk.sequence.tokens.append(-1)
                flight.typist.written(flight, now)
        self.begin(now)

    def leave(self, flight: _Flight) -> None:
        """A request ends."""
        if self.flights.pop(flight.sequence, None) is not None:
            self.scheduler.remove(flight.sequence)


class _Typist:
    """Somebody who types, and the pipeline that answers."""

    def __init__(self, simulation: Simulation, number: int, order: Iterator[int]) -> None:
        self._simulation = simulation
        self.number = number
        self._order = order
        self._visit = 0
        self._begin_episode()

    def _begin_episode(self) -> None:
        number = next(self._order)
        self._episode_number = number
        self._episode: Typed = self._simulation.service.episodes[number]
        self._visit += 1
        self._key = -1
        self._next_key_s = math.inf
        self._flights: list[_Flight] = []
        self._kept: dict[int, Place] = {}
        self._ahead: set[int] = set()
        self._asked: Asked | None = None

    def start(self, now: float, _: Any) -> None:
        """Open the document."""
        keys = self._episode.keys
        self._next_key_s = now + (keys[0][0] if keys else self._episode.rest_s)
        self._simulation.later(self._next_key_s, self.type, None)
        self._settle(now)

    def _settle(self, now: float) -> None:
        """Who rests for long has the prompt of the place computed; at first that of the end of the text."""
        if now + IDLE_DELAY_S < self._next_key_s:
            self._simulation.later(now + IDLE_DELAY_S, self._warm, (self._visit, self._key))

    def _warm(self, now: float, what: tuple[int, int]) -> None:
        if what != (self._visit, self._key):
            return
        places = self._episode.places
        key = max((key for key in places if key <= self._key), default=-1)
        tokens = self._simulation.prompt(self._episode_number, key, places.get(key))
        sequence = Tokens(self._owner, tokens, Priority.IDLE, samples=False)
        self._simulation.route(self.number).warm(sequence, now)

    @property
    def _owner(self) -> str | None:
        """Whose computed prompts its requests may use."""
        return None if self._simulation.fleet.same_files else str(self.number)

    def type(self, now: float, _: Any) -> None:
        """The next key, or the end of the episode."""
        episode = self._episode
        self._take_back(now)
        if self._key + 1 >= len(episode.keys):
            for flight in self._flights:
                self._end(flight, now)
            self._begin_episode()
            self.start(now, None)
            return
        self._key += 1
        for flight in list(self._flights):
            if not flight.agrees(self._key):
                self._end(flight, now)
            elif not flight.waiting and not flight.ahead:
                self._linger(flight, now)
        last = self._key + 1 == len(episode.keys)
        self._next_key_s = now + (episode.rest_s if last else episode.keys[self._key + 1][0])
        after_s = episode.keys[self._key][1]
        if after_s is not None and now + after_s < self._next_key_s:
            self._simulation.later(now + after_s, self.ask, None)
        self._simulation.later(self._next_key_s, self.type, None)

    def _take_back(self, now: float) -> None:
        asked, self._asked = self._asked, None
        if asked is None:
            return
        asked.cancelled_s = asked.answered_s = now
        asked.code = CANCELLED
        for flight in self._flights:
            if flight.waiting:
                self._linger(flight, now)

    def _linger(self, flight: _Flight, now: float) -> None:
        flight.waiting = False
        flight.replica.look(now, news=False)
        flight.lingers += 1
        self._simulation.later(now + LINGER_S, self._stop_lingering, (flight, flight.lingers))

    def _stop_lingering(self, now: float, what: tuple[_Flight, int]) -> None:
        flight, lingers = what
        if not flight.waiting and flight.lingers == lingers and not flight.over:
            self._end(flight, now)

    def _end(self, flight: _Flight, now: float) -> None:
        if flight in self._flights:
            self._flights.remove(flight)
        if not flight.over:
            flight.over = True
            flight.replica.gone.append(flight)
            flight.replica.look(now)

    def ask(self, now: float, _: Any) -> None:
        """The editor asks."""
        asked = self._asked = Asked(self._episode_number, now)
        self._simulation.requests.append(asked)
        if self._key not in self._episode.places and self._key not in self._episode.covered:
            self._answer(now + self._simulation.service.reuse_ms / 1000, "", "none", "mid-word")
            return
        self._resolve(now)

    def _resolve(self, now: float) -> None:
        """Answer with what there is, or join what is computed, or have it computed."""
        for key, place in reversed(self._kept.items()):
            if self._covers(key, place):
                at_s = now + self._simulation.service.reuse_ms / 1000
                self._answer(at_s, "x", "typed-through")
                self._look_ahead(key, place, at_s)
                return
        for flight in reversed(self._flights):
            if not flight.ahead and not flight.over and flight.agrees(self._key):
                flight.waiting = True
                return
        self._launch(now, self._place(), self._key)

    def _covers(self, key: int, place: Place) -> bool:
        """Whether what was suggested there holds here."""
        typed, same = _follows(place, key, self._key)
        covered = self._episode.covered
        # Beyond the suggestion, what the model went on with may do, where it did for the typist who waited.
        goes_on = self._key in covered and covered[self._key] == covered.get(key, key)
        return typed == same and (typed < place.shown or (goes_on and typed < place.chars))

    def _place(self) -> Place:
        """What is to be computed here. Where one typist who waits has it already, the rest of that."""
        episode = self._episode
        if (place := episode.places.get(self._key)) is not None:
            return place
        of = episode.covered[self._key]
        whole = episode.places[of]
        typed, _ = _follows(whole, of, self._key)
        left = max(0.0, 1 - typed / max(whole.chars, 1))
        return Place(
            whole.num_prompt + 1,
            whole.num_prompt,
            round(whole.steps * left),
            0,
            max(1, round(whole.chars * left)),
            max(1, whole.shown - typed),
            tuple((d - typed, same - typed) for d, same in whole.follow[self._key - of :]),
        )

    def _launch(self, now: float, place: Place, key: int, *, ahead: bool = False) -> None:
        tokens = self._simulation.prompt(self._episode_number, key, place, ahead=ahead)
        sequence = Tokens(self._owner, tokens, Priority.IDLE if ahead else Priority.INTERACTIVE)
        replica = self._simulation.route(self.number)
        flight = _Flight(
            self, self._visit, key, place, now, sequence, len(tokens), replica, ahead=ahead, waiting=not ahead
        )
        self._simulation.launched.append(flight)
        self._flights.append(flight)
        if not replica.take(flight, now):
            self._fail(flight, now)
            return
        self._simulation.later(now + self._simulation.service.deadline_s, self._time_out, flight)

    def _time_out(self, now: float, flight: _Flight) -> None:
        if not flight.over:
            self._end(flight, now)
            self._fail(flight, now)

    def _fail(self, flight: _Flight, now: float) -> None:
        if flight in self._flights:
            self._flights.remove(flight)
        flight.over = True
        if flight.waiting and self._asked is not None:
            self._answer(now, "", "none", "deadline")

    def written(self, flight: _Flight, now: float) -> None:
        """The model has written one more token."""
        if not flight.agrees(self._key):
            self._end(flight, now)
            if flight.waiting and self._asked is not None:
                self._resolve(now)

    def finished(self, flight: _Flight, now: float) -> None:
        """The model has come to the end of a suggestion."""
        if flight not in self._flights:
            return
        self._flights.remove(flight)
        if flight.ahead:
            return
        self._kept[flight.key] = flight.place
        if not flight.waiting or self._asked is None:
            return
        typed, same = _follows(flight.place, flight.key, self._key)
        at_s = now + self._simulation.service.overhead_ms / 1000
        source = "model" if flight.launched_s >= self._asked.asked_s else "joined"
        if not typed:
            self._answer(at_s, "x" if flight.place.shown else "", source, "low-confidence")
            if flight.place.shown:
                self._look_ahead(flight.key, flight.place, at_s)
        elif typed == same and typed < flight.place.shown:
            self._answer(at_s, "x", "joined")
            self._look_ahead(flight.key, flight.place, at_s)
        else:
            self._resolve(now)

    def _answer(self, at_s: float, text: str, source: str, reason: str | None = None) -> None:
        """The answer is there at that time. If the next key comes before, that takes the request back."""
        if self._asked is None or at_s >= self._next_key_s:
            return
        self._settle(at_s)
        asked, self._asked = self._asked, None
        asked.answered_s = at_s
        asked.text, asked.source, asked.reason = text, source if text else "none", None if text else reason

    def _look_ahead(self, key: int, place: Place, at_s: float) -> None:
        """While the typist rests, what comes next is computed, as if the suggestion had been accepted."""
        if at_s + PREFETCH_DELAY_S < self._next_key_s:
            self._simulation.later(at_s + PREFETCH_DELAY_S, self._prefetch, (self._visit, self._key, key, place))

    def _prefetch(self, now: float, what: tuple[int, int, int, Place]) -> None:
        visit, at_key, key, place = what
        if (visit, at_key) == (self._visit, self._key) and key not in self._ahead:
            self._ahead.add(key)
            self._launch(now, place, key, ahead=True)


@dataclass(slots=True)
class Simulation:
    """See the module. `run` once."""

    service: Service
    plan: Plan
    fleet: Fleet
    requests: list[Asked] = field(default_factory=list)
    launched: list[_Flight] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[float, Any], None], Any]] = field(default_factory=list)
    _counter: Iterator[int] = field(default_factory=itertools.count)
    _replicas: list[_Replica] = field(default_factory=list)
    _prompts: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        most = 2 * math.ceil(self.plan.users / self.fleet.replicas) + 4
        self._replicas = [_Replica(self, self.service, most) for _ in range(self.fleet.replicas)]
        fresh = itertools.count(1)
        for number, episode in enumerate(self.service.episodes):
            before: list[int] = []
            sizes = [place.num_prompt for place in episode.places.values()]
            self._prompts[number, -1] = [next(fresh) for _ in range(max(sizes, default=1))]
            for key, place in sorted(episode.places.items()):
                same = min(place.num_same, len(before))
                before = before[:same] + [next(fresh) for _ in range(max(1, place.num_prompt - same))]
                self._prompts[number, key] = before

    def run(self) -> dict[str, Any]:
        """`load.figures` of it, and the share of the time that the replicas work."""
        for user in range(self.plan.users):
            delay_s, order = self.plan.order(user, len(self.service.episodes))
            typist = _Typist(self, user, order)
            self.later(delay_s, typist.start, None)
        events = self._events
        while events and events[0][0] < self.plan.seconds:
            now, _, action, what = heapq.heappop(events)
            action(now, what)
        for asked in self.requests:
            if asked.answered_s is None:
                # Whoever stops typing takes back what was asked for last.
                asked.cancelled_s = asked.answered_s = self.plan.seconds
                asked.code = CANCELLED
        return figures(self.requests, [_job(flight) for flight in self.launched], 0.0, self.plan)

    def later(self, at_s: float, action: Callable[[float, Any], None], what: Any) -> None:
        """Call `action(at_s, what)` then."""
        heapq.heappush(self._events, (at_s, next(self._counter), action, what))

    def prompt(self, episode: int, key: int, place: Place | None, *, ahead: bool = False) -> list[int]:
        """Tokens of a place that have in common what its prompts have in common; -1: the end of the text."""
        known = self._prompts.get((episode, key))
        if known is None:
            before = max(at for number, at in self._prompts if number == episode and at < key)
            known = [*self._prompts[episode, before], -2]
        return [*known, *([-3] * (place.steps + 1))] if ahead and place is not None else list(known)

    def route(self, user: int) -> _Replica:
        """Which replica gets a request."""
        if self.fleet.replicas == 1:
            return self._replicas[0]
        least = min(self._replicas, key=lambda replica: replica.load)
        if not self.fleet.sticky:
            return least
        own = self._replicas[user % self.fleet.replicas]
        return own if own.load <= least.load + self.fleet.spill else least


def _job(flight: _Flight) -> Job:
    reused = flight.sequence.num_reused  # None until its turn has come
    return Job(
        -1,
        None,
        "finished",
        idle=flight.ahead,
        num_prompt=flight.num_prompt,
        num_reused=reused,
        num_computed=None if reused is None else flight.num_prompt - reused,
        submitted_s=flight.launched_s,
    )


def predict(service: Service, plan: Plan, fleet: Fleet | None = None) -> dict[str, Any]:
    """What `load.play` would measure; see `load.figures`."""
    return Simulation(service, plan, fleet or Fleet(same_files=True)).run()
