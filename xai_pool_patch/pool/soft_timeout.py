"""How long something is waited for, on an event loop that may be blocked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .supervisor import Supervisor

TICKS = 10
"""Parts of a patience. A blocked loop costs it one of them at most."""


class SoftTimeout:
    """A time that passes only while the event loop runs.

    What is waited for cannot get on while the loop is blocked, whatever the clock says. The first
    `AgentSession` of a process blocks it for a quarter of a second on a quiet machine, just behind
    the dial of its `prewarm()`, and on a busy one for longer than any handshake should take.

    Args:
        supervisor: owns the timers.
        seconds: 0.0 for a patience that is over from the start.
        on_end: called once, unless it is over from the start or stopped before.
    """

    def __init__(self, supervisor: Supervisor, seconds: float, on_end: Callable[[], None]) -> None:
        self._supervisor = supervisor
        self._tick = seconds / TICKS
        self._left = TICKS if seconds > 0.0 else 0
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        if not self.is_over:
            self._wait(self._tick, self._pass)

    @property
    def is_over(self) -> bool:
        return self._left == 0

    def stop(self) -> None:
        """It goes no further: what was waited for is there, or will not come."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = self._supervisor.call_at(now + seconds, then)

    def _pass(self) -> None:
        if self._left > 1:
            self._left -= 1
            self._wait(self._tick, self._pass)
        else:
            # A loop that was blocked in the last tick rings before it reads what has long arrived:
            # the timer of the next pass through the loop comes after that.
            self._wait(0.0, self._end)

    def _end(self) -> None:
        self._left = 0
        self._on_end()
