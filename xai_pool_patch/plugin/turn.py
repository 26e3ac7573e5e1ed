"""One run of the plugin's `_run_ws`, and where its figures go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..manager import PoolManager
from ..pool.entries import Outcome
from ..protocol.lease import Lease
from ..telemetry.log import harmless, in_ms
from ..telemetry.usage import UsageStats


class Turn:
    """One utterance, on one lease at a time.

    Keeps neither the stream nor, after its end, the lease alive: the context of a connection's
    transport holds the turn that dialled it.

    Args:
        stream: the stream that runs; None if a connection is asked for outside of a stream.

    Attributes:
        waited: seconds that the turn waited for the connection that is heard.
        reused: the connection was ready when the turn asked for it.
        manager: the pools of the turn's event loop; None until the turn asks for a connection.
        usage: what the pools did for the turn's TTS; set before there is a lease.
        lease: the lease that the plugin holds.
    """

    def __init__(self, stream: Any = None) -> None:
        self.waited = 0.0
        self.reused = False
        self.manager: PoolManager | None = None
        self.lease: Lease | None = None
        self.usage: UsageStats
        self._stream = weakref.ref(stream) if stream is not None else _nothing
        self._reporting = [self._stream, _reporting.get()]

    def __repr__(self) -> str:
        return f"<Turn waited={self.waited:.3f} reused={self.reused}>"

    def end(self, outcome: Outcome) -> None:
        lease, self.lease = self.lease, None
        if lease is not None and self.manager is not None:
            self.manager.leases.discard(lease)
            lease.end(outcome)

    @harmless
    def acquired(self, waited: float, *, reused: bool) -> None:
        self.note(waited, reused=reused)
        self.usage.begun(waited, reused=reused)
        if not reused:
            self._mark("waited", wait_ms=in_ms(waited))

    @harmless
    def replayed(self, waited: float, reason: str) -> None:
        self.note(waited)
        self.usage.replaced(waited)
        self._mark("replayed", reason=reason, wait_ms=in_ms(waited))

    @harmless
    def note(self, waited: float, *, reused: bool = False) -> None:
        self.waited, self.reused = waited, reused
        for reference in self._reporting:
            stream = reference()
            if stream is not None:
                # livekit-agents reads these two for its TTSMetrics.
                stream._acquire_time = waited
                stream._connection_reused = reused

    def _mark(self, event: str, **attributes: str | float) -> None:
        """Add an event to the stream's span. The pool's own tasks run outside of any span."""
        span = getattr(self._stream(), "_tts_request_span", None)
        if span is not None:
            span.add_event(f"xai_pool_patch.{event}", attributes)


def _nothing() -> Any:
    """In place of a reference to a stream."""


_turn: ContextVar[Turn | None] = ContextVar("xai_pool_patch", default=None)
current_turn = _turn.get
enter_turn = _turn.set
leave_turn = _turn.reset

# Weak, since a task or timer that is started in this context may live as long as a connection.
_reporting: ContextVar[Callable[[], Any]] = ContextVar("xai_pool_patch.reporting", default=_nothing)


def report_on(stream: Any) -> None:
    """Make the turns of this task, and of the tasks it starts, report on that stream, too."""
    _reporting.set(weakref.ref(stream))
