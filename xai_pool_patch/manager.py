"""The pools of one event loop: by request, and by the TTS instances that use them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from .options import PoolOptions
from .pool.backoff import Backoff, FailureKind, RateLimit
from .pool.entries import Outcome
from .pool.pool import DialFailedError, Pool, PoolClosedError
from .pool.supervisor import OnFault, Supervisor
from .protocol.connection import CLOSE_COUNTS, Connection
from .protocol.host import Host
from .protocol.lease import Lease
from .protocol.request import Request
from .sessions import Store
from .sessions.refusal import is_refusal
from .sessions.shortage import Shortage
from .sessions.watch import ShortageWatch
from .telemetry.log import LogEvent, flush, log_event, status_of
from .telemetry.pool_metrics import PoolMetrics
from .telemetry.usage import Counters, UsageStats

SHUTDOWN_CALLBACK = "job_shutdown_callback"
"""The name that LiveKit gives the tasks of a job's shutdown callbacks, in every version."""

UNEXPLAINED = 2
"""Turns in a row that ask for something else than the one before, though no option was changed.
Nothing can be ready for such a TTS."""

_numbers = itertools.count(1)
"""The numbers of this process's pools."""


@dataclass(eq=False)
class User:
    """What a manager knows about one TTS instance. Holds no reference to the instance."""

    finalizer: weakref.finalize[..., object] = field(init=False)
    current: Request | None = None
    previous: Request | None = None
    unexplained: int = -1
    """Turns in a row that asked for something else than the one before, though no option was
    changed. -1 until the first turn, and after a change of options: the next turn may differ."""
    usage: UsageStats = field(default_factory=UsageStats)

    @property
    def requests(self) -> set[Request]:
        return {each for each in (self.current, self.previous) if each is not None}


@dataclass(eq=False, repr=False)
class PoolManager:
    """The pools of one event loop. All methods run in that loop's thread.

    It is the `Environment` of its pools, which have their requests as keys.

    Attributes:
        counters: the totals of all pools.
        supervisor: owns the tasks, timers and sockets.
        leases: the leases that the plugin holds.
        users: the TTS instances that use the pools.
        jobs: the jobs that use them, and whether each is ending.
        pools: replaced by a new dict at each change, since other threads read it for statistics.
    """

    options: PoolOptions
    on_fault: OnFault
    shortage_at: Callable[[str], Shortage]
    """What this process knows of refusals by that host."""
    store: Store | None
    """Where it hears of refusals that others met; None if nowhere."""
    make_room: Callable[[], object]
    """Lets go of all idle connections of this process."""

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.supervisor = Supervisor(self.on_fault)
        self.leases: set[Lease] = set()
        self.pools: dict[Request, Pool[Connection]] = {}
        self._loop = asyncio.get_running_loop()
        self._ending: list[Pool[Connection]] = []
        self.users: weakref.WeakKeyDictionary[object, User] = weakref.WeakKeyDictionary()
        self.jobs: weakref.WeakKeyDictionary[object, bool] = weakref.WeakKeyDictionary()
        self._hosts = defaultdict[str, Host](Host)
        self._rate_limits = defaultdict[str, RateLimit](RateLimit)
        self._watches: dict[str, ShortageWatch] = {}
        self._closing_store: asyncio.Task[None] | None = None
        self._jitter = random.Random()

    # TTS instances

    def register(
        self, tts: object, request: Request, *, is_turn: bool = False, keep: bool = True
    ) -> Pool[Connection]:
        """The pool of a request, for this TTS.

        Args:
            is_turn: the TTS is about to speak.
            keep: keep the pool warm until the TTS registers for another request or is closed.
        """
        user = self.users.get(tts) or self._join(tts)
        if is_turn:
            user.unexplained = 0 if user.current in (request, None) else user.unexplained + 1
        pool = self.pools.get(request)
        if pool is None or pool.is_closed:
            pool = self._make(request)
        if keep and user.current != request:
            older, user.previous, user.current = user.previous, user.current, request
            for caller, until in self._resize(user.previous).items():
                pool.expect(caller, until)
            self._resize(request)
            self._end_unused({older})
        elif not keep and request not in user.requests:
            older, user.previous = user.previous, request
            self._end_unused({older})
        return pool

    def _make(self, request: Request) -> Pool[Connection]:
        backoff = Backoff(self._rate_limits[request.host], self._jitter)
        metrics = PoolMetrics(next(_numbers), into=self.counters)
        max_age = min(self.options.max_age, request.max_age)
        pool = Pool[Connection](
            request, self, self.options, self.supervisor, backoff, metrics, max_age, self._jitter
        )
        watch = self._watch_of(request.host) if self.options.warm == "auto" else None
        pool.set_lean(watch.is_lean if watch is not None else self.options.warm == "reply")
        self.pools = {**self.pools, request: pool}
        self._resize(request)
        if watch is not None:
            watch.begin()
        return pool

    def options_changed(self, tts: object) -> None:
        """The next request of this TTS may differ from the last."""
        if tts in self.users:
            self.users[tts].unexplained = -1

    def unregister(self, tts: object) -> list[Pool[Connection]]:
        """Forget a TTS that is not used any more. Ends the pools that no other TTS uses, and
        returns them."""
        user = self.users.pop(tts, None)
        return self._depart(user) if user is not None else []

    def _join(self, tts: object) -> User:
        user = self.users[tts] = User()
        user.finalizer = weakref.finalize(tts, self._collected, user)
        user.finalizer.atexit = False
        return user

    def _collected(self, user: User) -> None:
        # The garbage collector may run in any thread, and in the middle of a change to the pools.
        # Departing at once, it would change them from there.
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its pools with it
            self._loop.call_soon_threadsafe(self.supervisor.run, lambda: self._depart(user))

    def _depart(self, user: User) -> list[Pool[Connection]]:
        user.finalizer.detach()
        requests = user.requests
        user.current = user.previous = None
        for request in requests:
            self._resize(request)
        ended = self._end_unused(requests)
        log_event(LogEvent.TTS_CLOSED, **user.usage.as_fields())
        return ended

    def _resize(self, request: Request | None) -> dict[object, float]:
        """Returns the callers that were expected at a pool that no TTS speaks with any more."""
        if request not in self.pools:
            return {}
        if not any(user.current == request for user in self.users.values()):
            return self.pools[request].retire()
        self.pools[request].resize(self.options.min_size)
        return {}

    # Jobs

    async def end_with(self, job: object) -> None:
        """Close everything before the job closes its HTTP session.

        Other shutdown callbacks run at the same time, and may still speak: see `is_over`. What is
        in use when they are done belongs to a task that LiveKit does not wait for.
        """
        self.jobs[job] = True
        pools = [*self.pools.values(), *self._ending]
        await self.aclose()
        if await _other_callbacks_are_done():
            for lease in list(self.leases):
                lease.end(Outcome.FAILED)
            await asyncio.gather(*(pool.aclose() for pool in pools))

    def is_over(self, job: object | None) -> bool:
        """Whether the job is ending. A connection opened for it must be closed after its use."""
        return job is not None and self.jobs.get(job, False)

    # Ends

    def close(self) -> None:
        """End all pools."""
        self._end(set(self.pools))
        for user in list(self.users.values()):
            self._depart(user)
        self.users.clear()

    async def aclose(self) -> None:
        """End all pools, and wait until they and those that ended before have closed everything."""
        self.close()
        ending, self._ending = self._ending, []
        await asyncio.gather(*(pool.aclose() for pool in ending))
        await self.wait_closed()
        flush()

    async def wait_closed(self) -> None:
        """Wait until nothing is open that the pools needed which have ended."""
        await self.supervisor.wait_stopped()
        if self._closing_store is not None:
            await asyncio.wait([self._closing_store])

    def abandon(self) -> None:
        """After a fault, end all tasks and close all sockets. Utterances in progress fail."""
        self.supervisor.stop()
        for pool in [*self.pools.values(), *self._ending]:
            pool.abandon()
        self.pools = {}
        self._watches.clear()
        self.users.clear()
        for lease in list(self.leases):
            lease.mark_closed()

    def _end_unused(self, requests: Set[Request | None]) -> list[Pool[Connection]]:
        used = {request for user in self.users.values() for request in user.requests}
        return self._end(requests - used)

    def _end(self, requests: Set[Request | None]) -> list[Pool[Connection]]:
        ended = [pool for request, pool in self.pools.items() if request in requests]
        self.pools = {key: pool for key, pool in self.pools.items() if key not in requests}
        for pool in ended:
            pool.close()
        self._end_watches()
        self._ending = [pool for pool in (*self._ending, *ended) if not pool.is_empty]
        return ended

    def _end_watches(self) -> None:
        """Look no more for refusals by hosts that no pool dials any more."""
        ended = self._watches.keys() - {request.host for request in self.pools}
        for host in ended:
            self._watches.pop(host).end()
        is_last = bool(ended) and not self._watches and not self._loop.is_closed()
        # A task for nothing would never run if this is the loop's last step, and Python would warn.
        if is_last and self.store is not None and self.store.keeps_open:
            close = self.store.aclose()
            self._closing_store = self.supervisor.spawn(close, "xai_pool_patch.store")

    # Sessions

    def let_go(self) -> list[asyncio.Task[None]]:
        """Close all idle connections; returns the tasks that close any of them."""
        closing = [task for pool in list(self.pools.values()) for task in pool.let_go()]
        if closing:
            self.supervisor.call_at(self._loop.time() + CLOSE_COUNTS, self._abort_closing)
        return closing

    def _abort_closing(self) -> None:
        for pool in [*self.pools.values(), *self._ending]:
            pool.abort_closing()

    def _watch_of(self, host: str) -> ShortageWatch:
        if host not in self._watches:
            self._watches[host] = ShortageWatch(
                self.shortage_at(host),
                self.store,
                supervisor=self.supervisor,
                on_change=lambda: self._set_lean(host),
                wants_to_know=lambda: any(pool.idle for pool in self._pools_at(host)),
            )
        return self._watches[host]

    def _set_lean(self, host: str) -> None:
        for pool in self._pools_at(host):
            pool.set_lean(self._watch_of(host).is_lean)

    def _pools_at(self, host: str) -> list[Pool[Connection]]:
        return [pool for request, pool in self.pools.items() if request.host == host]

    # What the pools ask, and tell

    def dial_failed(self, pool: Pool[Connection], failure: DialFailedError) -> None:
        if self.options.warm == "auto" and not self.is_defunct(pool):
            watch = self._watch_of(pool.key.host)
            if failure.kind is FailureKind.REFUSED:
                watch.refused(status_of(failure.error))
            elif failure.kind is FailureKind.TRANSIENT:
                watch.failed()

    def is_defunct(self, pool: Pool[Connection]) -> bool:
        return bool(pool.key.session.closed)

    def may_dial_ahead(self, pool: Pool[Connection]) -> bool:
        request = pool.key
        if self._places(request) <= 0:
            return False
        watch = self._watches.get(request.host)
        is_short = watch is not None and watch.shortage.is_on
        return not (is_short and any(pool.closing for pool in self._pools_at(request.host)))

    def _places(self, request: Request) -> float:
        """How many the HTTP session's connector has left for that host, as far as pools know."""
        session = request.session
        pools = [pool for pool in self._pools_at(request.host) if pool.key.session is session]
        taken = sum(len(pool.connections) + pool.connecting + pool.closing for pool in pools)
        connector = session.connector
        limits = (connector.limit, connector.limit_per_host) if connector is not None else ()
        return min([limit for limit in limits if limit > 0], default=math.inf) - taken

    def place_is_free(self) -> None:
        """What was held back may be dialled now."""
        for pool in list(self.pools.values()):
            pool.settle()

    async def connect(self, pool: Pool[Connection], timeout: float) -> Connection | DialFailedError:
        request: Request = pool.key
        if self._places(request) < 0:
            self.make_room()  # aiohttp would wait until one of the others is closed
        ws = await request.connect(timeout)
        if self.supervisor.is_stopped and not isinstance(ws, Exception):
            # Before Python 3.12 wait_for() may swallow the cancellation by `stop`, if it comes
            # together with the result. Nothing else would close this socket.
            await ws.close()
            ws = PoolClosedError("the pool failed during the dial")
        if isinstance(ws, Exception):
            return DialFailedError(ws, failure_kind_of(ws))
        self.supervisor.sockets.add(ws)
        host = self._hosts[request.host]
        is_shared = request.owner is None
        on_refused = functools.partial(self._refused_in_words, pool)
        return Connection(ws, self.supervisor, host, self.options.heartbeat, is_shared, on_refused)

    def _refused_in_words(self, pool: Pool[Connection]) -> None:
        pool.metrics.rate_limited()
        if self.options.warm == "auto":
            self._watch_of(pool.key.host).refused(None)


async def _other_callbacks_are_done() -> bool:
    """Wait for the other shutdown callbacks of the job; False if it is not known which they are."""
    own = asyncio.current_task()
    if own is None or own.get_name() != SHUTDOWN_CALLBACK:
        return False
    others = [task for task in asyncio.all_tasks() if task.get_name() == SHUTDOWN_CALLBACK]
    others.remove(own)
    if others:
        await asyncio.wait(others)
    return True


def failure_kind_of(error: Exception) -> FailureKind:
    """What a failed handshake says about the next one."""
    if is_refusal(error):
        return FailureKind.REFUSED
    is_permanent = status_of(error) in (400, 401, 404)
    return FailureKind.PERMANENT if is_permanent else FailureKind.TRANSIENT
