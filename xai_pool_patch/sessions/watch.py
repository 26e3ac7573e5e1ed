"""Whether the sessions of one API key are scarce, as the pools of one event loop see it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from ..mark import MarkStore
from ..pool.supervisor import Supervisor
from ..telemetry.log import LogEvent, log_event
from .limit import SessionLimit, SharedMarks

SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.8, 1.4
"""Seconds between two looks. Twice the longest is less than the 2.1 s after which LiveKit has
retried a refused utterance twice: by then whoever holds an idle connection has let go of it."""

CLOSE_TIMEOUT = 1.0
"""Seconds that a store may take to close what it has open."""


class Keeper(Protocol):
    """What the watch needs of a pool."""

    @property
    def idle(self) -> int: ...
    def set_lean(self, is_lean: bool) -> None: ...


class SessionWatch:
    """Makes pools lean while sessions are scarce, and lets others know of a refusal.

    Args:
        digest: of the API key.
        limit: what this process knows; its other event loops have watches of their own.
        stores: where others leave their marks.
        supervisor: owns the tasks and timers.
        pools: the pools of that API key in this event loop, at the moment.
        jitter: spreads the looks of many processes.
    """

    def __init__(
        self,
        digest: str,
        limit: SessionLimit,
        stores: Sequence[MarkStore],
        *,
        supervisor: Supervisor,
        pools: Callable[[], Sequence[Keeper]],
        jitter: random.Random,
    ) -> None:
        self.is_scarce = False
        self._limit = limit
        self._marks = SharedMarks(digest, limit, stores, jitter)
        self._supervisor = supervisor
        self._pools = pools
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_lean(self) -> bool:
        """Pools keep nothing between replies: sessions are scarce, or nobody could say so."""
        return self.is_scarce or self._marks.are_unreadable

    def begin(self) -> None:
        """Look now, and from now on until `end`."""
        if self._timer is None:
            self._tick()

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._looking is not None:
            self._looking.cancel()

    def refused(self) -> None:
        """A dial was refused for the limit: let go of what is idle, and let others know."""
        mark = self._limit.refused()
        self._apply()
        if mark is not None:
            publish = self._marks.publish(mark)
            self._supervisor.spawn(publish, name="xai_pool_patch.publish_mark")

    def _tick(self) -> None:
        pools = self._pools()
        self._apply()
        # Only who holds an idle connection, or is about to, needs to know of others' refusals.
        if (self.is_lean or any(pool.idle for pool in pools)) and not self._is_looking:
            self._looking = self._supervisor.spawn(self._look(), name="xai_pool_patch.look")
        pause = self._jitter.uniform(SHORTEST_INTERVAL, LONGEST_INTERVAL)
        self._timer = self._supervisor.call_at(self._loop.time() + pause, self._tick)

    @property
    def _is_looking(self) -> bool:
        return self._looking is not None and not self._looking.done()

    async def _look(self) -> None:
        await self._marks.look()
        self._apply()

    def _apply(self) -> None:
        is_scarce = self._limit.is_reached
        if is_scarce != self.is_scarce:
            self.is_scarce = is_scarce
            if is_scarce:
                seconds = round(self._limit.seconds_left, 1)
                log_event(LogEvent.SESSIONS_SCARCE, reason=self._limit.source, for_s=seconds)
            else:
                log_event(LogEvent.SESSIONS_SUFFICE)
        for pool in self._pools():
            pool.set_lean(self.is_lean)


async def close_stores(stores: Sequence[MarkStore]) -> None:
    """Close what the stores have open in this event loop. Takes a second at most."""
    await asyncio.gather(*map(_close, stores))


async def _close(store: MarkStore) -> None:
    try:
        await asyncio.wait_for(store.aclose(), CLOSE_TIMEOUT)
    except Exception as error:  # nothing depends on it, and it may be an operator's own
        log_event(LogEvent.MARK_STORE_FAILED, store=store.name, operation="close", error=error)
