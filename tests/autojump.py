"""Event loops on whose clocks a machine that is busy, or slow, takes no longer.

A loop has real sockets, and speaks to a server in the same process. The time in which the process
computes, or is kept from it, hardly counts; otherwise a test that measures would be one of the
machine too.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    from asyncio import Runner
else:
    from backports.asyncio.runner import Runner

T = TypeVar("T")

LONGEST_STEP = 0.0005
"""Seconds that pass at most in one iteration of a loop that does not wait. More than none, so that
a loop that is never idle, since a test polls in it, gets on."""
GRACE = 0.001
"""Seconds of real time that the system has to bring what was sent to a socket of the process."""


class AutojumpLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for a timer, it sets its clock forward.

    Unless an executor works for it, or is shut down. It cannot tell that another process does, or
    another thread: tests that wait for those have the mark `real_time`.
    """

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._clock.awaited.add(future)
        future.add_done_callback(self._clock.awaited.discard)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        shutdown = object()
        self._clock.awaited.add(shutdown)
        await super().shutdown_default_executor(*timeout)
        self._clock.awaited.discard(shutdown)


def real_time_loop() -> AutojumpLoop:
    """A loop that never sets its clock forward, for tests with the mark `real_time`."""
    loop = AutojumpLoop()
    loop._clock.awaited.add("another process or thread")
    return loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run()`, on an `AutojumpLoop`."""
    with Runner(loop_factory=AutojumpLoop) as runner:
        return runner.run(main)


class _Clock(selectors.DefaultSelector):
    """Where the loop waits; so it knows how long.

    Attributes:
        now: passes while the loop waits; while it works, by `LONGEST_STEP` at most.
        awaited: what is at work outside of the loop. It needs real time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self._looked_at = time.monotonic()
        self.awaited: set[object] = set()

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += min(time.monotonic() - self._looked_at, LONGEST_STEP)
        events, waited = self._wait(timeout)
        self.now += waited
        self._looked_at = time.monotonic()
        return events

    def _wait(self, timeout: float | None) -> tuple[list[Any], float]:
        events = super().select(0)
        if events or timeout == 0:
            return events, 0.0
        if timeout is not None and not self.awaited:
            events = super().select(min(timeout, GRACE))
            return events, 0.0 if events else timeout
        began = time.monotonic()
        events = super().select(timeout)
        waited = time.monotonic() - began
        return events, waited if timeout is None else min(waited, timeout)
