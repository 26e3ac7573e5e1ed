"""The tasks, timers and sockets of one event loop's pools, so that a fault can end all of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, Protocol, TypeVar

OnFault = Callable[[str, Exception], None]
"""Takes the name of the operation that failed, and the exception."""


CLOSE_TIMEOUT = 5.0
"""Seconds the peer has to answer a Close frame, in the background; then the socket is aborted.
Without a Close frame xAI may count the session for up to 600 s more."""


class Socket(Protocol):
    """What the supervisor needs of a WebSocket."""

    def close(self) -> Awaitable[object]: ...


T = TypeVar("T")


def spawn(
    coroutine: Coroutine[Any, Any, T], name: str, *, eager_in: Context | None = None
) -> asyncio.Task[T]:
    """Start a task that belongs to the pool, not to the turn that happens to start it.

    The task has an empty context. Otherwise the turn's trace span, stream and TTS would live as
    long as the connection. If a loop is closed without cancelling its tasks, asyncio does not warn
    about this one: its socket is gone with the loop.

    Args:
        eager_in: a context in which the task runs at once, up to its first real wait, if Python can
            do that (3.12). The loop would first run whatever else is ready, such as nine other
            callers.
    """
    loop = asyncio.get_running_loop()
    is_eager, context = eager_in is not None, eager_in or Context()
    task: asyncio.Task[T]
    if is_eager and sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        task = asyncio.Task(coroutine, loop=loop, name=name, context=context, eager_start=True)
    else:
        task = context.run(loop.create_task, coroutine, name=name)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task


async def within(seconds: float, coroutine: Coroutine[Any, Any, T], name: str) -> T:
    """Do what `asyncio.wait_for` does.

    Before Python 3.12 that makes a task of its own, and a loop that is closed in the meantime
    complains about it.

    Raises:
        asyncio.TimeoutError: it took longer, and was cancelled.
    """
    loop, task = asyncio.get_running_loop(), spawn(coroutine, name)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not loop.is_closed() and not task.done():
            task.cancel()
    if not task.done():
        raise asyncio.TimeoutError
    return task.result()


class Supervisor:
    """Owns the tasks, timers and sockets of one event loop.

    Args:
        on_fault: takes what a task or a timer raised. None of them should raise.

    Attributes:
        sockets: every WebSocket that was opened for the pools and has not ended.
        is_stopped: a fault has stopped everything.
    """

    def __init__(self, on_fault: OnFault) -> None:
        self.on_fault = on_fault
        self.sockets: set[Socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._goodbyes: set[asyncio.Task[None]] = set()
        self.is_stopped = False

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], name: str, *, eager_in: Context | None = None
    ) -> asyncio.Task[None]:
        """Start a task whose exception is a fault."""
        task = spawn(coroutine, name, eager_in=eager_in)
        # Not for `stop` alone: asyncio has only weak references to its tasks. One that nothing else
        # refers to may be collected before it has ended.
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object
    ) -> asyncio.TimerHandle:
        """Call `loop.call_at` in an empty context, for the same reason as `spawn`."""
        loop = asyncio.get_running_loop()
        return loop.call_at(when, self.run, callback, *args, context=Context())

    def run(self, callback: Callable[..., object], *args: object) -> None:
        """Call a function for the event loop: its exception is a fault."""
        # `stop` ends no timers. Those that were set before it come here, and one that always sets
        # the next, as a watch for refusals does, would go on for ever.
        if self.is_stopped:
            return
        try:
            callback(*args)
        except Exception as fault:
            self.on_fault("timer", fault)

    def stop(self) -> None:
        """End everything after a fault.

        This shares no code with how connections are closed otherwise, which may be what failed.
        """
        self.is_stopped = True
        for task in list(self._tasks):
            task.cancel()
        for ws in list(self.sockets):
            self.sockets.discard(ws)
            # Not one of `_tasks`: a second fault would cancel it.
            goodbye = spawn(_say_goodbye(ws), name="xai_pool_patch.goodbye")
            self._goodbyes.add(goodbye)
            goodbye.add_done_callback(self._goodbyes.discard)
            # Not by the task: a loop that ends cancels it, maybe before its first step.
            goodbye.add_done_callback(functools.partial(_hang_up, ws))

    async def wait_stopped(self) -> None:
        """Wait until the Close frames that `stop` sent are answered, or too late."""
        if self._goodbyes:
            await asyncio.wait(self._goodbyes)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(fault := task.exception(), Exception):
            self.on_fault(task.get_name(), fault)


async def _say_goodbye(ws: Socket) -> None:
    with contextlib.suppress(Exception):  # the socket is gone already, or the peer does not answer
        await asyncio.wait_for(ws.close(), CLOSE_TIMEOUT)


def _hang_up(ws: Socket, _: object) -> None:
    response = getattr(ws, "_response", None)
    if response is not None:
        response.close()
