"""How many threads a forward pass should use, when other programs want the processor too.

The threads of a pass meet several times in each layer, and the first to arrive spins. If another
program keeps one of them from running, each meeting takes a time slice. On two cores a token takes 36 ms
on two threads and 44 ms on one; beside one busy program 155 and 42, beside four 192 and 117. Spin counts
and wait policies were tried (experiment server/docs/experiments/001-threads-by-free-cores.md):
none is good on a quiet and on a busy machine. So a pass
gets no more threads than there are free cores, measured a few times a second while the model works.

Knows no tensors. Runs on the engine thread only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

_WINDOW_S = 0.15
"""The shortest time to judge by: the system counts in steps of 10 ms."""

_NEARLY = 0.35
"""What a core may lack to count as free: the system's own small work, and the error of the counts."""


class Usage(NamedTuple):
    """Clock and counters, in seconds since some start.

    Attributes:
        now_s: the clock.
        idle_s: time that the cores this process may use had nothing to do, added up.
        own_s: processor time of this process, all threads.
    """

    now_s: float
    idle_s: float
    own_s: float


def read_usage() -> Usage:
    """The counters as they are now."""
    times = psutil.cpu_times(percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    idle_s = sum(
        times[core].idle + getattr(times[core], "iowait", 0.0) for core in usable if core < len(times)
    )
    return Usage(time.monotonic(), idle_s, time.process_time())


def num_cores() -> int:
    """Physical cores this process may use: hyper-threads share the units that a matrix product keeps busy."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class FreeCores:
    """Counts the cores that this process has or could have.

    Args:
        most: the most threads to use.
        read: reads the counters.
    """

    def __init__(self, most: int, read: Callable[[], Usage] = read_usage) -> None:
        self._most = most
        self._read = read
        self._last = read()
        self.count = most

    def update(self, now_s: float) -> int:
        """How many threads the next pass should use, from 1 to `most`."""
        if now_s - self._last.now_s >= _WINDOW_S:
            last, self._last = self._last, self._read()
            seconds = self._last.now_s - last.now_s
            free = (self._last.idle_s - last.idle_s + self._last.own_s - last.own_s) / seconds
            self.count = max(1, min(self._most, int(free + _NEARLY)))
        return self.count
