"""The policy of one pool: who gets which connection, what to dial, what to close.

Nothing here knows of WebSockets, xAI or LiveKit. Every event (asked, given back, dialled, lost,
time passed) changes plain state in one synchronous step, `_settle` decides what follows from it,
and the I/O happens in tasks of its own. No lock is needed, and none is held.
"""

from __future__ import annotations

import asyncio
import enum
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from .background import call_at, spawn
from .backoff import Backoff, Setback
from .errors import XaiPoolPatchError
from .options import PoolOptions
from .telemetry import Counters, describe, log

PATIENCE = 1.0
"""Seconds a caller relies on a dial that somebody else began, before it begins its own: about
twice the 0.45 to 0.6 s a handshake takes in production (livekit/agents issue 6078)."""

ROTATION_LEAD = 0.05
"""Part of `max_age` before its end in which an idle connection is replaced: 90 s of 1,800 s, time
for several attempts while the old connection still serves."""

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

    def close(self) -> asyncio.Task[None] | None: ...


C = TypeVar("C", bound=Poolable)


@dataclass(frozen=True)
class Acquired(Generic[C]):
    connection: C
    waited: float
    """Seconds; 0.0 for a connection that was there when asked for."""
    reused: bool
    """It was there when asked for."""


@dataclass(eq=False)
class _Member(Generic[C]):
    connection: C
    rotate_at: float
    """From here on it is replaced when idle, and serves only until the replacement is there."""
    expires_at: float
    """From here on it is not handed out."""
    made_at: float
    idle_since: float = 0.0
    was_leased: bool = False


@dataclass(eq=False)
class _Waiter(Generic[C]):
    deadline: float
    wants_fresh: bool
    future: asyncio.Future[_Member[C]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def accept(self, member: _Member[C]) -> bool:
        """Whether it still wanted one, and this one."""
        if self.future.done() or (self.wants_fresh and member.was_leased):
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
    late_at: float
    waiter: _Waiter[C] | None
    """Who asked for it; nobody, for a standby."""
    task: asyncio.Task[None] | None = None


class Pool(Generic[C]):
    """The connections of one key in one event loop.

    Args:
        connect: makes a connection within the seconds given.
        options: see `PoolOptions`.
        standby_timeout: seconds a background dial may take.
        backoff: when background dials may be made.
        setback_of: what the error of a dial means for the next ones.
        is_defunct: whether what it dials with is gone for good, so that it should end quietly.
    """

    def __init__(
        self,
        connect: Callable[[float], Awaitable[C]],
        options: PoolOptions,
        *,
        standby_timeout: float,
        backoff: Backoff,
        counters: Counters,
        setback_of: Callable[[Exception], Setback],
        is_defunct: Callable[[], bool],
        jitter: random.Random,
    ) -> None:
        self._connect = connect
        self._options = options
        self._standby_timeout = standby_timeout
        self._backoff = backoff
        self.counters = counters
        self._setback_of = setback_of
        self._is_defunct = is_defunct
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._members: dict[C, _Member[C]] = {}
        self._idle: list[_Member[C]] = []  # by the time they became idle: last in, first out
        self._dials: set[_Dial[C]] = set()
        self._waiters: deque[_Waiter[C]] = deque()
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._kept = 0
        self.is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return (
            f"<Pool {state} idle={self.idle} leased={self.leased} dialling={self.dialling}"
            f" waiting={len(self._waiters)} closing={len(self._closing)} kept={self._kept}>"
        )

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def leased(self) -> int:
        return len(self._members) - len(self._idle)

    @property
    def dialling(self) -> int:
        return len(self._dials)

    @property
    def is_empty(self) -> bool:
        return not (self._members or self._dials or self._waiters or self._closing)

    # What callers do

    async def acquire(self, timeout: float, *, fresh: bool = False) -> Acquired[C]:
        """An idle connection at once, else the first that comes.

        Args:
            timeout: seconds the whole wait may take.
            fresh: take none that has been used or has lain idle.

        Raises:
            DialFailedError: the dial made for this caller failed.
            AcquireTimeoutError: nothing came in time.
            PoolClosedError: the pool has ended.
        """
        if self.is_closed:
            raise PoolClosedError("acquire() on a pool that has ended")
        member = None if fresh else self._take_idle()
        if member is not None:
            self.counters.reused()
            return Acquired(member.connection, waited=0.0, reused=True)
        asked = self._now()
        member = await self._wait(_Waiter(asked + timeout, fresh))
        waited = self._now() - asked
        self.counters.waited(waited)
        return Acquired(member.connection, waited=waited, reused=False)

    def release(self, connection: C) -> None:
        """Gives back a connection of which nothing more is expected."""
        member = self._members.get(connection)
        if member is None:
            return
        if self.is_closed:
            self._remove(member, Reason.CLOSED)
        elif not connection.is_reusable:
            self._remove(member, Reason.ERROR)
        elif self._now() >= member.expires_at:
            self._remove(member, Reason.EXPIRED)
        else:
            self._offer(member)
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
        call_at(self._now(), self._settle)

    def prewarm(self) -> None:
        """Dials one in the background if there is none."""
        if not self._members and not self._dials and not self.is_closed:
            self._dial(None, self._standby_timeout)

    def close(self) -> None:
        """Ends the pool: idle connections now, leased ones when they come back.

        Whoever waits for a dial still gets it: no turn falls silent because its pool ends.
        """
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for member in list(self._idle):
            self._remove(member, Reason.CLOSED)
        self._settle()

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
        expiry = call_at(waiter.deadline, lambda: waiter.fail(AcquireTimeoutError()))
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
        if not member.was_leased and self._backoff.next_attempt < math.inf:
            self._backoff.succeeded()
        member.was_leased = True

    def _offer(self, member: _Member[C]) -> None:
        """To whoever asked first, else to the idle ones."""
        for waiter in self._waiters:
            if waiter.accept(member):
                self._waiters.remove(waiter)
                self._lend(member)
                return
        if self.is_closed:
            self._remove(member, Reason.CLOSED)
            return
        member.idle_since = self._now()
        self._idle.append(member)

    # Dialling

    def _dial_for_waiters(self) -> None:
        """One dial under way for each waiter, whoever began it.

        From the last in line: those before it have dials of their own, or were content with
        somebody else's. A dial that takes longer than a handshake should is not relied on.
        """
        now = self._now()
        # One that was served, failed or cancelled leaves the line only when its task wakes up.
        waiting = [waiter for waiter in self._waiters if not waiter.future.done()]
        for waiter in reversed(waiting):
            if sum(1 for dial in self._dials if now < dial.late_at) >= len(waiting):
                return
            if not any(dial.waiter is waiter for dial in self._dials):
                self._dial(waiter, waiter.deadline - now)

    def _dial(self, waiter: _Waiter[C] | None, timeout: float) -> None:
        now = self._now()
        dial = _Dial(began=now, late_at=now + PATIENCE, waiter=waiter)
        self._dials.add(dial)  # first: an eager task may end before spawn() returns
        dial.task = spawn(self._run_dial(dial, timeout), name="xai_pool_patch.dial")

    async def _run_dial(self, dial: _Dial[C], timeout: float) -> None:
        try:
            connection = await self._connect(timeout)
        except asyncio.CancelledError:
            # By aclose() or by the end of the loop: either way nobody should dial again.
            self._dials.discard(dial)
            if dial.waiter is not None:
                dial.waiter.fail(PoolClosedError("the pool ended during the dial"))
            self.close()
            raise
        except Exception as error:
            self._dials.discard(dial)
            self._dial_failed(dial, error)
        else:
            self._dials.discard(dial)
            self._dial_succeeded(dial, connection)

    def _dial_succeeded(self, dial: _Dial[C], connection: C) -> None:
        now = self._now()
        self.counters.connected(now - dial.began)
        log().info("connected", handshake_ms=round((now - dial.began) * 1e3, 1))
        if dial.waiter is not None:
            self._backoff.succeeded()
        lifetime = self._options.max_age * self._jitter.uniform(0.9, 1.0)
        member = _Member(
            connection,
            rotate_at=now + lifetime - self._options.max_age * ROTATION_LEAD,
            expires_at=now + lifetime,
            made_at=now,
        )
        self._members[connection] = member
        connection.on_lost = lambda: self._lost(member)
        self._offer(member)
        self._settle()

    def _dial_failed(self, dial: _Dial[C], error: Exception) -> None:
        self._backoff.failed(self._setback_of(error), self._now())
        if dial.waiter is not None:
            dial.waiter.fail(DialFailedError(error))
        elif not self._is_defunct():
            self.counters.standby_failed()
            delay = self._backoff.next_attempt - self._now()
            log().warning("standby failed", error=describe(error), retry_in_s=round(delay, 1))
        self._settle()

    # Losing and closing

    def _lost(self, member: _Member[C]) -> None:
        if member.connection not in self._members:
            return
        if not member.was_leased and self._now() - member.made_at < SHORT_LIFE:
            self._backoff.failed(Setback.PASSING, self._now())
        self._remove(member, Reason.STALE if member in self._idle else Reason.ERROR)
        self._settle()

    def _remove(self, member: _Member[C], reason: Reason) -> None:
        del self._members[member.connection]
        if member in self._idle:
            self._idle.remove(member)
        self.counters.discarded(reason.value)
        log().info("discarded", reason=reason.value)
        if not self._loop.is_closed():
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
            self._top_up()
        self._arm()

    def _retire_aged(self) -> None:
        now = self._now()
        for member in [m for m in self._idle if m.rotate_at <= now]:
            if now >= member.expires_at or self._fresh() >= self._kept:
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
        if self._is_defunct():
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
        self._timer = call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._settle()

    def _next_due(self) -> float:
        now = self._now()
        moments = [dial.late_at for dial in self._dials if self._waiters and now < dial.late_at]
        if not self.is_closed:
            moments += [m.expires_at if m.rotate_at <= now else m.rotate_at for m in self._idle]
            surplus = self._fresh() + len(self._dials) - self._kept
            if surplus > 0 and self._idle:
                moments.append(self._idle[0].idle_since + self._options.max_idle_time)
            if surplus < 0:
                moments.append(self._backoff.next_attempt)
        return min(moments, default=math.inf)

    def _now(self) -> float:
        return self._loop.time()
