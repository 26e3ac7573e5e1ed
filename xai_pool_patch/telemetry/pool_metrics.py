"""What one pool reports: one call an event, for the log, the statistics and the metrics.

No call raises.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from . import metrics
from .log import LogEvent, harmless, in_ms, log_event
from .usage import Counters

failed_open = harmless(metrics.FAILED_OPEN.count)
"""The package has a fault, and the plugin connects by itself from now on."""


class PoolMetrics:
    """Reports the events of one pool.

    Args:
        pool: the number that the pool's log records carry.
        into: counters that also count everything that this pool's counters count.
    """

    def __init__(self, pool: int, into: Counters | None = None) -> None:
        self.pool = pool
        self.counters = Counters(into)
        self._log = partial(log_event, number=pool)
        self.sign_used = partial(self._count, "signs_used", metrics.EXPECTED, "used")
        """A caller that was expected has asked for a connection."""
        self.sign_unused = partial(self._count, "signs_unused", metrics.EXPECTED, "unused")
        """A caller that was expected has not asked for a connection."""
        self.rate_limited = partial(self._count, "rate_limited", metrics.REFUSED)
        """The server refused a dial because it has too many sessions or requests."""
        self.clearing_stopped = partial(self._log, LogEvent.CLEARING_STOPPED)
        self.replay_failed = partial(self._log, LogEvent.REPLAY_FAILED)

    @harmless
    def reused(self) -> None:
        self._log(LogEvent.REUSED)
        self._count("connections_reused", metrics.REUSED)

    @harmless
    def waited(self, seconds: float) -> None:
        self._log(LogEvent.WAITED, wait_ms=in_ms(seconds))
        self.counters.time("acquire_wait", seconds)
        metrics.WAITED.observe(seconds)

    @harmless
    def connected(self, handshake: float) -> None:
        self._log(LogEvent.CONNECTED, connect_ms=in_ms(handshake))
        self.counters.count("connections_made")
        self.counters.time("connect", handshake)
        metrics.CONNECTED.observe(handshake)

    @harmless
    def standby_failed(self, error: Exception, retry_in: float) -> None:
        """`retry_in` is infinite if the pool waits until a caller's dial succeeds."""
        retry_in_s = None if retry_in == math.inf else round(retry_in, 1)
        self._log(LogEvent.STANDBY_FAILED, error=error, retry_in_s=retry_in_s)
        self._count("standby_failures", metrics.STANDBY_FAILURES, metrics.kind_of(error))

    @harmless
    def closed(self, reason: str, age: float, idle_for: float | None) -> None:
        """`idle_for` is None for a connection that was leased."""
        idle: dict[str, Any] = {} if idle_for is None else {"idle_s": round(idle_for, 1)}
        self._log(LogEvent.CLOSED, reason=reason, age_s=round(age, 1), **idle)
        self._count(f"closed_{reason}", metrics.CLOSED, reason)

    @harmless
    def on_demand(self, seconds: float, reason: str) -> None:
        self._log(LogEvent.ON_DEMAND, for_s=round(seconds, 1), reason=reason)

    @harmless
    def cleared(self) -> None:
        self._log(LogEvent.CLEARED)
        self._count("connections_cleared", metrics.CLEARED)

    @harmless
    def replayed(self, waited: float, reason: str) -> None:
        self._log(LogEvent.REPLAYED, reason=reason, wait_ms=in_ms(waited))
        self._count("replays", metrics.REPLAYS, reason)

    @harmless
    def _count(self, statistic: str, metric: metrics.Counter, value: str = "") -> None:
        self.counters.count(statistic)
        metric.count(value)
