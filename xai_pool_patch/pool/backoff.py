"""When the next background dial may be made. The time is always an argument."""

from __future__ import annotations

import enum
import math
import random

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


class FailureKind(enum.Enum):
    """What a failed dial says about the next one."""

    TRANSIENT = "transient"
    """The network or the server failed. The pool dials again later."""
    REFUSED = "refused"
    """There are too many sessions or requests. All pools that dial this host pause."""
    PERMANENT = "permanent"
    """The server will refuse the same request again. The pool waits for a caller's dial."""


class RateLimit:
    """What the pools of one host know about its limit. They share one object."""

    def __init__(self) -> None:
        self.paused_until = -math.inf


class Backoff:
    """The delay of one pool's background dials: 0.5 s, doubling up to 30 s, with jitter.

    A caller's dial is never delayed, so it does not ask here.
    """

    def __init__(self, rate_limit: RateLimit, jitter: random.Random) -> None:
        self._rate_limit = rate_limit
        self._jitter = jitter
        self._own = -math.inf
        self._failures = 0

    @property
    def next_attempt(self) -> float:
        """Earliest time of the next background dial; infinite after a permanent failure."""
        return max(self._own, self._rate_limit.paused_until)

    def failed(self, failure_kind: FailureKind, now: float) -> None:
        if failure_kind is FailureKind.PERMANENT:
            self._own = math.inf
        elif failure_kind is FailureKind.REFUSED and now >= self._rate_limit.paused_until:
            self._rate_limit.paused_until = now + self._next_delay()
        elif now >= self.next_attempt:
            # A failure before that belongs to dials that began together. Counted one by one, four
            # dials that fail at once would multiply the delay by sixteen.
            self._own = now + self._next_delay()

    def succeeded(self) -> None:
        self._failures = 0
        self._own = -math.inf

    def _next_delay(self) -> float:
        # The exponent is limited: in an outage of some days 2**failures would overflow a float.
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return delay * self._jitter.uniform(0.8, 1.0)
