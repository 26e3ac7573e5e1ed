"""One event loop for all tests, whose clock is set forward instead of waiting for a timer.

Time passes when the loop would wait, by `TICK` whenever somebody reads the clock, and, where there
are sockets, by `PASS` whenever the loop looks at them. How long the process computes, or is kept
from it, does not matter. So a busy or slow machine fails no test, and hours pass in microseconds.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

if sys.version_info >= (3, 11):
    from asyncio import Runner
else:
    from backports.asyncio.runner import Runner

P = ParamSpec("P")
T = TypeVar("T")

TICK = 1e-8
"""Seconds between two readings. A clock that stood still would hide code that reads it twice in one
step and relies on the same answer. More than the resolution that asyncio assumes, within which it
takes two timers for one; less than what `pytest.approx` overlooks."""
PASS = 5e-5
"""Seconds that one pass of a loop with sockets takes. In a test that polls, the loop is never idle,
and hardly any time would pass."""
GRACE = 0.001
"""Seconds of real time that the system has to bring what was sent to a socket of the process."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for a timer, it sets its clock forward.

    Unless an executor works for it, or is shut down. It cannot tell that another process does, or
    another thread: tests that wait for those have the mark `real_time`. If nothing is set that
    could wake it, neither a timer nor a socket, it raises an `AssertionError`.
    """

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        self._clock.now += TICK
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


def real_time_loop() -> VirtualLoop:
    """A loop that never sets its clock forward, for tests with the mark `real_time`."""
    loop = VirtualLoop()
    loop._clock.awaited.add("another process or thread")
    return loop


def block(seconds: float) -> None:
    """Keeps the running loop from all else for that long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._clock.now += seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run()`, on a `VirtualLoop`."""
    with Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Decorates an async test: it runs in virtual time, and fails if it leaves tasks behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        loop = VirtualLoop()
        complaints: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        try:
            loop.run_until_complete(test(*args, **kwargs))
            left = asyncio.all_tasks(loop)
            assert not left, f"left behind: {left}"
            assert not complaints, complaints
        finally:
            loop.close()

    return run


class _Clock(selectors.DefaultSelector):
    """Where the loop waits; so it knows how long.

    Attributes:
        now: seconds.
        awaited: what is at work outside of the loop. It needs real time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.awaited: set[object] = set()

    def select(self, timeout: float | None = None) -> list[Any]:
        has_sockets = len(self.get_map()) > 1  # beside the pipe that the loop wakes itself with
        if has_sockets:
            self.now += PASS
        events = super().select(0)
        if events or timeout == 0:
            return events
        if not has_sockets and not self.awaited:
            assert timeout is not None, "everything waits, and no timer is set: a deadlock"
            self.now += timeout
            return events
        if timeout is None or self.awaited:
            return self._wait(timeout)
        events = super().select(min(timeout, GRACE))
        if not events:
            self.now += timeout
        return events

    def _wait(self, timeout: float | None) -> list[Any]:
        began = time.monotonic()
        events = super().select(timeout)
        waited = time.monotonic() - began
        self.now += waited if timeout is None else min(waited, timeout)
        return events
