"""What one pool reports: one call an event, for the log, the statistics and the metrics.

No call raises.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from . import metrics
from .log import LogEvent, harmless, in_ms, log_event, status_of
from .usage import Counters


@harmless
def failed_open() -> None:
    """The package has a fault, and the plugin connects by itself from now on."""
    metrics.FAILED_OPEN.count()


class PoolMetrics:
    """Reports the events of one pool.

    Args:
        pool: the number that the pool's log records carry.
        into: counters that also count everything that this pool's counters count.
    """

    def __init__(self, pool: int, into: Counters | None = None) -> None:
        self.pool = pool
        self.counters = Counters(into)
        self._log = functools.partial(log_event, number=pool)

    @harmless
    def reused(self) -> None:
        self.counters.count("connections_reused")
        self._log(LogEvent.REUSED)
        metrics.REUSED.count()

    @harmless
    def waited(self, seconds: float) -> None:
        self.counters.time("acquire_wait", seconds)
        self._log(LogEvent.WAITED, wait_ms=in_ms(seconds))
        metrics.WAITED.observe(seconds)

    @harmless
    def connected(self, handshake: float) -> None:
        self.counters.count("connections_made")
        self.counters.time("connect", handshake)
        self._log(LogEvent.CONNECTED, connect_ms=in_ms(handshake))
        metrics.CONNECTED.observe(handshake)

    @harmless
    def standby_failed(self, error: Exception, retry_in: float) -> None:
        """`retry_in` is infinite if the pool waits until a caller's dial succeeds."""
        self.counters.count("standby_failures")
        retry_in_s = None if retry_in == math.inf else round(retry_in, 1)
        self._log(LogEvent.STANDBY_FAILED, error=error, retry_in_s=retry_in_s)
        metrics.STANDBY_FAILURES.count(metrics.kind_of(status_of(error), error))

    @harmless
    def closed(self, reason: str, age: float, idle_for: float | None) -> None:
        """`idle_for` is None for a connection that was leased."""
        self.counters.count(f"closed_{reason}")
        idle: dict[str, Any] = {} if idle_for is None else {"idle_s": round(idle_for, 1)}
        self._log(LogEvent.CLOSED, reason=reason, age_s=round(age, 1), **idle)
        metrics.CLOSED.count(reason)

    @harmless
    def sign_used(self) -> None:
        """A caller that was expected has asked for a connection."""
        self.counters.count("signs_used")
        metrics.EXPECTED.count("used")

    @harmless
    def sign_unused(self) -> None:
        """A caller that was expected has not asked for a connection."""
        self.counters.count("signs_unused")
        metrics.EXPECTED.count("unused")

    @harmless
    def rate_limited(self) -> None:
        """The server refused a dial because it has too many sessions or requests."""
        self.counters.count("rate_limited")
        metrics.REFUSED.count()

    @harmless
    def on_demand(self, seconds: float, reason: str) -> None:
        self._log(LogEvent.ON_DEMAND, for_s=round(seconds, 1), reason=reason)

    @harmless
    def cleared(self) -> None:
        self.counters.count("connections_cleared")
        metrics.CLEARED.count()
        self._log(LogEvent.CLEARED)

    @harmless
    def clearing_stopped(self, reason: str) -> None:
        self._log(LogEvent.CLEARING_STOPPED, reason=reason)

    @harmless
    def replayed(self, waited: float, reason: str) -> None:
        self.counters.count("replays")
        self._log(LogEvent.REPLAYED, reason=reason, wait_ms=in_ms(waited))
        metrics.REPLAYS.count(reason)

    @harmless
    def replay_failed(self, error: Exception, reason: str) -> None:
        self._log(LogEvent.REPLAY_FAILED, reason=reason, error=error)
