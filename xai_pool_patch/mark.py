"""The mark of an API key whose sessions are scarce, and what a place that keeps it has to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Mark:
    """An API key's sessions are scarce for a while."""

    until: float
    """Seconds since the epoch."""
    length: float
    """Seconds that the mark lasts from the last refusal on. A mark that recurs is twice as long."""


class MarkStore(Protocol):
    """A place where processes leave marks for each other.

    Any event loop of the process may call it. A call is cancelled after a second. If it fails, that
    is logged and the store is tried again later. A call must not block the event loop.
    """

    name: str
    """Part of log records and statistics."""
    interval: float
    """Seconds between two looks, about."""

    async def read(self, digest: str) -> Mark | None:
        """The last mark of an API key, for five minutes after its end at least. None: no mark."""

    async def write(self, digest: str, mark: Mark) -> None:
        """Replace the mark of an API key."""

    async def aclose(self) -> None:
        """Close what the running event loop has opened. The store works again afterwards."""
