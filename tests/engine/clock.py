"""A time of its own for an event loop, and for the thread of an engine: it passes only while both wait.

So what is measured in it is the same however busy the machine is, and seconds of waiting cost nothing.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import pytest


def in_its_own_time(test):
    """Run an async test with a `Clock` of its own; `time.monotonic` is that."""

    @functools.wraps(test)
    def run(*args, **fixtures):
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", clock.monotonic)
            with asyncio.Runner(loop_factory=clock.loop) as runner:
                runner.run(test(*args, **fixtures))

    return run


class Clock:
    """What `time.monotonic` is there.

    A thread that takes part, that of a `LocalEngine` as a rule, runs only while the loop waits, and the loop
    only while that thread spends time (`spend`) or reads its empty `mailbox`: so nothing depends on which of
    them is quicker.
    """

    def __init__(self):
        self._now = 1000.0
        self._changed = threading.Condition()
        self._thread = None
        self._until = None  # the thread spends time until then
        self._reads = False
        self._loop_waits = False
        self.mailbox = Mailbox(self)

    def monotonic(self):
        return self._now

    def loop(self):
        """An event loop. It does itself what it would do in other threads: no time passes meanwhile."""
        loop = asyncio.SelectorEventLoop(_Selector(self))
        loop.set_default_executor(_Inline(max_workers=1))
        loop.clock = self
        return loop

    def wait(self, seconds, happened):
        """Of the loop: let the thread run and time pass until `happened()`; for so long, or without end."""
        end = None if seconds is None else self._now + seconds
        with self._changed:
            self._loop_waits = True
            self._changed.notify_all()
            try:
                while True:
                    if not self._thread_waits():
                        # Nobody tells that a thread has ended, so it is looked at again.
                        self._changed.wait(0.01)
                    elif found := happened():
                        return found
                    elif self._until is not None and (end is None or self._until <= end):
                        self._now, self._until = self._until, None
                        self._changed.notify_all()
                    elif end is not None:
                        self._now = end
                        return []
                    else:
                        self._changed.wait(0.01)
            finally:
                self._loop_waits = False

    def _thread_waits(self):
        if self._until is not None or (self._reads and self.mailbox.empty()):
            return True
        return self._thread is None or not self._thread.is_alive()

    def takes_part(self):
        """Of the thread, before all else."""
        self._thread = threading.current_thread()

    def spend(self, seconds):
        """Of the thread: it computes for so long."""
        with self._changed:
            self._until = self._now + seconds
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._until is None)

    def read(self, messages):
        """Of the thread: the next one."""
        with self._changed:
            self._reads = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: messages and self._loop_waits)
            self._reads = False
            return messages.popleft()


class Mailbox:
    """A `queue.SimpleQueue` from the loop to the thread. No pause in it lasts: nothing is put off to one."""

    def __init__(self, clock):
        self._clock = clock
        self._messages = deque()

    def put(self, message):
        self._messages.append(message)

    def get(self, timeout=None):
        return self._clock.read(self._messages)

    def empty(self):
        return not self._messages


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        # A busy kernel may deliver what one socket sends to another a moment later. (One is the loop's own.)
        if len(self.get_map()) > 1 and (found := super().select(0.002)):
            return found
        return self._clock.wait(timeout, lambda: super(_Selector, self).select(0))


class _Inline(ThreadPoolExecutor):
    def submit(self, work, /, *args, **kwargs):
        done = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done
