"""An event loop whose time passes only when there is nothing else to do."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")


class _InstantSelector(selectors.DefaultSelector):
    """Instead of waiting, sets the clock forward by what the loop wanted to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everything waits, and no timer is set: a deadlock")
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """The clock of every timer and of `loop.time()` is injected: hours pass in microseconds."""

    def __init__(self) -> None:
        self._virtual = _InstantSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def block(seconds: float) -> None:
    """Keeps the running loop from all else for that long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._virtual.now += seconds


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
