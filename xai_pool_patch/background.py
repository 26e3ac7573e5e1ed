"""Tasks that outlive the call which started them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def spawn(coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Starts a task that belongs to the pool, not to the turn that happened to start it.

    An empty context keeps the turn's trace span, stream and TTS from living as long as the
    connection. A loop that is closed without cancelling its tasks takes this one with it in
    silence: its socket is gone then, and there is nobody to be warned.
    """
    loop = asyncio.get_running_loop()
    task = contextvars.Context().run(loop.create_task, coroutine, name=name)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task


def call_at(when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
    """`loop.call_at` in an empty context, for the same reason as `spawn`."""
    return asyncio.get_running_loop().call_at(when, callback, context=contextvars.Context())
