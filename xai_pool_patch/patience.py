"""How long a caller relies on what somebody else began."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .background import call_at

TICKS = 10
"""Parts of a patience. A blocked loop costs it one of them at most."""


class Patience:
    """A time that passes only while the event loop runs.

    What is waited for cannot get on while the loop is blocked, whatever the clock says. The first
    `AgentSession` of a process blocks it for a quarter of a second on a quiet machine, just behind
    the dial of its `prewarm()`, and on a busy one for longer than any handshake should take.

    Args:
        seconds: 0.0 for a patience that is over from the start.
        on_end: called once, unless it is over from the start or stopped before.
    """

    def __init__(self, seconds: float, on_end: Callable[[], None]) -> None:
        self._tick = seconds / TICKS
        self._left = TICKS if seconds > 0.0 else 0
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        if not self.is_over:
            self._wait()

    @property
    def is_over(self) -> bool:
        return self._left == 0

    def stop(self) -> None:
        """It goes no further: what was waited for is there, or will not come."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._timer = call_at(asyncio.get_running_loop().time() + self._tick, self._pass)

    def _pass(self) -> None:
        self._left -= 1
        if self.is_over:
            self._on_end()
        else:
            self._wait()
