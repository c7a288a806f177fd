"""Idle work: what is computed while the user pauses.

After an answer, the suggestion that comes next if this one is accepted (prefetch). After a longer pause, the
prompt at the cursor is read by the model (prefill), so that only the keys typed since remain to be read. Both
run at idle priority. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

PREFETCH_DELAY_S = 0.1
"""Pause after an answer before prefetching: a key pressed at once would wait for the running forward pass."""

IDLE_DELAY_S = 1.0
"""Pause before the model reads the prompt ahead. The context and the anchor may change then, which makes the
whole prompt new: a waste if the user continues to type."""


@dataclass(slots=True)
class IdleTimers:
    """The timers of idle work. The next edit or request stops both; work that has begun is not cancelled."""

    _prefetch: asyncio.TimerHandle | None = field(default=None)
    _prefill: asyncio.TimerHandle | None = field(default=None)

    def prefetch_soon(self, prefetch: Callable[[], None]) -> None:
        """Call `prefetch` after `PREFETCH_DELAY_S`."""
        self._prefetch = asyncio.get_running_loop().call_later(PREFETCH_DELAY_S, prefetch)

    def prefill_soon(self, prefill: Callable[[], None]) -> None:
        """Call `prefill` after `IDLE_DELAY_S`."""
        self._prefill = asyncio.get_running_loop().call_later(IDLE_DELAY_S, prefill)

    def stop(self) -> None:
        """Stop the timers."""
        for timer in (self._prefetch, self._prefill):
            if timer is not None:
                timer.cancel()
        self._prefetch = self._prefill = None
