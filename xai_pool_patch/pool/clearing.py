"""Clears of interrupted connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from ..telemetry.pool_metrics import PoolMetrics
from .entries import C, Clear, PoolEntry
from .round_trips import RoundTrips
from .soft_timeout import SoftTimeout
from .supervisor import Supervisor

CLEAR = RoundTrips(6, at_least=0.5, at_most=1.0)
"""Time for the acknowledgement of a clear. It is generous, since the acknowledgement comes behind
all audio under way. Audio is sent five times faster than it is played, so a slow line holds back
more of it than the round trip shows. No caller waits that long (`RELIANCE`)."""

RELIANCE = RoundTrips(2, at_least=0.05)
"""Time that a caller waits for a clear under way before the pool dials for the caller. A clear that
ends within it is faster than any dial."""

MAX_FAILURES = 2
"""The pool stops clearing after this many failures in a row."""

UNACKNOWLEDGED = "clears are not acknowledged"
STALE_AUDIO = "audio came after the acknowledgement of a clear"


@dataclass(eq=False, repr=False)
class Clearing(Generic[C]):
    """The clears under way in one pool, and what their outcomes say about the next."""

    clears_interrupted: bool
    """Whether an interrupted connection is worth a clear."""
    supervisor: Supervisor
    """Owns the tasks and timers."""
    metrics: PoolMetrics
    on_ended: Callable[[PoolEntry[C]], None]
    """Called when a clear has ended. Not called for a clear that was dropped."""
    on_overdue: Callable[[], None]
    """Called when callers should stop relying on a clear."""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.under_way: dict[PoolEntry[C], Clear] = {}
        self._failures = 0
        """Clears in a row that failed."""

    def begin(self, entry: PoolEntry[C], round_trip: float) -> None:
        """Clear a connection that is neither idle nor leased."""
        reliance = RELIANCE.seconds(round_trip)
        soft_timeout = SoftTimeout(self.supervisor, reliance, self.on_overdue)
        # Before spawn(): with an eager task factory the clear may fail before spawn() returns, and
        # ended() would then not find it. The connection would stay in `under_way` for ever.
        clear = self.under_way[entry] = Clear(soft_timeout)
        run = self._run(entry, clear, CLEAR.seconds(round_trip))
        clear.tasks.append(self.supervisor.spawn(run, name="xai_pool_patch.clear_timeout"))

    def ended(self, entry: PoolEntry[C]) -> None:
        """Learn from a clear that succeeded or failed, and pass the connection on."""
        clear = self._pop(entry)
        if clear is None:
            # No clear was under way. Or the peer ended the connection during the clear, the pool
            # called this at once, and now the task of the clear calls it too. Counted twice, one
            # failure would stop all clears.
            return
        if entry.connection.is_reusable:
            self._failures = 0
            self.metrics.cleared()
        else:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._stop_clearing(UNACKNOWLEDGED)
        self.on_ended(entry)

    def drop(self, entry: PoolEntry[C]) -> None:
        """Forget the clear of a connection that the pool closes, if there is one."""
        clear = self._pop(entry)
        if clear is None or self._loop.is_closed():
            return
        # Both: one cancels the other a step later, and by then a clear() that has not begun yet
        # would begin, on a connection that the pool is closing.
        for task in clear.tasks:
            task.cancel()

    def _pop(self, entry: PoolEntry[C]) -> Clear | None:
        clear = self.under_way.pop(entry, None)
        # Before `ended` counts a clear that failed, and might log that clears are not acknowledged:
        # such a server has acknowledged this one.
        if entry.connection.sent_stale_audio:
            self._stop_clearing(STALE_AUDIO)
        return clear

    def _stop_clearing(self, reason: str) -> None:
        """Close interrupted connections from now on. The first call is logged with its reason."""
        if self.clears_interrupted:
            self.clears_interrupted = False
            self.metrics.clearing_stopped(reason=reason)

    async def _run(self, entry: PoolEntry[C], clear: Clear, timeout: float) -> None:
        operation = self.supervisor.spawn(entry.connection.clear(), name="xai_pool_patch.clear")
        clear.tasks.append(operation)
        try:
            await asyncio.wait([operation], timeout=timeout)
        finally:
            clear.soft_timeout.stop()
            # A loop may be closed without cancelling its tasks. Python then ends this coroutine
            # when it is collected, and cancel() would raise.
            if not self._loop.is_closed():
                operation.cancel()
        # A cancelled clear() detaches its sink in one more step. Passed on before that, the
        # connection would get its next lease's sink detached, and that utterance would be silent.
        await asyncio.wait([operation])
        self.ended(entry)
