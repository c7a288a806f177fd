"""Choose how many threads a forward pass uses while other programs want the processor too.

The threads of a pass meet several times in each layer, and the first to arrive spins. If another program
keeps one of them from running, each meeting takes a time slice. On two cores a token takes 36 ms on two
threads and 44 ms on one; beside one busy program 155 and 42, beside four 192 and 117. Spin counts and wait
policies were tried (see the experiments): none is good both on a quiet and on a busy machine. So a pass gets
no more threads than there are free cores, measured a few times a second while the model works.

Knows no tensors. Runs on the engine thread only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

_WINDOW_S = 0.15
"""Shortest interval to measure over: the system counts in steps of 10 ms."""

_FREE_TOLERANCE = 0.35
"""A core counts as free with up to this share in use: small work of the system, errors of counting.
"""


class Usage(NamedTuple):
    """Clock and CPU counters, in seconds since some fixed start.

    Attributes:
        now_s: the clock.
        idle_s: idle time of the cores that this process may use, summed over the cores.
        own_s: processor time of this process, all threads.
    """

    now_s: float
    idle_s: float
    own_s: float


def read_usage() -> Usage:
    """Return the counters as they are now."""
    times = psutil.cpu_times(percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    idle_s = sum(
        times[core].idle + getattr(times[core], "iowait", 0.0) for core in usable if core < len(times)
    )
    return Usage(time.monotonic(), idle_s, time.process_time())


def num_cores() -> int:
    """Return the number of physical cores that this process may use.

    Hyper-threads do not count: they share the units that a matrix product keeps busy.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class ThreadCount:
    """The number of threads for the next pass: as many as there are cores free for this process.

    Args:
        most: maximum number of threads.
        read: reads the counters.

    Attributes:
        count: the latest result of `update`.
    """

    def __init__(self, most: int, read: Callable[[], Usage] = read_usage) -> None:
        self._most = most
        self._read = read
        self._last = read()
        self.count = most

    def update(self, now_s: float) -> int:
        """Measure again if the last measurement is old enough, and return the count: 1 to `most`."""
        if now_s - self._last.now_s >= _WINDOW_S:
            last, self._last = self._last, self._read()
            seconds = self._last.now_s - last.now_s
            free = (self._last.idle_s - last.idle_s + self._last.own_s - last.own_s) / seconds
            self.count = max(1, min(self._most, int(free + _FREE_TOLERANCE)))
        return self.count
