"""Eight people who type on one CPU: the real scheduler and slots, a scripted clock, no model.

A pass costs what it costs on two cores: 30 ms, and 1.2 ms for each further token. Each typist's prompt grows
by a token with each key; a request comes 51 ms after a key unless another key comes first, which cancels
it; it is answered after 12 tokens. Together they ask for several times what the machine can do.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from statistics import mean

import pytest

from midfill.bench.virtual_user import gap_s
from midfill.engine.kv_slots import Slots
from midfill.engine.scheduler import Scheduler, SequenceState

PASS_S, TOKEN_S = 0.030, 0.0012
PROMPT_TOKENS, OUTPUT_TOKENS = 300, 12
REQUEST_AFTER_S = 0.051
KEYS_OF_A_LINE = 30
# After a line people look at what they have: somebody reads it, so a suggestion is wanted.
PAUSE_S = (2.0, 6.0)


@dataclass
class Typist:
    """One person, with a document of their own.

    Attributes:
        waits_s: of the requests that were answered.
        num_cancelled: requests that their next key overtook.
    """

    number: int
    chance: random.Random
    stops_s: float
    tokens: list[int] = field(default_factory=list)
    num_keys: int = 0
    sequence: SequenceState | None = None
    asked_s: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    num_cancelled: int = 0

    def next_gap_s(self) -> float:
        self.num_keys += 1
        return self.chance.uniform(*PAUSE_S) if self.num_keys % KEYS_OF_A_LINE == 0 else gap_s(self.chance)


class Simulation:
    """Events of the typists between passes of the device, in the order of a clock that nothing waits for."""

    def __init__(self, num_typists: int, seconds: float, stops_s: dict[int, float] | None = None) -> None:
        self.now_s = 0.0
        self.scheduler = Scheduler(
            Slots(4), chunk_tokens=64, step_tokens=64, step_sequences=1, max_waiting=64
        )
        stops = stops_s or {}
        self.typists = [
            Typist(number, random.Random(number), stops.get(number, seconds)) for number in range(num_typists)
        ]
        self._counter = itertools.count()
        self._events = []
        self._by_sequence = {}
        for typist in self.typists:
            typist.tokens = [1000 * (typist.number + 1) + place for place in range(PROMPT_TOKENS)]
            self._later(typist.next_gap_s(), self._key, typist)

    def run(self) -> None:
        """Until nobody types and nobody waits."""
        while self._events or len(self.scheduler):
            while self._events and (self._events[0][0] <= self.now_s or not len(self.scheduler)):
                at_s, _, action, typist = heapq.heappop(self._events)
                self.now_s = max(self.now_s, at_s)
                action(typist)
            for chunk in (chunks := self.scheduler.schedule()):
                self.scheduler.computed(chunk)
            self.now_s += PASS_S + TOKEN_S * (sum(len(chunk.tokens) for chunk in chunks) - 1)
            for chunk in chunks:
                if chunk.samples:
                    self._chosen(chunk.sequence)

    def _later(self, delay_s: float, action, typist) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._counter), action, typist))

    def _key(self, typist: Typist) -> None:
        if typist.sequence is not None:
            self.scheduler.remove(typist.sequence)
            typist.sequence = None
            typist.num_cancelled += 1
        typist.tokens.append(typist.num_keys)
        after_s = typist.next_gap_s()
        last = self.now_s + after_s > typist.stops_s
        if after_s > REQUEST_AFTER_S or last:
            self._later(REQUEST_AFTER_S, self._ask, typist)
        if not last:
            self._later(after_s, self._key, typist)

    def _ask(self, typist: Typist) -> None:
        typist.sequence = SequenceState("model", list(typist.tokens))
        typist.asked_s = self.now_s
        self._by_sequence[typist.sequence] = typist
        self.scheduler.add(typist.sequence)

    def _chosen(self, sequence: SequenceState) -> None:
        typist = self._by_sequence[sequence]
        sequence.tokens.append(0)
        if len(sequence.tokens) - len(typist.tokens) == OUTPUT_TOKENS:
            self.scheduler.remove(sequence)
            typist.waits_s.append(self.now_s - typist.asked_s)
            typist.sequence = None


def show(simulation):
    for typist in simulation.typists:
        print(
            f"typist {typist.number}: {len(typist.waits_s)} answered, {typist.num_cancelled} cancelled, "
            f"waited {mean(typist.waits_s or [0]):.2f} s, at most {max(typist.waits_s, default=0):.2f} s"
        )


def test_every_request_that_is_not_cancelled_is_answered_and_nobody_waits_twice_the_mean():
    simulation = Simulation(8, seconds=120)
    simulation.run()
    show(simulation)
    assert all(typist.sequence is None for typist in simulation.typists)
    means = [mean(typist.waits_s) for typist in simulation.typists]
    assert max(means) <= 2 * mean(means)


@pytest.mark.parametrize("patient", range(8))
def test_whoever_pauses_is_answered_though_seven_others_type_on(patient):
    """The newest request is the likeliest to be looked at, but not the only one."""
    simulation = Simulation(8, seconds=60, stops_s={patient: 20.0})
    simulation.run()
    show(simulation)
    typist = simulation.typists[patient]
    assert typist.sequence is None
    # The deadline of a request is 10 s.
    assert typist.waits_s[-1] <= 7.5


def test_one_person_alone_waits_for_nobody():
    simulation = Simulation(1, seconds=60)
    simulation.run()
    (typist,) = simulation.typists
    assert max(typist.waits_s[1:]) <= 0.6
