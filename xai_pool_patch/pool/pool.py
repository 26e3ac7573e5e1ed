"""The policy of one pool: who gets which connection, what to dial, what to close.

Nothing here knows of WebSockets, xAI or LiveKit. Every event (asked, given back, dialled, lost,
time passed) changes plain state in one synchronous step, `_settle` decides what follows from it,
and the I/O happens in tasks of its own. No lock is needed, and none is held.
"""

from __future__ import annotations

import asyncio
import bisect
import enum
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ..errors import XaiPoolPatchError
from ..options import PoolOptions
from ..telemetry.pool_metrics import PoolMetrics
from .backoff import Backoff, FailureKind
from .soft_timeout import SoftTimeout
from .supervisor import Supervisor

DIAL_PATIENCE = 1.0
"""Seconds from its start in which callers rely on a dial that somebody else began, before they
begin their own: about twice the 0.45 to 0.6 s a handshake takes in production (livekit/agents
issue 6078)."""

ROTATION_LEAD = 0.05
"""Part of `max_age` before its end in which an idle connection is replaced: 90 s of 1,800 s, time
for several attempts while the old connection still serves."""

CLEAR_ROUND_TRIPS = 6
SHORTEST_CLEAR = 0.5
"""Seconds. A clear that is not acknowledged for six round trips, half a second at least and
`clear_timeout` at most, has failed. Generous, since the acknowledgement comes behind all audio
under way, of which a slow line holds back more than its round trip tells: audio is sent five
times faster than it is played. No caller waits for it that long (`RELIED_ROUND_TRIPS`)."""

RELIED_ROUND_TRIPS = 2
SHORTEST_RELIANCE = 0.05
"""Seconds. For two round trips, and this at least, a caller relies on a clear under way; then it
dials. On time the connection is there sooner than any dial could bring one."""

REFUSALS = 2
"""Clears in a row that fail before no more are tried."""

SHORT_LIFE = 30.0
"""Seconds. A server that ends a connection sooner, unused, is dialled again with backoff only."""


class Reason(enum.Enum):
    """Why a connection was taken out of the pool."""

    INTERRUPTED = "interrupted"
    LOST = "lost"
    FAILED = "failed"
    EXPIRED = "expired"
    SURPLUS = "surplus"
    SHUTDOWN = "shutdown"


class PoolClosedError(XaiPoolPatchError):
    """The pool has ended; it hands out nothing any more."""


class DialFailedError(XaiPoolPatchError):
    """The caller's own dial failed. `error` is what it failed with."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"dial failed: {type(error).__name__}")
        self.error = error


class AcquireTimeoutError(XaiPoolPatchError):
    """No connection came within the caller's timeout."""


class Poolable(Protocol):
    """What the pool asks of a connection."""

    on_lost: Callable[[], None] | None
    """Called once, when the peer ends the connection."""

    @property
    def is_reusable(self) -> bool: ...

    round_trip: float | None
    """Seconds that an answer takes; None if that is not known."""

    sent_stale_audio: bool
    """It was restored, and yet was not clean."""

    on_stale_audio: Callable[[], None] | None
    """Called when that shows, though no harm was done."""

    async def clear(self) -> None:
        """Makes it reusable again, or proves that it still is; ends when that is known."""

    def close(self) -> asyncio.Task[None] | None: ...


C = TypeVar("C", bound=Poolable)


@dataclass(frozen=True)
class Acquired(Generic[C]):
    connection: C
    waited: float
    """Seconds; 0.0 for a connection that was there when asked for."""
    reused: bool
    """It was there when asked for."""
    fresh: bool
    """It was dialled meanwhile, and nobody has used it before."""


@dataclass(eq=False)
class PoolEntry(Generic[C]):
    connection: C
    rotate_at: float
    """From here on it is replaced when idle, and serves only until the replacement is there."""
    expires_at: float
    """From here on it is not handed out."""
    made_at: float
    idle_since: float
    verified_at: float
    """When it was last known to be alive, its session included."""
    lease_count: int = 0


@dataclass(eq=False)
class _Waiter(Generic[C]):
    deadline: float
    wants_fresh: bool
    future: asyncio.Future[PoolEntry[C]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def accept(self, entry: PoolEntry[C]) -> bool:
        """Whether it still wanted one, and this one."""
        if self.future.done() or (self.wants_fresh and entry.lease_count):
            return False
        self.future.set_result(entry)
        return True

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    @property
    def unclaimed(self) -> PoolEntry[C] | None:
        """What it was handed, if it vanished in that very moment."""
        if self.future.cancelled() or not self.future.done() or self.future.exception():
            return None
        return self.future.result()


@dataclass(eq=False)
class _Dial(Generic[C]):
    began: float
    patience: SoftTimeout
    waiter: _Waiter[C] | None
    """Who asked for it; nobody, for a standby."""
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Clear:
    failing: Reason
    """What the connection is discarded for if it fails."""
    patience: SoftTimeout
    task: asyncio.Task[None] | None = None


class Pool(Generic[C]):
    """The connections of one key in one event loop.

    Args:
        connect: makes a connection within the seconds given.
        options: see `PoolOptions`.
        supervisor: owns the tasks and timers.
        standby_timeout: seconds a background dial may take.
        backoff: when background dials may be made.
        metrics: is told what happens.
        failure_kind_of: what the error of a dial means for the next ones.
        is_defunct: whether what it dials with is gone for good, so that it should end quietly.
    """

    def __init__(
        self,
        connect: Callable[[float], Awaitable[C]],
        options: PoolOptions,
        *,
        supervisor: Supervisor,
        standby_timeout: float,
        backoff: Backoff,
        metrics: PoolMetrics,
        failure_kind_of: Callable[[Exception], FailureKind],
        is_defunct: Callable[[], bool],
        jitter: random.Random,
    ) -> None:
        self._connect = connect
        self._options = options
        self._supervisor = supervisor
        self._standby_timeout = standby_timeout
        self._backoff = backoff
        self.metrics = metrics
        self._failure_kind_of = failure_kind_of
        self._is_defunct = is_defunct
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._entries: dict[C, PoolEntry[C]] = {}
        self._idle: list[PoolEntry[C]] = []  # by the time they became idle: last in, first out
        self._clearing: dict[PoolEntry[C], _Clear] = {}
        self._dials: set[_Dial[C]] = set()
        self._waiters: deque[_Waiter[C]] = deque()
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._min_size = 0
        self._clears_interrupted = options.interruption == "clear"
        self._refused = {Reason.INTERRUPTED: 0, Reason.LOST: 0}
        """Clears in a row that failed: of interrupted connections, and of idle ones."""
        self._verify_after = math.inf if options.verify_after is None else options.verify_after
        self.is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return (
            f"<Pool {state} idle={self.idle} leased={self.leased} clearing={self.clearing}"
            f" connecting={self.connecting} waiting={len(self._waiters)}"
            f" closing={len(self._closing)} min_size={self._min_size}>"
        )

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def leased(self) -> int:
        # Another thread may ask between two changes that belong together.
        return max(0, len(self._entries) - len(self._idle) - len(self._clearing))

    @property
    def clearing(self) -> int:
        """Neither idle nor leased: a clear is under way."""
        return len(self._clearing)

    @property
    def connecting(self) -> int:
        return len(self._dials)

    @property
    def is_empty(self) -> bool:
        return not (self._entries or self._dials or self._waiters or self._closing)

    @property
    def is_defunct(self) -> bool:
        """What it dials with is gone for good."""
        return self._is_defunct()

    # What callers do

    async def acquire(self, timeout: float, *, fresh: bool = False) -> Acquired[C]:
        """An idle connection at once, else the first that comes.

        Args:
            timeout: seconds the whole wait may take.
            fresh: take none that has been used or has lain idle. It replaces one of an utterance
                under way, which is spoken to its end though the pool may have ended.

        Raises:
            DialFailedError: the dial made for this caller failed.
            AcquireTimeoutError: nothing came in time.
            PoolClosedError: the pool has ended.
        """
        if self.is_closed and not fresh:
            raise PoolClosedError("acquire() on a pool that has ended")
        entry = None if fresh else self._take_idle()
        if entry is not None:
            self.metrics.reused()
            return Acquired(entry.connection, waited=0.0, reused=True, fresh=False)
        asked = self._now()
        entry = await self._wait(_Waiter(asked + timeout, fresh))
        waited = self._now() - asked
        self.metrics.waited(waited)
        return Acquired(entry.connection, waited, reused=False, fresh=entry.lease_count == 1)

    def release(self, connection: C) -> None:
        """Gives back a connection of which nothing more is expected."""
        entry = self._entries.get(connection)
        if entry is None:
            return
        if self.is_closed:
            self._remove(entry, Reason.SHUTDOWN)
        elif not connection.is_reusable:
            self._remove(entry, Reason.FAILED)
        else:
            entry.idle_since = self._now()
            self._offer(entry)
        self._settle()

    def release_cut_off(self, connection: C) -> None:
        """Takes back one whose use was cut off: as it is, made clean again, or not at all."""
        entry = self._entries.get(connection)
        if entry is None:
            return
        entry.idle_since = self._now()
        if self.is_closed or not self._clears_interrupted:
            self._remove(entry, Reason.INTERRUPTED)
        elif connection.is_reusable:
            self._offer(entry)  # nothing is owed
        else:
            self._clear(entry, Reason.INTERRUPTED)
        self._settle()

    def discard(self, connection: C, reason: Reason) -> None:
        """Takes a connection out for good and closes it in the background."""
        entry = self._entries.get(connection)
        if entry is not None:
            self._remove(entry, reason)
            self._settle()

    def evict(self, connection: C) -> None:
        """Discards one that failed, and the idle ones of its age or older with it.

        What ended it, a restart of the server or a network that forgot, most likely ended them.
        """
        failed = self._entries.get(connection)
        if failed is None:
            return
        for entry in [m for m in self._idle if m.made_at <= failed.made_at]:
            self._remove(entry, Reason.LOST)
        self._remove(failed, Reason.LOST)
        self._settle()

    # What owners do

    def resize(self, min_size: int) -> None:
        """How many connections to keep from now on, whatever they do.

        What is missing is dialled in the next turn of the event loop: a caller who asks in this
        one dials for itself, and learns from its own dial what went wrong.
        """
        self._min_size = min_size
        self._supervisor.call_at(self._now(), self._settle)

    def prewarm(self) -> None:
        """Dials one in the background if there is none."""
        if not self._entries and not self._dials and not self.is_closed:
            self._dial(None, self._standby_timeout)

    def close(self) -> None:
        """Ends the pool: leased connections when they come back, the others now.

        Whoever waits for a dial still gets it: no turn falls silent because its pool ends.
        """
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for entry in [*self._idle, *self._clearing]:
            self._remove(entry, Reason.SHUTDOWN)
        self._settle()

    def abandon(self) -> None:
        """Ends the pool after a fault: whoever waits goes on without it, at once.

        What it had open is the supervisor's to close.
        """
        self.is_closed = True
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(PoolClosedError("the pool failed"))
        for held in (self._entries, self._idle, self._clearing, self._dials):
            held.clear()

    async def aclose(self) -> None:
        """Ends the pool and waits for its dials and closes, `close_timeout` at most."""
        self.close()
        deadline = self._now() + self._options.close_timeout
        await self._finish({dial.task for dial in self._dials if dial.task}, deadline)
        await self._finish(set(self._closing), deadline)

    async def _finish(self, tasks: set[asyncio.Task[None]], deadline: float) -> None:
        """Waits for them until then, and cancels those that are late."""
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - self._now()))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    # Waiting

    async def _wait(self, waiter: _Waiter[C]) -> PoolEntry[C]:
        self._waiters.append(waiter)
        self._settle()
        expiry = self._supervisor.call_at(
            waiter.deadline, lambda: waiter.fail(AcquireTimeoutError())
        )
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # Cancelled in the moment it was handed one: the next in line gets it.
            entry = waiter.unclaimed
            if entry is not None:
                self.release(entry.connection)
            raise
        finally:
            expiry.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _take_idle(self) -> PoolEntry[C] | None:
        now = self._now()
        while self._idle:
            entry = self._idle[-1]
            if now < entry.expires_at and entry.connection.is_reusable:
                self._idle.pop()
                self._lend(entry)
                return entry
            self._remove(entry, Reason.EXPIRED if now >= entry.expires_at else Reason.LOST)
        return None

    def _lend(self, entry: PoolEntry[C]) -> None:
        if not entry.lease_count and self._backoff.next_attempt < math.inf:
            self._backoff.succeeded()
        entry.lease_count += 1

    def _offer(self, entry: PoolEntry[C]) -> None:
        """To whoever asked first, else to the idle ones; unless its time is over."""
        entry.verified_at = self._now()
        if entry.verified_at >= entry.expires_at:
            self._remove(entry, Reason.EXPIRED)
            return
        for waiter in self._waiters:
            if waiter.accept(entry):
                self._waiters.remove(waiter)
                self._lend(entry)
                return
        if self.is_closed:
            self._remove(entry, Reason.SHUTDOWN)
            return
        bisect.insort(self._idle, entry, key=lambda each: each.idle_since)

    # Dialling

    def _dial_for_waiters(self) -> None:
        # Asked anew after each: an eager task may have served somebody before spawn() returned.
        while (waiter := self._next_to_dial_for()) is not None:
            self._dial(waiter, waiter.deadline - self._now())

    def _next_to_dial_for(self) -> _Waiter[C] | None:
        """One dial under way for each waiter, whoever began it, or one clear.

        From the last in line: those before it have dials of their own, or were content with
        somebody else's. What takes longer than it should is not relied on.
        """
        # One that was served, failed or cancelled leaves the line only when its task wakes up.
        waiting = [waiter for waiter in self._waiters if not waiter.future.done()]
        dialled = sum(not dial.patience.is_over for dial in self._dials)
        restored = sum(not clear.patience.is_over for clear in self._clearing.values())
        restored = min(restored, sum(not waiter.wants_fresh for waiter in waiting))
        if dialled + restored >= len(waiting):
            return None
        have_dials = {dial.waiter for dial in self._dials}
        return next((waiter for waiter in reversed(waiting) if waiter not in have_dials), None)

    def _dial(self, waiter: _Waiter[C] | None, timeout: float) -> None:
        patience = SoftTimeout(self._supervisor, DIAL_PATIENCE, self._settle)
        dial = _Dial(self._now(), patience, waiter)
        self._dials.add(dial)  # first: an eager task may end before spawn() returns
        run = self._run_dial(dial, timeout)
        dial.task = self._supervisor.spawn(run, name="xai_pool_patch.dial")

    async def _run_dial(self, dial: _Dial[C], timeout: float) -> None:
        outcome: C | Exception
        try:
            outcome = await self._connect(timeout)
        except asyncio.CancelledError:
            # By aclose() or by the end of the loop: either way nobody should dial again.
            self._dials.discard(dial)
            if dial.waiter is not None:
                dial.waiter.fail(PoolClosedError("the pool ended during the dial"))
            self.close()
            raise
        except Exception as error:
            outcome = error
        finally:
            dial.patience.stop()
        # Not within the try: what fails from here on is a fault, and no failure of the dial.
        self._dials.discard(dial)
        if isinstance(outcome, Exception):
            self._dial_failed(dial, outcome)
        else:
            self._dial_succeeded(dial, outcome)

    def _dial_succeeded(self, dial: _Dial[C], connection: C) -> None:
        now = self._now()
        self.metrics.connected(now - dial.began)
        if dial.waiter is not None:
            self._backoff.succeeded()
        lifetime = self._options.max_age * self._jitter.uniform(0.9, 1.0)
        entry = PoolEntry(
            connection,
            rotate_at=now + lifetime - self._options.max_age * ROTATION_LEAD,
            expires_at=now + lifetime,
            made_at=now,
            idle_since=now,
            verified_at=now,
        )
        self._entries[connection] = entry
        connection.on_lost = lambda: self._lost(entry)
        connection.on_stale_audio = self._distrust_clears
        self._offer(entry)
        if not connection.is_reusable:
            # An eager task factory lets its reader run before anybody can be told of its end.
            self._lost(entry)
        self._settle()

    def _dial_failed(self, dial: _Dial[C], error: Exception) -> None:
        self._backoff.failed(self._failure_kind_of(error), self._now())
        if dial.waiter is not None:
            dial.waiter.fail(DialFailedError(error))
        elif not self.is_defunct:
            self.metrics.standby_failed(error, self._backoff.next_attempt - self._now())
        self._settle()

    # Restoring

    def _clear(self, entry: PoolEntry[C], failing: Reason) -> None:
        round_trip = entry.connection.round_trip
        timeout, relied_for = self._options.clear_timeout, 0.0
        if round_trip is not None:
            timeout = min(timeout, max(SHORTEST_CLEAR, CLEAR_ROUND_TRIPS * round_trip))
            relied_for = max(SHORTEST_RELIANCE, RELIED_ROUND_TRIPS * round_trip)
        patience = SoftTimeout(self._supervisor, relied_for, self._settle)
        clear = self._clearing[entry] = _Clear(failing, patience)
        run = self._run_clear(entry, timeout, patience)
        clear.task = self._supervisor.spawn(run, name="xai_pool_patch.clear_timeout")

    async def _run_clear(self, entry: PoolEntry[C], timeout: float, patience: SoftTimeout) -> None:
        clearing = self._supervisor.spawn(entry.connection.clear(), name="xai_pool_patch.clear")
        try:
            await asyncio.wait([clearing], timeout=timeout)
        finally:
            patience.stop()
            if not self._loop.is_closed():
                clearing.cancel()
        await asyncio.wait([clearing])  # until it has let go of the connection
        self._cleared(entry)

    def _cleared(self, entry: PoolEntry[C]) -> None:
        clear = self._clearing.pop(entry, None)
        if clear is None:
            return
        is_clean = entry.connection.is_reusable
        self._learn(clear.failing, is_clean)
        if is_clean:
            self._offer(entry)
        else:
            self._remove(entry, clear.failing)
        self._settle()

    def _learn(self, failing: Reason, is_clean: bool) -> None:
        """What one clear says about the next of its kind."""
        self._refused[failing] = 0 if is_clean else self._refused[failing] + 1
        is_hopeless = self._refused[failing] >= REFUSALS
        if failing is Reason.INTERRUPTED:
            if is_clean:
                self.metrics.cleared()
            elif is_hopeless:
                self._stop_clearing("clears are not acknowledged")
        elif not is_clean:
            self._backoff.failed(FailureKind.TRANSIENT, self._now())
            if is_hopeless:
                self._stop_verifying("clears are not acknowledged")

    def _stop_clearing(self, reason: str) -> None:
        if self._clears_interrupted:
            self._clears_interrupted = False
            self.metrics.clearing_stopped(reason)

    def _distrust_clears(self) -> None:
        self._stop_clearing("audio came after the acknowledgement of a clear")

    def _stop_verifying(self, reason: str) -> None:
        self._verify_after = math.inf
        self.metrics.verifying_stopped(reason)

    def _verify(self) -> None:
        """Has an idle connection prove that it lives. One at a time: callers may need the rest."""
        if self._clearing:
            return
        now = self._now()
        for entry in self._idle:
            if entry.verified_at + self._verify_after <= now:
                self._idle.remove(entry)
                self._clear(entry, Reason.LOST)
                return

    # Losing and closing

    def _lost(self, entry: PoolEntry[C]) -> None:
        if entry.connection.sent_stale_audio:
            self._distrust_clears()
        if entry in self._clearing:
            self._cleared(entry)
        if entry.connection not in self._entries:
            return
        if not entry.lease_count and self._now() - entry.made_at < SHORT_LIFE:
            self._backoff.failed(FailureKind.TRANSIENT, self._now())
        if entry in self._idle:
            self._remove(entry, Reason.LOST)
        else:
            self._remove(entry, Reason.FAILED)
        self._settle()

    def _remove(self, entry: PoolEntry[C], reason: Reason) -> None:
        now, idle_for = self._now(), None
        if entry in self._idle:
            self._idle.remove(entry)
            idle_for = now - entry.idle_since
        del self._entries[entry.connection]
        clear = self._clearing.pop(entry, None)
        self.metrics.closed(reason.value, now - entry.made_at, idle_for)
        if not self._loop.is_closed():
            if clear is not None and clear.task is not None:
                clear.task.cancel()
            task = entry.connection.close()
            if task is not None:
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    # What follows from the state

    def _settle(self) -> None:
        """Does whatever the state calls for. To be called after every change of it."""
        self._dial_for_waiters()
        if not self.is_closed:
            self._retire_aged()
            self._trim()
            self._verify()
            self._top_up()
        self._arm()

    def _retire_aged(self) -> None:
        now = self._now()
        for entry in [m for m in self._idle if m.rotate_at <= now]:
            if 0 < self._min_size <= self._fresh() or now >= entry.expires_at or not self._min_size:
                self._remove(entry, Reason.EXPIRED)

    def _trim(self) -> None:
        now = self._now()
        while self._idle and self._fresh() + len(self._dials) > self._min_size:
            if self._idle[0].idle_since + self._options.max_idle_time > now:
                return
            self._remove(self._idle[0], Reason.SURPLUS)

    def _top_up(self) -> None:
        missing = self._min_size - self._fresh() - len(self._dials)
        if missing <= 0 or self._now() < self._backoff.next_attempt:
            return
        if self.is_defunct:
            self.close()
            return
        for _ in range(missing):
            self._dial(None, self._standby_timeout)

    def _fresh(self) -> int:
        """Connections that are not about to be replaced."""
        now = self._now()
        return len(self._entries) - sum(1 for m in self._idle if m.rotate_at <= now)

    def _arm(self) -> None:
        """Sets the timer to the next moment at which time alone changes something.

        One that is set too early is left: it costs a look at the state, which sets it anew.
        """
        due = self._next_due()
        is_set = self._timer is not None and self._timer.when() <= due
        if due == math.inf or is_set or self._loop.is_closed():
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._supervisor.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._settle()

    def _next_due(self) -> float:
        if self.is_closed:
            return math.inf
        now = self._now()
        moments = [m.expires_at if m.rotate_at <= now else m.rotate_at for m in self._idle]
        if not self._clearing:
            moments += [m.verified_at + self._verify_after for m in self._idle]
        surplus = self._fresh() + len(self._dials) - self._min_size
        if surplus > 0 and self._idle:
            moments.append(self._idle[0].idle_since + self._options.max_idle_time)
        if surplus < 0:
            moments.append(self._backoff.next_attempt)
        return min(moments, default=math.inf)

    def _now(self) -> float:
        return self._loop.time()
