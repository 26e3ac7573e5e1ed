"""The shortage at one host, as the pools of one event loop see it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..pool.supervisor import Supervisor, within
from ..telemetry.log import LogEvent, log_event
from .shortage import Shortage
from .store import Store

SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.8, 1.4
"""Seconds between two looks. Twice the longest is less than the 2.1 s after which LiveKit has
retried a refused utterance twice: by then every process has let go of its idle connections."""

TIMEOUT = 1.0
"""Seconds that one look may take."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds after a failed look until the next, doubling from the first to the longest."""


@dataclass(eq=False, repr=False)
class ShortageWatch:
    """Says when pools have to be lean, and exchanges refusals with other processes.

    Args:
        shortage: what this process knows; its other event loops have watches of their own.
        store: None if there is none that can be used: then the watch is always lean.
        supervisor: owns the tasks and timers.
        on_change: called when `is_lean` or the shortage may have changed.
        wants_to_know: this process holds an idle connection, which others may need.
    """

    shortage: Shortage
    store: Store | None
    supervisor: Supervisor
    on_change: Callable[[], None]
    wants_to_know: Callable[[], bool]

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.Task[None] | None = None
        self._is_heard: bool | None = None if self.store is not None else False
        """None until the first look has ended, which takes a second at most."""
        self._doing = ""
        self._failures = 0
        self._next_look = -math.inf
        self._was_on = False
        self._was_lean = self.is_lean

    @property
    def is_lean(self) -> bool:
        """Pools keep nothing between replies: sessions are scarce, or no refusal is heard."""
        return self.shortage.is_on or self._is_heard is False

    def begin(self) -> None:
        """Look now, and from now on until `end`."""
        if self._timer is None:
            self._tick()

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._look is not None:
            self._look.cancel()

    def refused(self, status: int | None) -> None:
        """A session was refused to this process: tell the pools, and others.

        Args:
            status: see `Shortage.refused`.
        """
        if self.shortage.refused(status):
            self._look_now()
        self._tell()

    def failed(self) -> None:
        """A handshake failed on its way: see `Shortage.failed`."""
        self.shortage.failed()
        self._tell()

    def _tick(self) -> None:
        self._tell()
        if not self._is_heard or self.shortage.is_on or self.wants_to_know():
            self._look_now()
        pause = self.shortage.uniform(SHORTEST_INTERVAL, LONGEST_INTERVAL)
        self._timer = self.supervisor.call_at(self._loop.time() + pause, self._tick)

    def _look_now(self) -> None:
        is_looking = self._look is not None and not self._look.done()
        if self.store is not None and not is_looking and self._loop.time() >= self._next_look:
            look = self._try_to_exchange(self.store)
            self._look = self.supervisor.spawn(look, name="xai_pool_patch.look")

    async def _try_to_exchange(self, store: Store) -> None:
        try:
            await within(TIMEOUT, self._exchange(store), "xai_pool_patch.exchange")
        except Exception as error:
            self._failed(store, error)
        else:
            if self._failures > 0:
                log_event(LogEvent.STORE_RESTORED, store=store.name)
            self._failures, self._is_heard = 0, True
        self._tell()

    async def _exchange(self, store: Store) -> None:
        self._doing = "read"
        found = await store.read(self.shortage.host)
        self.shortage.learn(found)
        self._doing = "write"
        if not self._is_heard:
            # One that can only be read would show that to the first refusal, which no other
            # process then hears.
            await store.probe(self.shortage.host)
        news = self.shortage.news_for(found)
        if news is not None:
            await store.write(self.shortage.host, news)

    def _failed(self, store: Store, error: Exception) -> None:
        if self._failures == 0:
            log_event(LogEvent.STORE_FAILED, store=store.name, operation=self._doing, error=error)
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._failures, 10))
        self._next_look = self._loop.time() + delay * self.shortage.uniform(0.8, 1.0)
        self._failures += 1
        self._is_heard = False

    def _tell(self) -> None:
        """Log the shortage's beginning and end, and tell the pools what has changed."""
        is_on, is_lean = self.shortage.is_on, self.is_lean
        if (is_on, is_lean) == (self._was_on, self._was_lean):
            return
        if is_on and not self._was_on:
            reason, seconds = self.shortage.reason, round(self.shortage.seconds_left, 1)
            log_event(LogEvent.SESSIONS_SCARCE, reason=reason, for_s=seconds)
        elif self._was_on and not is_on:
            log_event(LogEvent.SESSIONS_SUFFICE)
        self._was_on, self._was_lean = is_on, is_lean
        self.on_change()
