"""The policy of one pool: who gets which connection, what to dial, what to close.

Nothing here knows WebSockets, xAI or LiveKit. Each event (a caller asks, a connection comes back,
a dial ends, the peer closes, time passes) changes plain state in one synchronous step. Then
`settle` decides what follows, and tasks of their own do the I/O. So no lock is needed.

From Python 3.12 on a dial is an eager task, and an application may make all tasks eager. Such a
task runs inside `spawn()`, up to its first real wait, and may change the pool's state before
`spawn()` returns.
"""

from __future__ import annotations

import asyncio
import bisect
import contextvars
import functools
import math
import random
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol

from ..errors import XaiPoolPatchError
from ..options import PoolOptions
from ..telemetry.pool_metrics import PoolMetrics
from .backoff import Backoff, FailureKind
from .clearing import Clearing
from .entries import Acquired, C, C_co, Dial, Outcome, PoolEntry, Reason, Waiter
from .soft_timeout import SoftTimeout
from .supervisor import CLOSE_TIMEOUT, Supervisor

STANDBY_TIMEOUT = 10.0
"""Seconds a background dial may take: what LiveKit allows a caller's (`APIConnectOptions`)."""

DIAL_SOFT_TIMEOUT = 1.0
"""Seconds from its start in which callers rely on a dial that was begun for others. Then the pool
dials for them. A handshake takes 0.45 to 0.6 s in production (livekit/agents issue 6078)."""

OVERLAP = 0.01
"""Seconds after which a caller that waits already gets a second dial. livekit-agents 1.5 begins a
preemptive reply just before it cancels the one that this replaces."""

ROTATION_LEAD = 0.05
"""The pool replaces an idle connection this part of `max_age` before it expires: 27 s of 540 s.
That leaves time for several attempts while the old connection still serves."""

LINGER = 0.3
"""Seconds that an idle connection stays while the pool keeps none. They bridge the gap between two
sentences of a reply."""

SPARE_IDLE_TIME = 5.0
"""Seconds that an idle connection stays which is not expected to be used: one dialled too late to
be needed, or the rest of a burst. Each counts among the team's sessions."""

PREWARM_LASTS = 3.0
"""Seconds that a connection made by `prewarm()` waits for its first use where nothing else keeps
it. LiveKit prewarms when a session starts, and an agent that greets speaks within that time."""

ON_DEMAND_LASTS = 120.0
"""Seconds after a caller's refusal in which a lean pool dials for callers only, and keeps nothing.
Dialling ahead and lingering hold a session about a third longer than an utterance needs. Where even
speaking calls are too many, that third would cost others their reply."""

ROOM_LASTS = 5.0
"""The same after a pool has let go of what was idle for a caller of another one: until that caller
has its connection, nothing is dialled that would take its place."""

SHORT_LIFE = 30.0
"""Seconds. If a server ends an unused connection sooner, the pool dials again with backoff only."""


class Mode(NamedTuple):
    """What a pool keeps, and what it dials ahead."""

    label: str
    idle_time: float
    """Of what is not needed."""
    keeps_min_size: bool
    dials_for_replies: bool


WARM = Mode("warm", SPARE_IDLE_TIME, keeps_min_size=True, dials_for_replies=True)
LEAN = Mode("lean", LINGER, keeps_min_size=False, dials_for_replies=True)
ON_DEMAND = Mode("on demand", 0.0, keeps_min_size=False, dials_for_replies=False)

ANYBODY = object()
"""The caller that `prewarm()` expects."""


class PoolClosedError(XaiPoolPatchError):
    """The pool has ended and hands out nothing any more."""


class DialFailedError(XaiPoolPatchError):
    """The caller's own dial failed.

    Attributes:
        error: the exception of the dial.
        kind: what it means for the next dials.
    """

    def __init__(self, error: Exception, kind: FailureKind) -> None:
        super().__init__(f"dial failed: {type(error).__name__}")
        self.error = error
        self.kind = kind


class AcquireTimeoutError(XaiPoolPatchError):
    """No connection came within the caller's timeout."""


class Environment(Protocol[C_co]):
    """What a pool asks, and whom it tells what happens to it."""

    async def connect(self, pool: Pool[Any], timeout: float) -> C_co | DialFailedError:
        """Make a connection within the given seconds.

        What this raises is a fault. Taken for a failure of the network, every turn would meet it
        again, and no agent of the process would speak any more.
        """

    def dial_failed(self, pool: Pool[Any], failure: DialFailedError) -> None:
        """A dial of that pool has failed."""

    def is_defunct(self, pool: Pool[Any]) -> bool:
        """Whether `connect` can never succeed again, so that the pool should end quietly."""

    def may_dial_ahead(self, pool: Pool[Any]) -> bool:
        """Whether there is a place for what no caller waits for. When that changes, `Pool.settle`
        has to be called."""

    def make_room(self) -> object:
        """A caller's dial takes too long: what is idle anywhere in this process may take its
        place."""

    def place_is_free(self) -> None:
        """A connection has been closed, or a dial has failed."""


@dataclass(eq=False)
class Pool(Generic[C]):
    """The connections of one key in one event loop.

    Attributes:
        is_lean: sessions are scarce, or the options say so.
    """

    key: Any
    """What the environment knows this pool by."""
    environment: Environment[C]
    options: PoolOptions
    supervisor: Supervisor
    """Owns the tasks and timers."""
    backoff: Backoff
    """Decides when background dials may be made."""
    metrics: PoolMetrics
    max_age: float
    """See `PoolOptions.max_age`; the application may want less."""
    jitter: random.Random
    """Spreads the ages at which connections expire."""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._entries: dict[C, PoolEntry[C]] = {}
        self._idle: list[PoolEntry[C]] = []  # by the time they became idle: last in, first out
        clears = self.options.interruption == "clear"
        self._clearing = Clearing(clears, self.supervisor, self.metrics, self._cleared, self.settle)
        self._dials: set[Dial[C]] = set()
        self._waiters: deque[Waiter[C]] = deque()
        self._closing: dict[asyncio.Task[None], C] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._min_size = 0
        self._is_retired = False
        self._on_demand_until = -math.inf
        self._expected: dict[object, float] = {}
        """The callers that will probably ask for a connection, and until when."""
        self.is_lean = False
        self.is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else self.mode.label
        counts = (
            f"idle={self.idle} leased={self.leased} clearing={self.clearing}"
            f" connecting={self.connecting} waiting={len(self._waiters)}"
            f" closing={len(self._closing)} min_size={self._min_size}"
        )
        return f"<Pool {state} {counts}{self._why_nothing_is_dialled()}>"

    def _why_nothing_is_dialled(self) -> str:
        now = self._loop.time()
        if self.mode is ON_DEMAND:
            return f", dials for callers only for {self._on_demand_until - now:.1f} s"
        if self._missing() <= 0:
            return ""
        if not self.environment.may_dial_ahead(self):
            return ", no place for a standby"
        pause = self.backoff.next_attempt - now
        return f", next dial in {pause:.1f} s" if pause > 0.0 else ""

    @property
    def mode(self) -> Mode:
        if self._now() < self._on_demand_until:
            return ON_DEMAND
        return LEAN if self.is_lean else WARM

    @property
    def connections(self) -> tuple[C, ...]:
        """The connections that the pool holds: idle, leased, or being cleared."""
        return tuple(self._entries)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def leased(self) -> int:
        # Statistics may be read in another thread, between two changes that belong together. In
        # `_remove` an entry leaves `_entries` before its clear is dropped: the difference would be
        # -1 then.
        return max(0, len(self._entries) - len(self._idle) - self.clearing)

    @property
    def clearing(self) -> int:
        """Connections that are neither idle nor leased, since a clear is under way."""
        return len(self._clearing.under_way)

    @property
    def connecting(self) -> int:
        return len(self._dials)

    @property
    def closing(self) -> int:
        """Connections whose Close is not answered yet: the server may count them still."""
        return len(self._closing)

    @property
    def counts(self) -> dict[str, int]:
        """What statistics show of the moment."""
        return {
            "idle": self.idle,
            "leased": self.leased,
            "clearing": self.clearing,
            "connecting": self.connecting,
            "lean": self.is_lean,
        }

    @property
    def is_empty(self) -> bool:
        return not (self._entries or self._dials or self._waiters or self._closing)

    @property
    def is_defunct(self) -> bool:
        """What it dials with is gone for good."""
        return self.environment.is_defunct(self)

    # For callers

    async def acquire(
        self, timeout: float, *, fresh: bool = False, caller: object = None
    ) -> Acquired[C]:
        """Take an idle connection at once, else the first that comes.

        Args:
            timeout: seconds the whole wait may take.
            fresh: take only a connection that is unused and has not been idle. It is for
                the replay of an utterance under way, so a pool that has ended dials it too.
            caller: the caller that `expect` announced, if there was one.

        Raises:
            DialFailedError: the dial made for this caller failed.
            AcquireTimeoutError: no connection came in time.
            PoolClosedError: the pool has ended.
        """
        if self.is_closed and not fresh:
            raise PoolClosedError("acquire() on a pool that has ended")
        asked = self._now()
        # Do this before `_wait()`: otherwise the caller counts twice and two dials start.
        self._fulfil(caller)
        if caller is not None and any(waiter.caller is caller for waiter in self._waiting()):
            await asyncio.sleep(OVERLAP)
            if self.supervisor.is_stopped:  # meanwhile, and `abandon` did not see this caller
                raise PoolClosedError("the pool failed")
        entry = None if fresh else self._take_idle(caller)
        if entry is not None:
            if self._expected:
                self.settle()  # it may have been the one that was ready for another caller
            self.metrics.reused()
            return Acquired(entry.connection, waited=0.0, reused=True, fresh=False)
        entry = await self._wait(Waiter(asked + timeout, fresh, caller))
        waited = self._now() - asked
        self.metrics.waited(waited)
        # The peer may have ended the connection between accept() and here. The caller gets it all
        # the same, and fails to send, as on a connection that ends during its use.
        return Acquired(entry.connection, waited, reused=False, fresh=entry.lease_count == 1)

    def give_back(self, connection: C, outcome: Outcome) -> None:
        """Take a connection back after an utterance.

        The pool keeps it if the server owes nothing. After an interruption it clears it, if it may.
        """
        entry = self._entries.get(connection)
        if entry is None:
            return  # the peer ended it, or the pool gave up on it, while it was leased
        # Before `_offer`, which may lend the connection to a caller that waits. That one would be
        # forgotten as the holder. Expected again while it speaks, it would get a second connection.
        entry.idle_since, entry.holder = self._now(), None
        is_cut_off = outcome is Outcome.INTERRUPTED
        may_stay = not self.is_closed and (not is_cut_off or self._clearing.clears_interrupted)
        if may_stay and outcome is not Outcome.FAILED and connection.is_reusable:
            self._offer(entry)
        elif may_stay and is_cut_off and (round_trip := connection.clear_round_trip) is not None:
            self._clearing.begin(entry, round_trip)
        elif is_cut_off:
            self._remove(entry, Reason.INTERRUPTED)
        else:
            self._remove(entry, Reason.SHUTDOWN if self.is_closed else Reason.FAILED)
        self.settle()

    def give_away(self, connection: C) -> None:
        """Forget a connection, which the application goes on to use."""
        entry = self._entries.pop(connection, None)
        if entry is not None:
            connection.on_lost = None
            self.settle()

    def evict(self, connection: C, *, listen: bool, with_others: bool) -> None:
        """Close a leased connection that failed.

        Args:
            listen: hear first whether it is alive after all: see `Poolable.close`.
            with_others: close all idle ones that are as old or older, too. A restart of the server
                or a NAT that dropped the connection most likely ended those as well.
        """
        failed = self._entries.get(connection)
        if failed is None:
            return
        self._remove(failed, Reason.LOST, listen=listen)
        if with_others:
            self._close_idle(Reason.LOST, made_by=failed.made_at)
        self.settle()

    # For those who know what comes

    def expect(self, caller: object, until: float) -> None:
        """Have a connection ready for a caller that will probably ask for one.

        Only one, however often this is called for the same caller. A caller that has a connection
        of this pool is expected to use that again.

        Args:
            until: when to give up expecting; time of the event loop. A later call may prolong it.
        """
        if not self.is_closed:
            # LiveKit prewarms when a session starts, and the first to be expected is most likely
            # that session. Counted side by side, the two would have a connection each.
            self._expected.pop(ANYBODY, None)
            self._expected[caller] = max(until, self._expected.get(caller, until))
            self.settle()

    def withdraw(self, caller: object) -> None:
        """Do not expect that caller any more."""
        if self._expected.pop(caller, None) is not None:
            self.metrics.sign_unused()
            self.settle()

    def prewarm(self) -> None:
        """Dial one connection in the background if there is none, for the first caller."""
        if not self._entries and not self._dials:
            self.expect(ANYBODY, self._now() + PREWARM_LASTS)

    def _fulfil(self, caller: object) -> None:
        """A caller asks for a connection, so it is not expected any more."""
        for expected in {caller, ANYBODY} & self._expected.keys():
            del self._expected[expected]
            self.metrics.sign_used()

    # For owners

    def resize(self, min_size: int) -> None:
        """Keep this many connections from now on, idle or not."""
        self._min_size, self._is_retired = min_size, False
        self.settle_soon()

    def retire(self) -> dict[object, float]:
        """No TTS speaks with this key now. Keep what has been used, in case one comes back.

        Returns:
            The callers that were expected here, and until when.
        """
        self._min_size, self._is_retired = 0, True
        expected, self._expected = self._expected, {}
        self.settle_soon()
        return expected

    def set_lean(self, is_lean: bool) -> None:
        """See `is_lean`."""
        self.is_lean = is_lean
        self.settle_soon()  # also for what was held back while sessions were scarce

    def let_go(self) -> list[asyncio.Task[None]]:
        """Close all idle connections in the background, to make room for a caller elsewhere.

        Returns:
            The tasks that do so, and those that were closing a connection before.
        """
        if self._idle:  # else it may be the caller's own pool, on a slow line
            self._go_on_demand(ROOM_LASTS, "others need the connection")
            self._close_idle(Reason.SURPLUS)
            self.settle()
        return list(self._closing)

    def _go_on_demand(self, seconds: float, reason: str) -> None:
        self._on_demand_until = max(self._now() + seconds, self._on_demand_until)
        self.metrics.on_demand(self._on_demand_until - self._now(), reason)

    def abort_closing(self) -> None:
        """Wait no longer for the answers to Close frames that have been on their way for long."""
        for connection in list(self._closing.values()):
            connection.abort_if_closing()

    def settle_soon(self) -> None:
        # A TTS registers and asks for a connection in one step of the event loop. Dialled at once,
        # the standby would serve that caller, who would then learn of a failed dial only after a
        # second one. A step later the caller has a dial of its own, and that one counts.
        self.supervisor.call_at(self._now(), self.settle)

    def close(self) -> None:
        """End the pool: close leased connections when they come back, and the others now.

        A caller that waits for a dial still gets a connection: no turn falls silent because its
        pool ends.
        """
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._expected.clear()
        self._close_idle(Reason.SHUTDOWN)
        while entry := next(iter(self._clearing.under_way), None):
            self._remove(entry, Reason.SHUTDOWN)
        # A caller may have relied on a clear that has just been dropped. Nothing else would dial
        # for it now.
        self.settle()

    def abandon(self) -> None:
        """End the pool after a fault: callers that wait go on without it, at once.

        The supervisor closes what the pool had open.
        """
        self.is_closed = True
        for waiter in self._waiters:
            waiter.fail(PoolClosedError("the pool failed"))
        # The supervisor has cancelled the dials, and a step later each of them calls close(). That
        # must find nothing to close: how the pool closes may be what failed.
        for held in (self._entries, self._idle, self._clearing.under_way, self._dials):
            held.clear()

    async def aclose(self) -> None:
        """End the pool, and wait up to `CLOSE_TIMEOUT` for its dials and closes."""
        self.close()
        deadline = self._now() + CLOSE_TIMEOUT
        # Dials first: one that succeeds now is closed at once, which adds to `_closing`.
        await self._finish({dial.task for dial in self._dials if dial.task}, deadline)
        await self._finish(set(self._closing), deadline)

    async def _finish(self, tasks: set[asyncio.Task[None]], deadline: float) -> None:
        """Wait for tasks until the deadline, and cancel those that are late."""
        if not tasks:
            return
        # Not gather(): if this aclose() is cancelled, the tasks must go on. A caller may wait for
        # the dial, and another aclose() for the close.
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - self._now()))
        for task in late:
            task.cancel()
        if late:
            # A cancelled task needs steps of its own to let go of its socket. Without this wait
            # the caller may close the HTTP session, or the loop, in between.
            await asyncio.wait(late)

    # Waiting

    def _waiting(self) -> list[Waiter[C]]:
        # A waiter that was served, failed or cancelled leaves the queue when its task runs again.
        # Counted until then, it would get a dial without a caller.
        return [waiter for waiter in self._waiters if not waiter.woken.done()]

    async def _wait(self, waiter: Waiter[C]) -> PoolEntry[C]:
        expiry = self.supervisor.call_at(waiter.deadline, waiter.fail, AcquireTimeoutError())
        try:
            self._waiters.append(waiter)
            self.settle()
            await waiter.woken
        except asyncio.CancelledError:
            # The caller was cancelled after accept() and before its task ran again. Without this
            # the connection would stay leased for ever.
            if isinstance(waiter.outcome, PoolEntry):
                self.give_back(waiter.outcome.connection, Outcome.FINISHED)
            raise
        finally:
            expiry.cancel()
            # `_offer` has removed it if it was served, but not if it failed or was cancelled.
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if isinstance(waiter.outcome, PoolEntry):
            return waiter.outcome
        raise waiter.outcome

    def _take_idle(self, caller: object) -> PoolEntry[C] | None:
        now = self._now()
        while self._idle:
            entry = self._idle[-1]
            # On a loop that was blocked, a caller may run before the timer that closes what has
            # expired. And a reader that was cancelled, since the loop is ending, reports no loss:
            # its connection is still here, and dead.
            if now < entry.expires_at and entry.connection.is_reusable:
                self._idle.pop()
                self._lend(entry, caller)
                return entry
            self._remove(entry, Reason.EXPIRED if now >= entry.expires_at else Reason.LOST)
        return None

    def _lend(self, entry: PoolEntry[C], caller: object) -> None:
        # A standby resets the backoff only when a caller uses it. A server may accept handshakes
        # and then end the connections: reset by the dial, the pool would dial without a pause.
        # After a permanent refusal only a caller's dial resets it (`_dial_succeeded`).
        if not entry.lease_count and self.backoff.next_attempt < math.inf:
            self.backoff.succeeded()
        entry.lease_count += 1
        entry.holder = caller

    def _offer(self, entry: PoolEntry[C]) -> None:
        """Hand a clean connection to the first caller that accepts it; else it becomes idle."""
        if self._now() >= entry.expires_at:
            # During its lease or its clear, when `_retire_aged` does not look at it. A caller that
            # waits would get it before `settle` could close it.
            self._remove(entry, Reason.EXPIRED)
            return
        for waiter in self._waiters:
            if waiter.accept(entry):
                # The waiter's task runs later. Still in the queue, it would be counted until then
                # in `repr()` and `is_empty`.
                self._waiters.remove(waiter)
                self._lend(entry, waiter.caller)
                return
        if self.is_closed:
            # The pool has ended during the dial. `settle` closes nothing in such a pool, so an
            # idle connection would stay open for ever.
            self._remove(entry, Reason.SHUTDOWN)
            return
        # A cleared connection is sorted in where it belongs, not last: `idle_since` is when its
        # utterance ended, and `_trim` looks only at the first one.
        bisect.insort(self._idle, entry, key=lambda each: each.idle_since)

    # Dialling

    def _dial_for_waiters(self) -> None:
        # Looked up again after each dial: an eager dial may have served or failed a waiter before
        # spawn() returned. A list made beforehand would dial for that waiter all the same.
        while (waiter := self._next_to_dial_for()) is not None:
            self._dial(waiter, waiter.deadline - self._now())

    def _next_to_dial_for(self) -> Waiter[C] | None:
        """The caller to dial for, if fewer connections are on their way than callers wait.

        All dials count, and so do clears, unless they take longer than they should.
        The last caller in line is next: those before it have dials of their own, or rely on a
        dial or clear that was begun for others.
        """
        waiting = self._waiting()
        if not waiting:
            return None
        dialled = sum(not dial.soft_timeout.is_over for dial in self._dials)
        cleared = sum(not clear.soft_timeout.is_over for clear in self._clearing.under_way.values())
        # A caller that wants a fresh connection would rely on a clear in vain.
        cleared = min(cleared, sum(not waiter.wants_fresh for waiter in waiting))
        if dialled + cleared >= len(waiting):
            return None
        have_dials = {dial.waiter for dial in self._dials}
        return next((waiter for waiter in reversed(waiting) if waiter not in have_dials), None)

    def _dial(self, waiter: Waiter[C] | None, timeout: float) -> None:
        late = functools.partial(self._dial_is_late, waiter)
        soft_timeout = SoftTimeout(self.supervisor, DIAL_SOFT_TIMEOUT, late)
        dial = Dial(self._now(), waiter, soft_timeout)
        # Before spawn(): an eager dial may end before spawn() returns. If it were added later, it
        # would stay in `_dials` for ever, and callers would rely on it.
        self._dials.add(dial)
        run = self._run_dial(dial, timeout)
        context = waiter.context if waiter is not None else contextvars.Context()
        dial.task = self.supervisor.spawn(run, "xai_pool_patch.dial", eager_in=context)

    def _dial_is_late(self, waiter: Waiter[C] | None) -> None:
        if waiter is not None:
            self.environment.make_room()
        self.settle()

    async def _run_dial(self, dial: Dial[C], timeout: float) -> None:
        try:
            outcome = await self.environment.connect(self, timeout)
        except asyncio.CancelledError:
            # aclose() cancelled the dial, or the loop is ending. The waiter must fail, or its
            # caller waits until its deadline. And the pool must end: open, it would dial anew for
            # what is missing, on a loop about to close. In this order: close() settles, and would
            # dial again for a waiter that has not failed, or rely on this dial for another.
            self._dials.discard(dial)
            if dial.waiter is not None:
                dial.waiter.fail(PoolClosedError("the pool ended during the dial"))
            self.close()
            raise
        except Exception:  # a fault, after which the manager may not know this pool any more
            if dial.waiter is not None:
                dial.waiter.fail(PoolClosedError("the pool failed during the dial"))
            raise
        finally:
            dial.soft_timeout.stop()
        # First, since both outcomes settle: other callers would rely on a dial that has failed, and
        # one that has succeeded would count twice.
        self._dials.discard(dial)
        if isinstance(outcome, DialFailedError):
            self._dial_failed(dial, outcome)
        else:
            self._dial_succeeded(dial, outcome)

    def _dial_succeeded(self, dial: Dial[C], connection: C) -> None:
        now = self._now()
        self.metrics.connected(now - dial.began)
        if dial.waiter is not None:
            self.backoff.succeeded()
        expires_at = now + self.max_age * self.jitter.uniform(0.9, 1.0)
        rotate_at = expires_at - self.max_age * ROTATION_LEAD
        entry = PoolEntry(connection, rotate_at, expires_at, made_at=now, idle_since=now)
        self._entries[connection] = entry
        connection.on_lost = lambda: self._lost(entry)
        self._offer(entry)
        is_unwanted = self._is_retired and dial.waiter is None and self._missing() < 0
        if is_unwanted and entry in self._idle:
            self._remove(entry, Reason.SURPLUS)  # the voice was changed again during the dial
        elif not connection.is_reusable:
            # The reader of an eager loop runs while the connection is made, and may meet its end
            # before `on_lost` is set. The dead connection would stay in the pool.
            self._lost(entry)
        self.settle()

    def _dial_failed(self, dial: Dial[C], failure: DialFailedError) -> None:
        self.backoff.failed(failure.kind, self._now())
        if failure.kind is FailureKind.REFUSED:
            self.metrics.rate_limited()
            if self.is_lean and dial.waiter is not None:
                seconds = ON_DEMAND_LASTS * self.jitter.uniform(0.8, 1.0)
                self._go_on_demand(seconds, "refused, though nothing was kept")
        if dial.waiter is not None:
            # Before anything that settles, which would dial for this waiter again.
            dial.waiter.fail(failure)
        # It may make this pool lean, which was asked for above.
        self.environment.dial_failed(self, failure)
        if dial.waiter is None and not self.is_defunct:
            retry_in = self.backoff.next_attempt - self._now()
            self.metrics.standby_failed(failure.error, retry_in)
        self.supervisor.call_at(self._now(), self.environment.place_is_free)
        self.settle()

    # Losing and closing

    def _cleared(self, entry: PoolEntry[C]) -> None:
        if entry.connection.is_reusable:
            self._offer(entry)
        else:
            self._remove(entry, Reason.INTERRUPTED)
        self.settle()

    def _lost(self, entry: PoolEntry[C]) -> None:
        # At once, though the task of the clear would find out a step later: until then callers
        # would rely on this clear.
        self._clearing.ended(entry)
        if entry.connection not in self._entries:
            return  # closed already: by ended(), with its lease, or by `_offer` when its dial ended
        if not entry.lease_count and self._now() - entry.made_at < SHORT_LIFE:
            # From the dial on: what the backoff limits is how often the pool dials. Counted from
            # here on, a server that ends idle connections after some seconds would cost a turn.
            self.backoff.failed(FailureKind.TRANSIENT, entry.made_at)
        self._remove(entry, Reason.LOST if entry in self._idle else Reason.FAILED)
        self.settle()

    def _remove(self, entry: PoolEntry[C], reason: Reason, *, listen: bool = False) -> None:
        now, idle_for = self._now(), None
        if entry in self._idle:
            self._idle.remove(entry)
            idle_for = now - entry.idle_since
        del self._entries[entry.connection]
        self._clearing.drop(entry)
        self.metrics.closed(reason.value, now - entry.made_at, idle_for)
        # A lease may be collected after its loop was closed. Nothing can be sent then, and the
        # task of a close would never run.
        if not self._loop.is_closed():
            task = entry.connection.close(listen=listen)
            if task is not None:
                self._closing[task] = entry.connection
                task.add_done_callback(functools.partial(self.supervisor.run, self._has_closed))
            else:
                self.supervisor.call_at(now, self.environment.place_is_free)

    def _close_idle(self, reason: Reason, *, made_by: float = math.inf) -> None:
        # Looked up again after each: a log handler that runs the loop lets callers ask meanwhile,
        # and one of a list made beforehand may be in use by then.
        while entry := next((each for each in self._idle if each.made_at <= made_by), None):
            self._remove(entry, reason)

    def _has_closed(self, task: asyncio.Task[None]) -> None:
        del self._closing[task]
        self.environment.place_is_free()

    # What follows from the state

    def settle(self) -> None:
        """Do whatever the state calls for. Every change of the state must be followed by this.

        Each rule that depends on time returns when it has to run again if nothing else happens.
        """
        # Callers first: a standby that `_top_up` dials would serve a caller, who would then learn
        # of a failed dial only after a second one.
        self._dial_for_waiters()
        if not self.is_closed:
            # `_forget_late` first: the others count those who are expected. They would keep a
            # connection for a caller who is not, until something else happens.
            rules = (self._forget_late, self._retire_aged, self._trim, self._top_up)
            mode_ends = self._on_demand_until if self.mode is ON_DEMAND else math.inf
            self._arm(min([mode_ends, *[rule() for rule in rules]]))

    def _forget_late(self) -> float:
        """Expect no caller any more that should have asked by now."""
        now = self._now()
        for caller in [caller for caller, until in self._expected.items() if until <= now]:
            del self._expected[caller]
            self.metrics.sign_unused()
        return min(self._expected.values(), default=math.inf)

    def _retire_aged(self) -> float:
        """Close idle connections that are replaced or expired."""
        now, due = self._now(), math.inf
        for entry in list(self._idle):
            if entry not in self._idle:
                continue  # taken while the one before was logged: see `_close_idle`
            if now < entry.rotate_at:
                due = min(due, entry.rotate_at)
            elif now >= entry.expires_at or self._fresh() >= self._wanted():
                self._remove(entry, Reason.EXPIRED)
            else:
                due = min(due, entry.expires_at)
        return due

    def _trim(self) -> float:
        """Close connections that are not needed, when they have been idle for some time."""
        while self._idle and self._missing() < 0:
            due = self._idle[0].idle_since + self._idle_time()
            if self._now() < due:
                return due
            self._remove(self._idle[0], Reason.SURPLUS)
        return math.inf

    def _idle_time(self) -> float:
        """How long a connection stays that is not needed."""
        if self.mode is WARM and len(self._entries) == 1:
            return self.options.max_idle_time  # the only one: the next turn may come yet
        return min(self.mode.idle_time, self.options.max_idle_time)

    def _top_up(self) -> float:
        """Dial what is missing, unless background dials have to pause."""
        missing = self._missing()
        if missing <= 0 or not self.environment.may_dial_ahead(self):
            return math.inf
        if self._now() < self.backoff.next_attempt:
            return self.backoff.next_attempt
        if self.is_defunct:
            self.close()
            return math.inf
        for _ in range(missing):
            if self.environment.may_dial_ahead(self):  # each may take the last place
                self._dial(None, STANDBY_TIMEOUT)
        return math.inf

    def _missing(self) -> int:
        """Connections that are wanted and not there, not even as a dial; negative for a surplus."""
        return self._wanted() - self._fresh() - len(self._dials)

    def _wanted(self) -> int:
        """Connections to have, whether idle, leased or being dialled."""
        kept = self._min_size if self.mode.keeps_min_size else 0
        if not self._expected or not self.mode.dials_for_replies:
            return kept
        waiting = [waiter.caller for waiter in self._waiting()]
        # A session speaks one reply at a time: what it has, or waits for, is for the next one, too.
        served = {*waiting, *(entry.holder for entry in self._entries.values())}
        expected = len(self._expected.keys() - served)
        if not expected:
            return kept
        # Those in use and those that others wait for are not for the expected ones.
        return max(kept, self.leased + len(waiting) + expected)

    def _fresh(self) -> int:
        """Connections that are not about to be replaced."""
        now = self._now()
        return len(self._entries) - sum(1 for each in self._idle if each.rotate_at <= now)

    def _arm(self, due: float) -> None:
        """Settle again at that time, if nothing happens before."""
        # A rule may have ended the pool (`_top_up`), and a dial that an eager loop ran inside it
        # may have settled and set the timer already. A timer that is early is left alone: it costs
        # one more `settle`, which sets the next one.
        is_set = self._timer is not None and self._timer.when() <= due
        if self.is_closed or due == math.inf or is_set or self._loop.is_closed():
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.supervisor.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        # Before `settle`: `_arm` would take the timer that runs now for one that is still to come,
        # and set no other. Then time would change nothing any more.
        self._timer = None
        self.settle()

    def _now(self) -> float:
        return self._loop.time()
