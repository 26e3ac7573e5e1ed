"""Which pools exist, by event loop and key, and which TTS instances use them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import threading
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from .options import PoolOptions
from .pool.backoff import Backoff, FailureKind, RateLimit
from .pool.pool import Pool, PoolClosedError
from .pool.supervisor import OnFault, Supervisor
from .protocol.connection import Connection, Heartbeat
from .protocol.first_audio import FirstAudio
from .protocol.lease import Lease
from .sessions import Store
from .sessions.shortage import Shortage
from .sessions.watch import ShortageWatch
from .telemetry import instruments
from .telemetry.log import LogEvent, log_event, status_of
from .telemetry.pool_metrics import PoolMetrics
from .telemetry.usage import Counters, PoolStats, Stats, UsageStats, counts_of, stats_of, sum_of

HOST = "api.x.ai"

STANDBY_TIMEOUT = 10.0
"""Seconds a background dial may take: what LiveKit allows a caller's (`APIConnectOptions`)."""


@dataclass(frozen=True)
class PoolKey:
    """What two connections must have in common to be interchangeable."""

    api_key: str = field(repr=False)
    session: aiohttp.ClientSession = field(repr=False)
    options: tuple[tuple[str, object], ...] = field(repr=False)
    """Not in the repr: a voice may be a customer's own."""


Connect = Callable[[float], Awaitable[aiohttp.ClientWebSocketResponse]]
"""Dials for one key within the given seconds. Holds no reference to the TTS that asked."""


_numbers = itertools.count(1)
"""The numbers of this process's pools."""


@dataclass(eq=False)
class _User:
    """What a manager knows about one TTS instance. Holds no reference to the instance."""

    finalizer: weakref.finalize[..., object] | None = None
    current: PoolKey | None = None
    visited: dict[PoolKey, Connect] = field(default_factory=dict)
    """The keys that the TTS has used, each with the connect that dials as this TTS would."""
    usage: UsageStats = field(default_factory=UsageStats)


class PoolManager:
    """The pools of one event loop. All methods run in that loop's thread.

    Args:
        options: see `PoolOptions`.
        on_fault: takes a fault of the pools.
        shortage: what this process knows of refusals.
        store: where it hears of refusals that others met; None if nowhere.

    Attributes:
        counters: the totals of all pools.
        heartbeat: shared by all pools, since all dial the same server.
        first_audio: shared for the same reason.
        supervisor: owns the tasks, timers and sockets.
        leases: the leases that the plugin holds.
        pools: replaced by a new dict at each change, since other threads read it for statistics.
    """

    def __init__(
        self,
        options: PoolOptions,
        on_fault: OnFault,
        shortage: Shortage,
        store: Store | None,
    ) -> None:
        self.counters = Counters()
        self.heartbeat = Heartbeat(options.heartbeat)
        self.first_audio = FirstAudio(options.first_audio_timeout)
        self.supervisor = Supervisor(on_fault, options.close_timeout)
        self.leases: set[Lease] = set()
        self._over: weakref.WeakSet[object] = weakref.WeakSet()
        self.pools: dict[PoolKey, Pool[Connection]] = {}
        self._ending: list[Pool[Connection]] = []
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._users: weakref.WeakKeyDictionary[object, _User] = weakref.WeakKeyDictionary()
        self._jobs: weakref.WeakSet[object] = weakref.WeakSet()
        self._rate_limits: dict[str, RateLimit] = {}
        self._store = store
        self._closing_store: asyncio.Task[None] | None = None
        self._jitter = random.Random()
        self._watch = ShortageWatch(
            shortage,
            store,
            supervisor=self.supervisor,
            on_change=self._set_lean,
            wants_to_know=lambda: any(pool.idle for pool in self.pools.values()),
            uniform=self._jitter.uniform,
        )

    def knows(self, tts: object) -> bool:
        return tts in self._users

    def register(
        self, tts: object, key: PoolKey, connector: Callable[[], Connect]
    ) -> Pool[Connection]:
        """The pool of a key, kept warm until this TTS registers for another key or is closed.

        Args:
            connector: makes the connect that the pool dials with while this TTS uses the key.
        """
        pool = self.pool_for(tts, key, connector)
        user = self._users[tts]
        if user.current != key:
            previous, user.current = user.current, key
            expected = self._resize(previous)
            self._resize(key)
            for caller, until in expected.items():
                pool.expect(caller, until)
            self._forget_older(user, previous)
        return pool

    def pool_for(
        self, tts: object, key: PoolKey, connector: Callable[[], Connect]
    ) -> Pool[Connection]:
        """The pool of a key, for one utterance whose options are not the TTS's current ones."""
        user = self._users.get(tts) or self._join(tts)
        if key not in user.visited:
            user.visited[key] = connector()
        pool = self.pools.get(key)
        if pool is None or pool.is_closed:
            pool = self._make(key, user.visited[key])
            self.pools = {**self.pools, key: pool}
            self._resize(key)
            if self._options.warm == "auto":
                self._watch.begin()
        return pool

    def make_room(self, api_key: str) -> list[asyncio.Task[None]]:
        """Close all idle connections of an API key; returns the tasks that close any of them."""
        pools = self._pools_of(api_key)
        return [task for pool in pools for task in pool.close_idle()]

    def is_first_use_by(self, job: object) -> bool:
        is_first = job not in self._jobs
        self._jobs.add(job)
        return is_first

    async def end_with(self, job: object) -> None:
        """Close everything before the job closes its HTTP session.

        Other shutdown callbacks run at the same time, and may still speak: see `is_over`.
        """
        self._over.add(job)
        await self.aclose()

    def is_over(self, job: object | None) -> bool:
        """Whether the job is ending. A connection opened for it must be closed after its use."""
        return job is not None and job in self._over

    def usage(self, tts: object) -> UsageStats:
        """The usage of a TTS that these pools know."""
        return self._users[tts].usage

    def unregister(self, tts: object) -> list[Pool[Connection]]:
        """Forget a TTS that is closed. Ends the pools that no other TTS uses, and returns them."""
        user = self._users.pop(tts, None)
        return self._depart(user) if user is not None else []

    def close(self) -> None:
        """End all pools."""
        self._end(set(self.pools))
        for user in list(self._users.values()):
            self._depart(user)
        self._users.clear()

    async def aclose(self) -> None:
        """End all pools, and wait until they and those that ended before have closed everything."""
        self.close()
        ending, self._ending = self._ending, []
        await asyncio.gather(*(pool.aclose() for pool in ending))
        await self.closed()

    async def closed(self) -> None:
        """Wait until nothing is open that the pools needed which have ended."""
        await self.supervisor.stopped()
        if self._closing_store is not None:
            await asyncio.wait([self._closing_store])

    def abandon(self) -> None:
        """After a fault, end all tasks and close all sockets, except those that the plugin hears.

        The leases go on with those sockets, without the pools.
        """
        in_use = {ws for lease in list(self.leases) if (ws := lease.step_aside()) is not None}
        self.supervisor.stop(in_use)
        for pool in [*self.pools.values(), *self._ending]:
            pool.abandon()
        self.pools = {}
        self._users.clear()

    def _join(self, tts: object) -> _User:
        user = self._users[tts] = _User()
        user.finalizer = weakref.finalize(tts, self._collected, user)
        user.finalizer.atexit = False
        return user

    def _collected(self, user: _User) -> None:
        # The garbage collector may run in any thread, and in the middle of a change to the pools.
        # Departing at once, it would change them from there.
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its pools with it
            self._loop.call_soon_threadsafe(self.supervisor.run, lambda: self._depart(user))

    def _depart(self, user: _User) -> list[Pool[Connection]]:
        if user.finalizer is not None:
            user.finalizer.detach()
        log_event(LogEvent.TTS_CLOSED, **user.usage.as_fields())
        visited, user.visited, user.current = set(user.visited), {}, None
        still_visited = {key for other in self._users.values() for key in other.visited}
        for key in visited & still_visited:
            self._resize(key)
        return self._end(visited - still_visited)

    def _end(self, keys: set[PoolKey]) -> list[Pool[Connection]]:
        ended = [self.pools[key] for key in keys & self.pools.keys()]
        self.pools = {key: pool for key, pool in self.pools.items() if key not in keys}
        for pool in ended:
            pool.close()
        self._end_watch()
        self._ending = [pool for pool in (*self._ending, *ended) if not pool.is_empty]
        return ended

    def _end_watch(self) -> None:
        """Look no more for refusals of others if there are no pools any more."""
        if not self.pools:
            self._watch.end()
            if self._store is not None and not self._loop.is_closed():
                close = self._store.aclose()
                self._closing_store = self.supervisor.spawn(close, "xai_pool_patch.store")

    def _forget_older(self, user: _User, previous: PoolKey | None) -> None:
        """Forget all keys of a TTS but its current and its previous one.

        An application may change the options of one TTS any number of times.
        """
        older = user.visited.keys() - {user.current, previous}
        for key in older:
            del user.visited[key]
        self._end(older - {key for other in self._users.values() for key in other.visited})

    def _resize(self, key: PoolKey | None) -> dict[object, float]:
        """Returns the callers that were expected at a key that nobody speaks with any more."""
        if key not in self.pools:
            return {}
        if not any(user.current == key for user in self._users.values()):
            return self.pools[key].leave()
        self.pools[key].resize(self._options.min_size)
        return {}

    def _pools_of(self, api_key: str) -> list[Pool[Connection]]:
        return [pool for key, pool in self.pools.items() if key.api_key == api_key]

    def _set_lean(self) -> None:
        for pool in self.pools.values():
            pool.set_lean(self._is_lean)

    @property
    def _is_lean(self) -> bool:
        if self._options.warm == "auto":
            return self._watch.is_lean
        return self._options.warm == "reply"

    def _make(self, key: PoolKey, dial: Connect) -> Pool[Connection]:
        def rate_limited() -> None:
            pool.metrics.rate_limited()
            if self._options.warm == "auto":
                self._watch.refused(429)

        async def connect(timeout: float) -> Connection:
            return self._connection(await self._dial(key, dial, timeout), rate_limited)

        rate_limit = self._rate_limits.setdefault(key.api_key, RateLimit())
        pool = Pool(
            connect,
            self._options,
            supervisor=self.supervisor,
            standby_timeout=STANDBY_TIMEOUT,
            backoff=Backoff(rate_limit, self._jitter),
            metrics=PoolMetrics(next(_numbers), into=self.counters),
            failure_kind_of=failure_kind_of,
            on_rate_limited=rate_limited,
            is_defunct=lambda: key.session.closed,
            jitter=self._jitter,
        )
        pool.set_lean(self._is_lean)
        return pool

    async def _dial(
        self, key: PoolKey, dial: Connect, timeout: float
    ) -> aiohttp.ClientWebSocketResponse:
        # The TTS that this pool was made for may be closed, and its connect with it. So ask one
        # that still uses the key.
        dials = (user.visited.get(key) for user in self._users.values())
        ws = await next(filter(None, dials), dial)(timeout)
        if self.supervisor.is_stopped:
            # Before Python 3.12 wait_for() may swallow the cancellation by `stop`, if it comes
            # together with the result. Nobody would close this socket.
            await ws.close()
            raise PoolClosedError("the pool failed during the dial")
        return ws

    def _connection(
        self, ws: aiohttp.ClientWebSocketResponse, on_rate_limited: Callable[[], None]
    ) -> Connection:
        self.supervisor.sockets.add(ws)
        try:
            return Connection(
                ws,
                supervisor=self.supervisor,
                heartbeat=self.heartbeat,
                close_timeout=self._options.close_timeout,
                on_rate_limited=on_rate_limited,
            )
        except Exception as fault:
            self.supervisor.on_fault("connecting", fault)
            raise


@dataclass(frozen=True)
class _Loops:
    """All event loops with pools. Replaced as a whole at each change, so readers need no lock."""

    pools: dict[asyncio.AbstractEventLoop, PoolManager]
    ended: Counters
    """The totals of loops that are closed."""

    def with_loop(self, loop: asyncio.AbstractEventLoop, pools: PoolManager) -> _Loops:
        closed = {each for each in self.pools if each.is_closed()}
        ended = sum_of(self.ended, *(self.pools[each].counters for each in closed))
        others = {each: pools for each, pools in self.pools.items() if each not in closed}
        return _Loops({**others, loop: pools}, ended)


class Registry:
    """The pools of one installation, in every event loop of this process.

    Args:
        options: see `PoolOptions`.
        store: where to exchange refusals with others; None if nowhere.

    Readers take no lock. A signal handler may ask for statistics while its own thread is in the
    middle of a change, and would wait for itself.

    Attributes:
        has_failed: a fault has closed the pools; the plugin connects by itself.
    """

    def __init__(self, options: PoolOptions, store: Store | None) -> None:
        self.options = options
        self.has_failed = False
        self._is_closed = False
        self._loops = _Loops({}, Counters())
        self._shortage = Shortage(HOST)
        self._store = store
        self._lock = threading.Lock()  # worker threads have a loop each
        instruments.observe(self)

    def here(self) -> PoolManager:
        """The pools of the running loop, made on the first call.

        Raises:
            RuntimeError: no loop is running.
        """
        loop = asyncio.get_running_loop()
        pools = self._loops.pools.get(loop)
        if pools is None:
            pools = PoolManager(self.options, self.fail, self._shortage, self._store)
            with self._lock:
                self._loops = self._loops.with_loop(loop, pools)
            if self._is_closed:
                # close() ran in another thread before this loop was added, so it has not closed
                # these pools.
                loop.call_soon(pools.supervisor.run, pools.close)
        return pools

    def fail(self, operation: str, fault: Exception) -> None:
        """After a fault of the pools, close them all. The plugin then connects by itself."""
        level = logging.DEBUG if self.has_failed else logging.ERROR
        self.has_failed = True
        log_event(LogEvent.FAULT, level=level, operation=operation, error=fault)
        for loop, pools in self._loops.pools.items():
            if is_running(loop):
                pools.abandon()
            else:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(pools.abandon)

    def close(self) -> None:
        """End every pool, in its own loop. Leased connections are closed when they come back."""
        self._is_closed = True
        for loop, pools in self._loops.pools.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(pools.supervisor.run, pools.close)

    def stats(self) -> Stats:
        loops = self._loops
        counters = sum_of(loops.ended, *(pools.counters for pools in loops.pools.values()))
        return stats_of(self._pools(), counters)

    def pool_stats(self) -> list[PoolStats]:
        return [
            {**counts_of([pool], pool.metrics.counters), "pool": pool.metrics.pool}
            for pool in self._pools()
        ]

    def _pools(self) -> list[Pool[Connection]]:
        return [pool for loop in self._loops.pools.values() for pool in loop.pools.values()]


def is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller runs in that loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def failure_kind_of(error: Exception) -> FailureKind:
    """What a failed handshake says about the next one."""
    status = status_of(error)
    if status == 429:
        return FailureKind.RATE_LIMITED
    if status in (400, 401, 403, 404):
        return FailureKind.PERMANENT
    return FailureKind.TRANSIENT
