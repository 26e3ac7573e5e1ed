"""Where processes exchange shortages."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Store:
    """Keeps one number for each host: when its shortage ends, in seconds since the epoch.

    A store works in a thread of its own. A disk or a name server that hangs then blocks neither an
    event loop nor the threads of `asyncio.to_thread`, which the application shares. The methods may
    raise anything, and may be cancelled.

    Attributes:
        name: part of log records.
        keeps_open: `aclose` has something to do.
    """

    name: str
    keeps_open = False
    _read: Callable[[str], float | None]
    _write: Callable[[str, float], None]
    _probe: Callable[[str], None]
    _process: int | None = None
    """The one in which the thread was started."""

    async def read(self, host: str) -> float | None:
        """The end that was written last; None if there is none, or nonsense."""
        return await self._in_thread(self._read, host)

    async def write(self, host: str, until: float) -> None:
        """Replace the end."""
        await self._in_thread(self._write, host, until)

    async def probe(self, host: str) -> None:
        """Raise what `write` would. Leaves no end."""
        await self._in_thread(self._probe, host)

    async def aclose(self) -> None:
        """Close what is open, within a second. The store works again afterwards."""

    async def _in_thread(self, work: Callable[..., T], host: str, *args: float) -> T:
        if self._process != os.getpid():  # a fork takes no thread along
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="xai_pool_patch")
            self._process = os.getpid()
        name = re.sub(r"[^A-Za-z0-9.-]", "_", host)[:100]
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, name, *args)
