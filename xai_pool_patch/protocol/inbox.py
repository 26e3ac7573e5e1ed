"""What the plugin has not received yet."""

from __future__ import annotations

import asyncio
from collections import deque

import aiohttp

Received = aiohttp.WSMessage | Exception


class Inbox:
    """A queue with one reader. An `asyncio.Queue` takes four times as many calls a message.

    Attributes:
        is_closed: the plugin receives no more.
    """

    def __init__(self) -> None:
        self._received: deque[Received] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._received)

    def put(self, received: Received) -> None:
        self._received.append(received)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def close(self) -> None:
        """The plugin receives no more. Shares no code with `put`, which may be what failed."""
        self.is_closed = True
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def get(self) -> Received | None:
        """What comes next; None once it is closed."""
        while not self._received and not self.is_closed:
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        return None if self.is_closed else self._received.popleft()
