"""Circuit breaker: stop sending requests to a server that fails, and try it again later.

Closed, requests go through. After several failures in a row it opens for a while, twice as long each time;
then one request goes through as a test (half-open), and its outcome closes or opens it again. Knows no
sockets; the caller passes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOLERATED = 2
"""Failures in a row that do not open it: one may be a hiccup, and the next request is the retry."""
_FIRST_S = 0.5
_LONGEST_S = 30.0


@dataclass(slots=True)
class CircuitBreaker:
    """The state of one server's circuit breaker. All times are seconds of one monotonic clock.

    Attributes:
        why: the last failure, a sentence for the user.
        failures: number of failures in a row.
    """

    why: str = ""
    failures: int = 0
    _opens_at: float = 0.0
    _testing: bool = False

    def allows(self, now: float) -> bool:
        """Return whether a request may go through now."""
        return self.failures == 0 or (now >= self._opens_at and not self._testing)

    def begin(self) -> None:
        """Record that a request goes through; after failures it is the test."""
        self._testing = self.failures > _TOLERATED

    def succeed(self) -> None:
        """Record that the server answered."""
        self.failures, self.why, self._testing = 0, "", False

    def fail(self, now: float, why: str, *, at_least_s: float = 0.0) -> None:
        """Record a failure; send no requests for `at_least_s` at least."""
        self.failures += 1
        self.why, self._testing = why, False
        wait_s = 0.0
        if self.failures > _TOLERATED:
            wait_s = min(_FIRST_S * 2.0 ** (self.failures - _TOLERATED - 1), _LONGEST_S)
        self._opens_at = now + max(wait_s, at_least_s)

    def abandon(self) -> None:
        """Record that the request was cancelled before its outcome was known."""
        self._testing = False
