"""An event loop whose clock jumps to the next timer when there is nothing to do: waiting costs no time."""

from __future__ import annotations

import asyncio
import selectors


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0 if timeout is None or timeout > 0 else timeout)
        if not ready and timeout is None:
            raise AssertionError("everybody waits, and nothing is ever going to happen")
        if not ready:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Only for code that waits for nothing but this loop: no threads, no other processes."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(main):
    """Run a coroutine on such a loop."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
