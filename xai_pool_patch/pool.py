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

from .backoff import Backoff, Setback
from .errors import XaiPoolPatchError
from .options import PoolOptions
from .patience import Patience
from .supervisor import Supervisor
from .telemetry.journal import Journal
from .telemetry.log import Event

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
    STALE = "stale"
    ERROR = "error"
    EXPIRED = "expired"
    TRIMMED = "trimmed"
    CLOSED = "closed"


_TOLD_AS = {Reason.TRIMMED: Event.TRIMMED, Reason.CLOSED: Event.CLOSED}


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

    broke_word: bool
    """It was restored, and yet was not clean."""

    on_broken_word: Callable[[], None] | None
    """Called when that shows, though no harm was done."""

    async def restore(self) -> None:
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
class _Member(Generic[C]):
    connection: C
    rotate_at: float
    """From here on it is replaced when idle, and serves only until the replacement is there."""
    expires_at: float
    """From here on it is not handed out."""
    made_at: float
    idle_since: float
    proven_at: float
    """When it was last known to be alive, its session included."""
    loans: int = 0


@dataclass(eq=False)
class _Waiter(Generic[C]):
    deadline: float
    wants_fresh: bool
    future: asyncio.Future[_Member[C]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def accept(self, member: _Member[C]) -> bool:
        """Whether it still wanted one, and this one."""
        if self.future.done() or (self.wants_fresh and member.loans):
            return False
        self.future.set_result(member)
        return True

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    @property
    def unclaimed(self) -> _Member[C] | None:
        """What it was handed, if it vanished in that very moment."""
        if self.future.cancelled() or not self.future.done() or self.future.exception():
            return None
        return self.future.result()


@dataclass(eq=False)
class _Dial(Generic[C]):
    began: float
    patience: Patience
    waiter: _Waiter[C] | None
    """Who asked for it; nobody, for a standby."""
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Restoration:
    failing: Reason
    """What the connection is discarded for if it fails."""
    patience: Patience
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Trust:
    """Whether a use of clears goes on, after how the last of them went."""

    is_on: bool
    failures: int = 0
    """In a row."""


class Pool(Generic[C]):
    """The connections of one key in one event loop.

    Args:
        connect: makes a connection within the seconds given.
        options: see `PoolOptions`.
        supervisor: owns the tasks and timers.
        standby_timeout: seconds a background dial may take.
        backoff: when background dials may be made.
        journal: is told what happens.
        setback_of: what the error of a dial means for the next ones.
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
        journal: Journal,
        setback_of: Callable[[Exception], Setback],
        is_defunct: Callable[[], bool],
        jitter: random.Random,
    ) -> None:
        self._connect = connect
        self._options = options
        self._supervisor = supervisor
        self._standby_timeout = standby_timeout
        self._backoff = backoff
        self.journal = journal
        self._setback_of = setback_of
        self._is_defunct = is_defunct
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._members: dict[C, _Member[C]] = {}
        self._idle: list[_Member[C]] = []  # by the time they became idle: last in, first out
        self._restoring: dict[_Member[C], _Restoration] = {}
        self._dials: set[_Dial[C]] = set()
        self._waiters: deque[_Waiter[C]] = deque()
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._kept = 0
        self._reclaims = _Trust(options.interruption == "clear")
        self._proves = _Trust(options.keepalive == "clear")
        self.is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return (
            f"<Pool {state} idle={self.idle} leased={self.leased} restoring={self.restoring}"
            f" dialling={self.dialling} waiting={len(self._waiters)}"
            f" closing={len(self._closing)} kept={self._kept}>"
        )

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def leased(self) -> int:
        # Another thread may ask between two changes that belong together.
        return max(0, len(self._members) - len(self._idle) - len(self._restoring))

    @property
    def restoring(self) -> int:
        """Neither idle nor leased: a clear is under way."""
        return len(self._restoring)

    @property
    def dialling(self) -> int:
        return len(self._dials)

    @property
    def is_empty(self) -> bool:
        return not (self._members or self._dials or self._waiters or self._closing)

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
        member = None if fresh else self._take_idle()
        if member is not None:
            self.journal.reused()
            return Acquired(member.connection, waited=0.0, reused=True, fresh=False)
        asked = self._now()
        member = await self._wait(_Waiter(asked + timeout, fresh))
        waited = self._now() - asked
        self.journal.waited(waited)
        return Acquired(member.connection, waited, reused=False, fresh=member.loans == 1)

    def release(self, connection: C) -> None:
        """Gives back a connection of which nothing more is expected."""
        member = self._members.get(connection)
        if member is None:
            return
        if self.is_closed:
            self._remove(member, Reason.CLOSED)
        elif not connection.is_reusable:
            self._remove(member, Reason.ERROR)
        else:
            member.idle_since = self._now()
            self._offer(member)
        self._settle()

    def reclaim(self, connection: C) -> None:
        """Takes back one whose use was cut off: as it is, made clean again, or not at all."""
        member = self._members.get(connection)
        if member is None:
            return
        member.idle_since = self._now()
        if self.is_closed or not self._reclaims.is_on:
            self._remove(member, Reason.INTERRUPTED)
        elif connection.is_reusable:
            self._offer(member)  # nothing is owed
        else:
            self._restore(member, Reason.INTERRUPTED)
        self._settle()

    def discard(self, connection: C, reason: Reason) -> None:
        """Takes a connection out for good and closes it in the background."""
        member = self._members.get(connection)
        if member is not None:
            self._remove(member, reason)
            self._settle()

    def condemn(self, connection: C) -> None:
        """Discards one that failed, and the idle ones of its age or older with it.

        What ended it, a restart of the server or a network that forgot, most likely ended them.
        """
        failed = self._members.get(connection)
        if failed is None:
            return
        for member in [m for m in self._idle if m.made_at <= failed.made_at]:
            self._remove(member, Reason.STALE)
        self._remove(failed, Reason.STALE)
        self._settle()

    # What owners do

    def keep(self, count: int) -> None:
        """How many connections to keep from now on, whatever they do.

        What is missing is dialled in the next turn of the event loop: a caller who asks in this
        one dials for itself, and learns from its own dial what went wrong.
        """
        self._kept = count
        self._supervisor.call_at(self._now(), self._settle)

    def prewarm(self) -> None:
        """Dials one in the background if there is none."""
        if not self._members and not self._dials and not self.is_closed:
            self._dial(None, self._standby_timeout)

    def close(self) -> None:
        """Ends the pool: leased connections when they come back, the others now.

        Whoever waits for a dial still gets it: no turn falls silent because its pool ends.
        """
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for member in [*self._idle, *self._restoring]:
            self._remove(member, Reason.CLOSED)
        self._settle()

    def abandon(self) -> None:
        """Ends the pool after a fault: whoever waits goes on without it, at once.

        What it had open is the supervisor's to close.
        """
        self.is_closed = True
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(PoolClosedError("the pool failed"))
        for held in (self._members, self._idle, self._restoring, self._dials):
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

    async def _wait(self, waiter: _Waiter[C]) -> _Member[C]:
        self._waiters.append(waiter)
        self._settle()
        expiry = self._supervisor.call_at(
            waiter.deadline, lambda: waiter.fail(AcquireTimeoutError())
        )
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # Cancelled in the moment it was handed one: the next in line gets it.
            member = waiter.unclaimed
            if member is not None:
                self.release(member.connection)
            raise
        finally:
            expiry.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _take_idle(self) -> _Member[C] | None:
        now = self._now()
        while self._idle:
            member = self._idle[-1]
            if now < member.expires_at and member.connection.is_reusable:
                self._idle.pop()
                self._lend(member)
                return member
            self._remove(member, Reason.EXPIRED if now >= member.expires_at else Reason.STALE)
        return None

    def _lend(self, member: _Member[C]) -> None:
        if not member.loans and self._backoff.next_attempt < math.inf:
            self._backoff.succeeded()
        member.loans += 1

    def _offer(self, member: _Member[C]) -> None:
        """To whoever asked first, else to the idle ones; unless its time is over."""
        member.proven_at = self._now()
        if member.proven_at >= member.expires_at:
            self._remove(member, Reason.EXPIRED)
            return
        for waiter in self._waiters:
            if waiter.accept(member):
                self._waiters.remove(waiter)
                self._lend(member)
                return
        if self.is_closed:
            self._remove(member, Reason.CLOSED)
            return
        bisect.insort(self._idle, member, key=lambda each: each.idle_since)

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
        restored = sum(not restoration.patience.is_over for restoration in self._restoring.values())
        restored = min(restored, sum(not waiter.wants_fresh for waiter in waiting))
        if dialled + restored >= len(waiting):
            return None
        have_dials = {dial.waiter for dial in self._dials}
        return next((waiter for waiter in reversed(waiting) if waiter not in have_dials), None)

    def _dial(self, waiter: _Waiter[C] | None, timeout: float) -> None:
        patience = Patience(self._supervisor, DIAL_PATIENCE, self._settle)
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
        self.journal.connected(now - dial.began)
        if dial.waiter is not None:
            self._backoff.succeeded()
        lifetime = self._options.max_age * self._jitter.uniform(0.9, 1.0)
        member = _Member(
            connection,
            rotate_at=now + lifetime - self._options.max_age * ROTATION_LEAD,
            expires_at=now + lifetime,
            made_at=now,
            idle_since=now,
            proven_at=now,
        )
        self._members[connection] = member
        connection.on_lost = lambda: self._lost(member)
        connection.on_broken_word = self._stop_reclaiming_liars
        self._offer(member)
        if not connection.is_reusable:
            # An eager task factory lets its reader run before anybody can be told of its end.
            self._lost(member)
        self._settle()

    def _dial_failed(self, dial: _Dial[C], error: Exception) -> None:
        self._backoff.failed(self._setback_of(error), self._now())
        if dial.waiter is not None:
            dial.waiter.fail(DialFailedError(error))
        elif not self.is_defunct:
            self.journal.standby_failed(error, self._backoff.next_attempt - self._now())
        self._settle()

    # Restoring

    def _restore(self, member: _Member[C], failing: Reason) -> None:
        round_trip = member.connection.round_trip
        timeout, relied_for = self._options.clear_timeout, 0.0
        if round_trip is not None:
            timeout = min(timeout, max(SHORTEST_CLEAR, CLEAR_ROUND_TRIPS * round_trip))
            relied_for = max(SHORTEST_RELIANCE, RELIED_ROUND_TRIPS * round_trip)
        patience = Patience(self._supervisor, relied_for, self._settle)
        restoration = self._restoring[member] = _Restoration(failing, patience)
        run = self._run_restore(member, timeout, patience)
        restoration.task = self._supervisor.spawn(run, name="xai_pool_patch.restore")

    async def _run_restore(self, member: _Member[C], timeout: float, patience: Patience) -> None:
        restoring = self._supervisor.spawn(member.connection.restore(), name="xai_pool_patch.clear")
        try:
            await asyncio.wait([restoring], timeout=timeout)
        finally:
            patience.stop()
            if not self._loop.is_closed():
                restoring.cancel()
        await asyncio.wait([restoring])  # until it has let go of the connection
        self._restored(member)

    def _restored(self, member: _Member[C]) -> None:
        restoration = self._restoring.pop(member, None)
        if restoration is None:
            return
        is_clean = member.connection.is_reusable
        if restoration.failing is Reason.INTERRUPTED:
            self._learn(self._reclaims, is_clean, self._stop_reclaiming)
            if is_clean:
                self.journal.reclaimed()
        else:
            self._learn(self._proves, is_clean, self._stop_proving)
            if not is_clean:
                self._backoff.failed(Setback.PASSING, self._now())
        if is_clean:
            self._offer(member)
        else:
            self._remove(member, restoration.failing)
        self._settle()

    def _learn(self, trust: _Trust, is_clean: bool, stop: Callable[[str], None]) -> None:
        """What one clear says about the next."""
        trust.failures = 0 if is_clean else trust.failures + 1
        if trust.failures >= REFUSALS:
            stop("clears are not acknowledged")

    def _stop_reclaiming(self, reason: str) -> None:
        if self._reclaims.is_on:
            self._reclaims.is_on = False
            self.journal.reclaiming_stopped(reason)

    def _stop_reclaiming_liars(self) -> None:
        self._stop_reclaiming("audio came after the acknowledgement of a clear")

    def _stop_proving(self, reason: str) -> None:
        self._proves.is_on = False
        self.journal.proving_stopped(reason)

    def _prove(self) -> None:
        """Has an idle connection prove that it lives. One at a time: callers may need the rest."""
        if self._restoring or not self._proves.is_on:
            return
        now = self._now()
        for member in self._idle:
            if member.proven_at + self._options.keepalive_after <= now:
                self._idle.remove(member)
                self._restore(member, Reason.STALE)
                return

    # Losing and closing

    def _lost(self, member: _Member[C]) -> None:
        if member.connection.broke_word:
            self._stop_reclaiming_liars()
        if member in self._restoring:
            self._restored(member)
        if member.connection not in self._members:
            return
        if not member.loans and self._now() - member.made_at < SHORT_LIFE:
            self._backoff.failed(Setback.PASSING, self._now())
        if member in self._idle:
            self._remove(member, Reason.STALE, Event.LOST)
        else:
            self._remove(member, Reason.ERROR)
        self._settle()

    def _remove(self, member: _Member[C], reason: Reason, event: Event | None = None) -> None:
        now, idle_for = self._now(), None
        if member in self._idle:
            self._idle.remove(member)
            idle_for = now - member.idle_since
        del self._members[member.connection]
        restoration = self._restoring.pop(member, None)
        event = event or _TOLD_AS.get(reason, Event.DISCARDED)
        self.journal.removed(event, reason.value, now - member.made_at, idle_for)
        if not self._loop.is_closed():
            if restoration is not None and restoration.task is not None:
                restoration.task.cancel()
            task = member.connection.close()
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
            self._prove()
            self._top_up()
        self._arm()

    def _retire_aged(self) -> None:
        now = self._now()
        for member in [m for m in self._idle if m.rotate_at <= now]:
            if 0 < self._kept <= self._fresh():
                self._remove(member, Reason.EXPIRED, Event.ROTATED)
            elif now >= member.expires_at or not self._kept:
                self._remove(member, Reason.EXPIRED)

    def _trim(self) -> None:
        now = self._now()
        while self._idle and self._fresh() + len(self._dials) > self._kept:
            if self._idle[0].idle_since + self._options.max_idle_time > now:
                return
            self._remove(self._idle[0], Reason.TRIMMED)

    def _top_up(self) -> None:
        missing = self._kept - self._fresh() - len(self._dials)
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
        return len(self._members) - sum(1 for m in self._idle if m.rotate_at <= now)

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
        if self._proves.is_on and not self._restoring:
            moments += [m.proven_at + self._options.keepalive_after for m in self._idle]
        surplus = self._fresh() + len(self._dials) - self._kept
        if surplus > 0 and self._idle:
            moments.append(self._idle[0].idle_since + self._options.max_idle_time)
        if surplus < 0:
            moments.append(self._backoff.next_attempt)
        return min(moments, default=math.inf)

    def _now(self) -> float:
        return self._loop.time()
