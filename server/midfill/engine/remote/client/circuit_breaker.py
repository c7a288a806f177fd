"""When a served engine that fails is left alone, and when it is tried again.

Closed, requests go through. After failures in a row it opens for a while, twice as long each time; then one
request goes through to see (half-open), and its fate closes or opens it again. Knows no sockets and
no clock of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOLERATED = 2
"""Failures in a row that do not open it: one may be a hiccup, and its successor is the retry."""
_FIRST_S = 0.5
_LONGEST_S = 30.0


@dataclass(slots=True)
class CircuitBreaker:
    """See the module. All times are seconds of one clock that only goes forward.

    Attributes:
        why: what the last failure was, a sentence.
        failures: in a row.
    """

    why: str = ""
    failures: int = 0
    _opens_at: float = 0.0
    _testing: bool = False

    def allows(self, now: float) -> bool:
        """Whether a request may go through now."""
        return self.failures == 0 or (now >= self._opens_at and not self._testing)

    def begin(self) -> None:
        """A request goes through; if there were failures, it is the one that tells."""
        self._testing = self.failures > _TOLERATED

    def succeed(self) -> None:
        """The server answers."""
        self.failures, self.why, self._testing = 0, "", False

    def fail(self, now: float, why: str, *, at_least_s: float = 0.0) -> None:
        """The server did not answer, or not as one does; it is left alone for `at_least_s` at least."""
        self.failures += 1
        self.why, self._testing = why, False
        wait_s = 0.0
        if self.failures > _TOLERATED:
            wait_s = min(_FIRST_S * 2.0 ** (self.failures - _TOLERATED - 1), _LONGEST_S)
        self._opens_at = now + max(wait_s, at_least_s)

    def abandon(self) -> None:
        """The request was taken back before its fate was known."""
        self._testing = False
