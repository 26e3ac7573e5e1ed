"""When the next background dial may be made. Pure: the time is always an argument."""

from __future__ import annotations

import enum
import math
import random

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


class FailureKind(enum.Enum):
    """What a failed dial says about the next one."""

    TRANSIENT = "transient"
    """The network or the server: try again later."""
    RATE_LIMITED = "rate limited"
    """Too many sessions or requests: no pool of this API key should add to them."""
    PERMANENT = "permanent"
    """The same request will be refused again: wait until a caller's dial succeeds."""


class RateLimit:
    """What the pools of one API key know of its limit."""

    def __init__(self) -> None:
        self.paused_until = -math.inf


class Backoff:
    """The delay of one pool's background dials: 0.5 s, doubling up to 30 s, with jitter.

    A caller's dial is never delayed, so it is not asked for here.
    """

    def __init__(self, rate_limit: RateLimit, jitter: random.Random) -> None:
        self._rate_limit = rate_limit
        self._jitter = jitter
        self._own = -math.inf
        self._failures = 0

    @property
    def next_attempt(self) -> float:
        """Earliest time of the next background dial; infinite once refused."""
        return max(self._own, self._rate_limit.paused_until)

    def failed(self, failure_kind: FailureKind, now: float) -> None:
        if failure_kind is FailureKind.PERMANENT:
            self._own = math.inf
        elif failure_kind is FailureKind.RATE_LIMITED and now >= self._rate_limit.paused_until:
            self._rate_limit.paused_until = now + self._next_delay()
        elif now >= self.next_attempt:  # sooner, it is one more of a burst that has been counted
            self._own = now + self._next_delay()

    def succeeded(self) -> None:
        self._failures = 0
        self._own = -math.inf

    def _next_delay(self) -> float:
        # Clamped before doubling: 2**failures outgrows a float in an outage of some days.
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return delay * self._jitter.uniform(0.8, 1.0)
