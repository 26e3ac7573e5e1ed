"""A timeout for an event loop that may be blocked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .supervisor import Supervisor

TICKS = 10
"""Parts of a timeout. However long the loop is blocked, one part of the time passes at most."""


class SoftTimeout:
    """A timeout whose time passes only while the event loop runs.

    While the loop is blocked, a dial or an answer cannot progress, whatever the clock says. The
    first `AgentSession` of a process blocks the loop for a quarter of a second on a quiet machine,
    just after the dial of `prewarm()`; on a busy machine, for longer than a handshake should take.

    Args:
        supervisor: owns the timers.
        then: called once when the time is over.
    """

    def __init__(self, supervisor: Supervisor, seconds: float, then: Callable[[], object]) -> None:
        self._supervisor = supervisor
        self._tick = seconds / TICKS
        self._left = TICKS + 1
        self._then = then
        self._wait()

    @property
    def is_over(self) -> bool:
        return self._left == 0

    def stop(self) -> None:
        """Never call `then`: what the timeout was for has happened, or cannot happen."""
        self._timer.cancel()

    def _wait(self) -> None:
        # After a block in the last tick, the loop runs its timer before it reads what arrived
        # during the block. So one more timer is due at once: it runs in the loop's next pass, after
        # the sockets were read. Without it, an answer that is there would count as missing.
        seconds = self._tick if self._left > 1 else 0.0
        now = asyncio.get_running_loop().time()
        self._timer = self._supervisor.call_at(now + seconds, self._pass)

    def _pass(self) -> None:
        self._left -= 1
        if self.is_over:
            self._then()
        else:
            self._wait()
