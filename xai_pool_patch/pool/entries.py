"""What a pool holds: its connections, the callers that wait, and the dials under way."""

from __future__ import annotations

import asyncio
import contextvars
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from .soft_timeout import SoftTimeout


class Reason(enum.Enum):
    """Why the pool closed a connection. Log, statistics and metrics use these values."""

    INTERRUPTED = "interrupted"
    LOST = "lost"
    FAILED = "failed"
    EXPIRED = "expired"
    SURPLUS = "surplus"
    SHUTDOWN = "shutdown"


class Outcome(enum.Enum):
    """How an utterance ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class Poolable(Protocol):
    """What the pool needs of a connection."""

    on_lost: Callable[[], None] | None
    """The connection calls this once, when the peer ends it."""

    @property
    def is_reusable(self) -> bool: ...

    @property
    def clear_round_trip(self) -> float | None:
        """Seconds between a PING and its PONG; None if it cannot be known whether a clear works."""

    sent_stale_audio: bool
    """The server acknowledged a clear, and yet sent more of the cleared utterance."""

    async def clear(self) -> None:
        """Make the connection reusable; return when the outcome is known."""

    def close(self, *, listen: bool = False) -> asyncio.Task[None] | None:
        """Close in the background. Returns the task that does so, if there is anything to do.

        Args:
            listen: hear for a while whether the connection is alive.
        """

    def abort_if_closing(self) -> None:
        """End it at once, if its Close was sent a while ago."""


C = TypeVar("C", bound=Poolable)
C_co = TypeVar("C_co", bound=Poolable, covariant=True)


@dataclass(frozen=True)
class Acquired(Generic[C]):
    """A connection that a caller was handed."""

    connection: C
    waited: float
    """Seconds; 0.0 if the connection was idle when the caller asked."""
    reused: bool
    """The connection was idle when the caller asked."""
    fresh: bool
    """The pool dialled it while the caller waited, and it is unused."""


@dataclass(eq=False)
class PoolEntry(Generic[C]):
    """A connection, and what the pool knows about it. Times are those of the event loop."""

    connection: C
    rotate_at: float
    """From then on the pool replaces it when idle, and uses it only until that has happened."""
    expires_at: float
    """From then on the pool does not hand it out."""
    made_at: float
    idle_since: float
    lease_count: int = 0
    holder: object = None
    """The caller that it is leased to, if that caller has said who it is."""


@dataclass(eq=False)
class Waiter(Generic[C]):
    """A caller that waits for a connection. What comes of it lies in `outcome`."""

    deadline: float
    wants_fresh: bool
    caller: object = None
    """See `Pool.acquire`."""
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """A dial for this caller runs in it: trace hooks of the application find what they expect."""
    outcome: PoolEntry[C] | BaseException = field(default_factory=asyncio.CancelledError)
    woken: asyncio.Future[None] = field(default_factory=asyncio.Future)
    """Done once it is served, failed, or cancelled with its caller."""

    def accept(self, entry: PoolEntry[C]) -> bool:
        """Take the connection. False if the caller does not want one any more, or not this one."""
        # A waiter leaves the pool's queue only when its task runs again. A connection, its
        # deadline, its dial and the end of the pool may all come before that: the first counts.
        if self.woken.done() or (self.wants_fresh and entry.lease_count):
            return False
        self.outcome = entry
        self.woken.set_result(None)
        return True

    def fail(self, error: Exception) -> None:
        """Make the caller's `acquire()` raise, unless the waiter is done already.

        Shares no code with `accept`, which may be what failed.
        """
        if not self.woken.done():
            self.outcome = error
            self.woken.set_result(None)


@dataclass(eq=False)
class Dial(Generic[C]):
    """A connection being made."""

    began: float
    waiter: Waiter[C] | None
    """The caller that asked for it; None for a standby."""
    soft_timeout: SoftTimeout
    """Once over, callers do not rely on this dial any more."""
    task: asyncio.Task[None] | None = None
    """None until `spawn()` returns. An eager dial runs before that."""


@dataclass(eq=False)
class Clear:
    """A `text.clear` on its way, or the acknowledgement."""

    soft_timeout: SoftTimeout
    """Once over, callers do not rely on this clear any more."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    """The connection's `clear()`, and what waits for it up to the timeout."""
