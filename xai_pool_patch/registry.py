"""The pools of one installation in every event loop, and what a fault of theirs means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .manager import PoolManager
from .options import PoolOptions
from .pool.pool import Pool
from .protocol.connection import Connection
from .sessions import Store
from .sessions.shortage import Shortage
from .telemetry import announce, metrics
from .telemetry.log import LogEvent, log_event
from .telemetry.pool_metrics import failed_open
from .telemetry.usage import Counters, PoolStats, Stats, counts_of, stats_of, sum_of

T = TypeVar("T")


@dataclass(frozen=True)
class _Loops:
    """All event loops with pools. Replaced as a whole at each change, so readers need no lock."""

    managers: dict[asyncio.AbstractEventLoop, PoolManager]
    ended: Counters
    """The totals of loops that are closed."""

    def with_loop(self, loop: asyncio.AbstractEventLoop, manager: PoolManager) -> _Loops:
        closed = {each for each in self.managers if each.is_closed()}
        ended = sum_of(self.ended, *(self.managers[each].counters for each in closed))
        others = {each: known for each, known in self.managers.items() if each not in closed}
        return _Loops({**others, loop: manager}, ended)


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
        self._shortages: dict[str, Shortage] = {}
        self._store = store
        self._lock = threading.Lock()  # worker threads have a loop each

    def here(self) -> PoolManager:
        """The pools of the running loop, made on the first call.

        Raises:
            RuntimeError: no loop is running.
        """
        loop = asyncio.get_running_loop()
        manager = self._loops.managers.get(loop)
        if manager is None:
            manager = PoolManager(
                self.options, self.fail, self._shortage_at, self._store, self.make_room
            )
            metrics.share()
            announce.retell()
            with self._lock:
                self._loops = self._loops.with_loop(loop, manager)
            if self._is_closed:
                # close() ran in another thread before this loop was added, so it has not closed
                # these pools.
                loop.call_soon(manager.supervisor.run, manager.close)
        return manager

    @property
    def is_open(self) -> bool:
        """The pools serve turns: no fault has closed them, and they are not uninstalled."""
        return not (self.has_failed or self._is_closed)

    def _shortage_at(self, host: str) -> Shortage:
        return self._shortages.setdefault(host, Shortage(host))

    def make_room(self) -> list[asyncio.Future[Any]]:
        """Close the idle connections of every loop; returns what ends when one is closed."""
        closing: list[asyncio.Future[Any]] = []
        for loop, manager in self._loops.managers.items():
            if loop is running_loop():
                closing += manager.let_go()
            elif any(pool.idle or pool.closing for pool in manager.pools.values()):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    letting_go = asyncio.run_coroutine_threadsafe(_let_go(manager), loop)
                    closing.append(asyncio.wrap_future(letting_go))
        return closing

    # Faults: this is the only place that decides what one means.

    def attempt(self, operation: str, do: Callable[..., T], *args: Any) -> T | None:
        """Call a function of ours. Its exception is a fault, and does not reach the agent."""
        if self.has_failed:
            return None
        try:
            return do(*args)
        except Exception as fault:
            self.fail(operation, fault)
            return None

    def fail(self, operation: str, fault: Exception) -> None:
        """After a fault of the pools, close them all. The plugin then connects by itself."""
        level = logging.DEBUG if self.has_failed else logging.ERROR
        self.has_failed = True
        # First: what follows may be what failed, and would not be heard of.
        failed_open()
        log_event(LogEvent.FAULT, level=level, operation=operation, error=fault)
        for loop, manager in self._loops.managers.items():
            if loop is running_loop():
                manager.abandon()
            else:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(manager.abandon)

    def close(self) -> None:
        """End every pool, in its own loop. Leased connections are closed when they come back."""
        self._is_closed = True
        for loop, manager in self._loops.managers.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(manager.supervisor.run, manager.close)

    # Statistics

    def stats(self) -> Stats:
        loops = self._loops
        counters = sum_of(loops.ended, *(each.counters for each in loops.managers.values()))
        return stats_of([pool.counts for pool in self._pools()], counters)

    def pool_stats(self) -> list[PoolStats]:
        return [
            {**counts_of([pool.counts], pool.metrics.counters), "pool": pool.metrics.pool}
            for pool in self._pools()
        ]

    def _pools(self) -> list[Pool[Connection]]:
        managers = self._loops.managers.values()
        return [pool for manager in managers for pool in manager.pools.values()]


async def _let_go(manager: PoolManager) -> None:
    closing = manager.let_go()
    if closing:
        await asyncio.wait(closing, return_when=asyncio.FIRST_COMPLETED)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that the caller runs in; None outside of any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
