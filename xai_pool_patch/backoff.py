"""When the next background dial may be made. Pure: the time is always an argument."""

from __future__ import annotations

import enum
import math
import random

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


class Setback(enum.Enum):
    """What a failed dial says about the next one."""

    PASSING = "passing"
    """The network or the server: try again later."""
    OVER_LIMIT = "over limit"
    """Too many sessions or requests: no pool of this API key should add to them."""
    REFUSED = "refused"
    """The same request will be refused again: wait until a caller's dial succeeds."""


class Account:
    """What the pools of one API key know of its limit."""

    def __init__(self) -> None:
        self.paused_until = -math.inf


class Backoff:
    """The delay of one pool's background dials: 0.5 s, doubling up to 30 s, with jitter.

    A caller's dial is never delayed, so it is not asked for here.
    """

    def __init__(self, account: Account, jitter: random.Random) -> None:
        self._account = account
        self._jitter = jitter
        self._own = -math.inf
        self._failures = 0

    @property
    def next_attempt(self) -> float:
        """Earliest time of the next background dial; infinite once refused."""
        return max(self._own, self._account.paused_until)

    def failed(self, setback: Setback, now: float) -> None:
        if setback is Setback.REFUSED:
            self._own = math.inf
        elif setback is Setback.OVER_LIMIT and now >= self._account.paused_until:
            self._account.paused_until = now + self._next_delay()
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
