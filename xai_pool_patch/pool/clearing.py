"""Clears: of interrupted connections, and of idle ones in order to verify them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Generic

from ..options import PoolOptions
from ..telemetry.pool_metrics import PoolMetrics
from .backoff import Backoff, FailureKind
from .entries import C, Clear, PoolEntry, Reason
from .round_trips import RoundTrips
from .soft_timeout import SoftTimeout
from .supervisor import Supervisor

CLEAR = RoundTrips(6, at_least=0.5)
"""Time for the acknowledgement of a clear; `clear_timeout` is its upper bound. It is generous,
since the acknowledgement comes behind all audio under way. Audio is sent five times faster than it
is played, so a slow line holds back more of it than the round trip shows. No caller waits that
long (`RELIANCE`)."""

RELIANCE = RoundTrips(2, at_least=0.05)
"""Time that a caller waits for a clear under way before the pool dials for the caller. A clear that
ends within it is faster than any dial."""

MAX_FAILURES = 2
"""The pool stops to clear, or to verify, after so many failures in a row."""

UNACKNOWLEDGED = "clears are not acknowledged"
STALE_AUDIO = "audio came after the acknowledgement of a clear"


class Clearing(Generic[C]):
    """The clears under way in one pool, and what their outcomes say about the next.

    Interrupted and idle connections are judged apart. A server may acknowledge a clear only while
    an utterance is under way, or only while none is.

    Args:
        options: see `PoolOptions`.
        supervisor: owns the tasks and timers.
        backoff: learns of verifications that failed.
        metrics: gets the events.
        on_ended: called when a clear has ended, with the reason to close the connection, or None
            if it is clean. Not called for a clear that was dropped.
        on_overdue: called when callers should stop relying on a clear.

    Attributes:
        clears_interrupted: whether an interrupted connection is worth a clear.
    """

    def __init__(
        self,
        options: PoolOptions,
        *,
        supervisor: Supervisor,
        backoff: Backoff,
        metrics: PoolMetrics,
        on_ended: Callable[[PoolEntry[C], Reason | None], None],
        on_overdue: Callable[[], None],
    ) -> None:
        self._clear_timeout = options.clear_timeout
        self._supervisor = supervisor
        self._backoff = backoff
        self._metrics = metrics
        self._on_ended = on_ended
        self._on_overdue = on_overdue
        self._loop = asyncio.get_running_loop()
        self.under_way: dict[PoolEntry[C], Clear] = {}
        self.clears_interrupted = options.interruption == "clear"
        self._verify_after = math.inf if options.verify_after is None else options.verify_after
        self._failures = {Reason.INTERRUPTED: 0, Reason.LOST: 0}
        """Clears in a row that failed, by what the pool closed their connections for."""

    def __len__(self) -> int:
        return len(self.under_way)

    @property
    def relied_on(self) -> int:
        """The clears that will probably end sooner than a dial would."""
        return sum(not clear.soft_timeout.is_over for clear in self.under_way.values())

    def verify_at(self, entry: PoolEntry[C]) -> float:
        """When an idle connection should be verified."""
        return entry.verified_at + self._verify_after

    def begin(self, entry: PoolEntry[C], failure: Reason) -> None:
        """Clear a connection that is neither idle nor leased.

        Args:
            failure: `INTERRUPTED` for a connection whose utterance was interrupted, `LOST` for an
                idle one that is verified. If the clear fails, the pool closes it for that reason.
        """
        round_trip = entry.connection.round_trip
        timeout = min(self._clear_timeout, CLEAR.seconds(round_trip))
        reliance = 0.0 if round_trip is None else RELIANCE.seconds(round_trip)
        soft_timeout = SoftTimeout(self._supervisor, reliance, self._on_overdue)
        # Before spawn(): with an eager task factory the clear may fail before spawn() returns, and
        # ended() would then not find it. The connection would stay in `under_way` for ever.
        clear = self.under_way[entry] = Clear(failure, soft_timeout)
        run = self._run(entry, clear, timeout)
        clear.task = self._supervisor.spawn(run, name="xai_pool_patch.clear_timeout")

    def ended(self, entry: PoolEntry[C]) -> None:
        """Learn from a clear that succeeded or failed, and pass the connection on."""
        clear = self.under_way.pop(entry, None)
        if clear is None:
            # The peer ended the connection during the clear. The pool called this at once, and now
            # the task of the clear calls it too. Counted twice, one failure would stop all clears.
            return
        is_clean = entry.connection.is_reusable
        # In this order: `on_ended` settles. If the clear were still under way, the pool would not
        # verify the next connection. Before `_learn`, it would dial where it should back off.
        self._learn(clear.failure, is_clean)
        self._on_ended(entry, None if is_clean else clear.failure)

    def drop(self, entry: PoolEntry[C]) -> None:
        """Forget the clear of a connection that the pool closes, if there is one."""
        clear = self.under_way.pop(entry, None)
        if clear is None or self._loop.is_closed():
            return
        # Both: the first cancels the second a step later, and by then a clear() that has not begun
        # yet would begin, on a connection that the pool is closing.
        for task in (clear.task, clear.operation):
            if task is not None:
                task.cancel()

    def stop_clearing(self, reason: str = STALE_AUDIO) -> None:
        """Close interrupted connections from now on. The first call is logged with its reason."""
        if self.clears_interrupted:
            self.clears_interrupted = False
            self._metrics.clearing_stopped(reason)

    async def _run(self, entry: PoolEntry[C], clear: Clear, timeout: float) -> None:
        operation = self._supervisor.spawn(entry.connection.clear(), name="xai_pool_patch.clear")
        clear.operation = operation
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

    def _learn(self, failure: Reason, is_clean: bool) -> None:
        self._failures[failure] = 0 if is_clean else self._failures[failure] + 1
        has_failed_too_often = self._failures[failure] >= MAX_FAILURES
        if failure is Reason.INTERRUPTED:
            if is_clean:
                self._metrics.cleared()
            elif has_failed_too_often:
                self.stop_clearing(UNACKNOWLEDGED)
        elif not is_clean:
            # Otherwise a server that refuses to verify would be dialled after each verification.
            self._backoff.failed(FailureKind.TRANSIENT, self._loop.time())
            if has_failed_too_often:
                self._verify_after = math.inf
                self._metrics.verifying_stopped(UNACKNOWLEDGED)
