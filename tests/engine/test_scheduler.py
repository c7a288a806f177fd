from __future__ import annotations

import pytest

from midfill.engine.kv_slots import Slots
from midfill.engine.scheduler import Choice, Priority, Scheduler, SequenceState
from midfill.errors import EngineOverloadedError


def make(*, slots=2, chunk=4, step=4, sequences=1, waiting=8) -> Scheduler:
    return Scheduler(
        Slots(slots), chunk_tokens=chunk, step_tokens=step, step_sequences=sequences, max_waiting=waiting
    )


def sequence(*tokens: int, **options) -> SequenceState:
    return SequenceState("key", list(tokens), **options)


def run(scheduler: Scheduler) -> list[list[int]]:
    chunks = scheduler.schedule()
    for chunk in chunks:
        scheduler.computed(chunk)
    return [chunk.tokens for chunk in chunks]


def test_computed_tokens_catch_up_with_known_tokens_in_chunks():
    scheduler = make()
    prompt = sequence(1, 2, 3, 4, 5, 6)
    scheduler.add(prompt)
    first = scheduler.schedule()[0]
    assert (first.start, first.tokens, first.samples) == (0, [1, 2, 3, 4], False)
    scheduler.computed(first)
    last = scheduler.schedule()[0]
    assert (last.start, last.tokens, last.samples) == (4, [5, 6], True)
    scheduler.computed(last)
    prompt.tokens.append(7)
    assert run(scheduler) == [[7]]


def test_the_newest_goes_first_and_the_older_resumes():
    scheduler = make(slots=2)
    old, new = sequence(1, 1, 1, 1, 1, 1), sequence(2, 2)
    scheduler.add(old)
    assert run(scheduler) == [[1, 1, 1, 1]]
    scheduler.add(new)
    assert run(scheduler) == [[2, 2]]
    scheduler.remove(new)
    assert run(scheduler) == [[1, 1]]


def test_the_oldest_has_every_second_step_where_not_all_have_a_place():
    scheduler = make(slots=3, chunk=1)
    for token in (1, 2, 3):
        scheduler.add(sequence(*[token] * 5))
    assert [run(scheduler) for _ in range(4)] == [[[3]], [[1]], [[3]], [[1]]]


def test_where_all_have_a_place_the_newest_is_first():
    scheduler = make(slots=3, chunk=1, step=3, sequences=3)
    for token in (1, 2, 3):
        scheduler.add(sequence(*[token] * 5))
    assert [run(scheduler) for _ in range(2)] == [[[3], [2], [1]]] * 2


def test_without_a_free_slot_neither_the_newest_nor_the_oldest_waits_again():
    scheduler = make(slots=2)
    old, middle = sequence(1, 1, 1, 1, 1, 1), sequence(2, 2, 2, 2, 2, 2)
    scheduler.add(old)
    run(scheduler)
    scheduler.add(middle)
    run(scheduler)
    new = sequence(3, 3)
    scheduler.add(new)
    assert [run(scheduler) for _ in range(2)] == [[[1, 1]], [[3, 3]]]
    assert middle.slot is None
    scheduler.remove(new)
    scheduler.remove(old)
    assert run(scheduler) == [[2, 2, 2, 2]]  # its slot was the only one to take


def test_idle_work_stands_aside_and_its_tokens_are_reused():
    scheduler = make(slots=1)
    idle = sequence(1, 2, 3, 4, 5, 6, priority=Priority.IDLE, samples=False)
    scheduler.add(idle)
    assert run(scheduler) == [[1, 2, 3, 4]]
    typed = sequence(1, 2, 3, 4, 9)
    scheduler.add(typed)
    assert run(scheduler) == [[9]]
    assert typed.num_reused == 4
    scheduler.remove(typed)
    assert run(scheduler) == [[5, 6]]


def test_an_idle_sequence_never_samples():
    scheduler = make()
    scheduler.add(sequence(1, priority=Priority.IDLE, samples=False))
    assert [chunk.samples for chunk in scheduler.schedule()] == [False]


def test_one_step_takes_several_sequences_under_one_budget():
    scheduler = make(slots=3, chunk=4, step=6, sequences=3)
    for token in (1, 2, 3):
        scheduler.add(sequence(*[token] * 5))
    assert run(scheduler) == [[3, 3, 3, 3], [2, 2]]


def test_a_step_with_priorities_holds_only_the_highest():
    scheduler = make(sequences=2)
    scheduler.add(sequence(1, priority=Priority.IDLE))
    scheduler.add(sequence(2))
    assert run(scheduler) == [[2]]


def test_a_full_queue_refuses_but_drops_idle_work_first():
    scheduler = make(waiting=2)
    idle = sequence(1, priority=Priority.IDLE)
    scheduler.add(sequence(2))
    scheduler.add(idle)
    assert scheduler.add(sequence(3)) == [idle]
    with pytest.raises(EngineOverloadedError, match="2 requests"):
        scheduler.add(sequence(4))
    refused = sequence(5, priority=Priority.IDLE)
    assert scheduler.add(refused) == [refused]
    assert len(scheduler) == 2


def test_a_failed_sequence_leaves_nothing_to_reuse():
    scheduler = make()
    failed = sequence(1, 2, 3)
    scheduler.add(failed)
    run(scheduler)
    scheduler.remove(failed, forget=True)
    again = sequence(1, 2, 3, 4)
    scheduler.add(again)
    run(scheduler)
    assert again.num_reused == 0


def test_nothing_to_do():
    assert make().schedule() == []


def test_guesses_are_computed_along_and_kept_as_far_as_they_are_right():
    scheduler = make(chunk=8, step=8)
    prompt = sequence(1, 2, 3)
    prompt.draft_tokens = [4, 5, 6]
    scheduler.add(prompt)
    [chunk] = scheduler.schedule()
    assert (chunk.tokens, chunk.num_draft_tokens, chunk.samples) == ([1, 2, 3, 4, 5, 6], 3, True)
    answers = [Choice(4, -0.1), Choice(9, -0.2), Choice(0, -9.0), Choice(0, -9.0)]
    choices = chunk.verify(answers.__getitem__)
    # The first guess came true, the second did not; what follows it means nothing.
    assert [choice.id for choice in choices] == [4, 9]
    scheduler.computed(chunk, num_accepted=1)
    prompt.tokens += [4, 9]
    prompt.draft_tokens = []
    [chunk] = scheduler.schedule()
    assert (chunk.start, chunk.tokens) == (4, [9])


def test_guesses_take_no_room_from_known_tokens():
    scheduler = make(chunk=4, step=4)
    prompt = sequence(1, 2, 3, 4, 5, 6)
    prompt.draft_tokens = [7, 8, 9]
    scheduler.add(prompt)
    assert run(scheduler) == [[1, 2, 3, 4]]
    assert scheduler.schedule()[0].tokens == [5, 6, 7, 8]


def test_several_sequences_share_a_step():
    scheduler = make(slots=2, chunk=4, step=6, sequences=2)
    old, new = sequence(1, 1, 1, 1), sequence(2, 2, 2)
    scheduler.add(old)
    scheduler.add(new)
    assert run(scheduler) == [[2, 2, 2], [1, 1, 1]]
