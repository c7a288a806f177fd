"""A forward pass uses no more threads than there are free cores."""

from __future__ import annotations

import pytest

from midfill.engine.torch.threads import ThreadCount, Usage, read_usage


def threads_after(most, *intervals):
    """The threads chosen after intervals of (seconds, idle seconds, own seconds)."""
    now = Usage(0.0, 0.0, 0.0)
    cores = ThreadCount(most, lambda: now)
    for seconds, idle, own in intervals:
        now = Usage(now.now_s + seconds, now.idle_s + idle, now.own_s + own)
        cores.update(now.now_s)
    return cores.count


@pytest.mark.parametrize(
    ("idle", "own", "threads"),
    [
        (2.0, 0.0, 2),  # nothing runs
        (0.0, 2.0, 2),  # only the model
        (0.1, 1.6, 2),  # and a little of everything else
        (0.0, 1.0, 1),  # one other program
        (1.0, 0.1, 1),
        (0.0, 0.4, 1),  # many
    ],
)
def test_what_other_programs_use_is_left_to_them(idle, own, threads):
    assert threads_after(2, (1.0, idle, own)) == threads


def test_all_threads_are_used_at_first_and_again_later():
    assert threads_after(4) == 4
    assert threads_after(4, (1.0, 0.0, 2.0), (1.0, 2.0, 2.0)) == 4


def test_too_short_a_time_tells_nothing():
    assert threads_after(2, (0.1, 0.0, 0.0)) == 2
    assert threads_after(2, (0.1, 0.0, 0.0), (0.1, 0.0, 0.1)) == 1


def test_never_more_than_asked_for():
    assert threads_after(8, (1.0, 16.0, 0.0)) == 8


def test_the_counters_grow():
    first, second = read_usage(), read_usage()
    assert all(after >= before for before, after in zip(first, second, strict=True))
    assert first.own_s > 0
