"""What one pool tells: one call an event, for the log, the statistics and the metrics.

None of it raises into what it tells of. Each counts, logs and measures in this order: a meter that
raises costs no log record.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from . import metrics
from .log import Event, harmless, in_ms, status_of, tell
from .stats import Counters

REUSED = {"reused": True}
NOT_REUSED = {"reused": False}


class Journal:
    """Of one pool.

    Args:
        pool: the number that its log records carry.
        into: counters that count what this pool's count.
    """

    def __init__(self, pool: int, into: Counters | None = None) -> None:
        self.pool = pool
        self.counters = Counters(into)
        self._tell = functools.partial(tell, number=pool)

    @harmless
    def reused(self) -> None:
        self.counters.count("connections_reused")
        self._tell(Event.REUSED)
        metrics.wait_time.record(0.0, REUSED)

    @harmless
    def waited(self, seconds: float) -> None:
        self.counters.time("acquire_wait", seconds)
        self._tell(Event.WAITED, wait_ms=in_ms(seconds))
        metrics.wait_time.record(seconds, NOT_REUSED)

    @harmless
    def connected(self, handshake: float) -> None:
        self.counters.count("connections_made")
        self.counters.time("handshake", handshake)
        self._tell(Event.CONNECTED, handshake_ms=in_ms(handshake))
        metrics.create_time.record(handshake)

    @harmless
    def standby_failed(self, error: Exception, retry_in: float) -> None:
        """`retry_in` is infinite if nothing is tried before a caller's dial has succeeded."""
        self.counters.count("standby_failures")
        retry_in_s = None if retry_in == math.inf else round(retry_in, 1)
        self._tell(Event.STANDBY_FAILED, error=error, retry_in_s=retry_in_s)
        kind = str(status_of(error) or type(error).__name__)
        metrics.standby_failures.add(1, {"error.type": kind})

    @harmless
    def removed(self, event: Event, reason: str, age: float, idle_for: float | None) -> None:
        """`idle_for` is None for a connection that was leased."""
        self.counters.count(f"discarded_{reason}")
        idle: dict[str, Any] = {} if idle_for is None else {"idle_s": round(idle_for, 1)}
        self._tell(event, reason=reason, age_s=round(age, 1), **idle)
        metrics.discards.add(1, {"reason": reason})

    @harmless
    def reclaimed(self) -> None:
        self.counters.count("connections_reclaimed")
        self._tell(Event.RECLAIMED)

    @harmless
    def reclaiming_stopped(self, reason: str) -> None:
        self._tell(Event.RECLAIMING_STOPPED, reason=reason)

    @harmless
    def proving_stopped(self, reason: str) -> None:
        self._tell(Event.PROVING_STOPPED, reason=reason)

    @harmless
    def replaced(self, waited: float, reason: str) -> None:
        self.counters.count("replays")
        self._tell(Event.REPLACED, reason=reason, wait_ms=in_ms(waited))
        metrics.replays.add(1, {"reason": reason})

    @harmless
    def replacement_failed(self, error: Exception, reason: str) -> None:
        self._tell(Event.REPLACEMENT_FAILED, reason=reason, error=error)
