"""The sessions of one team, and WebSockets of which nothing but their state exists. Seconds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp
import yarl
from aiohttp import WSMsgType
from multidict import CIMultiDict, CIMultiDictProxy

HANDSHAKE = 0.45
ROUND_TRIP = 0.15
PERMIT_TTL = 600.0
"""How long the server counts a session that ended without a Close frame."""

_URL = yarl.URL("wss://api.x.ai/v1/tts")
_REQUEST = aiohttp.RequestInfo(_URL, "GET", CIMultiDictProxy(CIMultiDict()), _URL)
_CLOSING = aiohttp.WSMessage(WSMsgType.CLOSING, None, None)


class RefusedError(aiohttp.WSServerHandshakeError):
    """The team has no session left."""

    def __init__(self) -> None:
        super().__init__(_REQUEST, (), status=429)


@dataclass(eq=False)
class Server:
    """Counts sessions, and refuses those above the limit.

    Attributes:
        refused: handshakes that were refused.
        peak: most sessions at a time.
    """

    limit: int
    sessions: int = 0
    refused: int = 0
    peak: int = 0
    _used: float = 0.0
    _changed_at: float = field(default_factory=lambda: _now())

    @property
    def used(self) -> float:
        """Seconds of sessions so far."""
        return self._used_at(_now())

    def _used_at(self, now: float) -> float:
        return self._used + self.sessions * (now - self._changed_at)

    async def connect(self) -> Socket:
        """Make a connection.

        Raises:
            RefusedError: there is no session left.
        """
        await asyncio.sleep(HANDSHAKE)
        if self.sessions >= self.limit:
            self.refused += 1
            raise RefusedError
        self._change(1)
        self.peak = max(self.peak, self.sessions)
        return Socket(self)

    def free(self, after: float) -> None:
        """Stop counting a session some seconds from now."""
        asyncio.get_running_loop().call_later(after, self._change, -1)

    def _change(self, by: int) -> None:
        now = _now()
        self._used, self._changed_at = self._used_at(now), now
        self.sessions += by


@dataclass(eq=False)
class Socket:
    """What `Connection` needs of a WebSocket."""

    server: Server
    closed: bool = False
    _messages: asyncio.Queue[aiohttp.WSMessage] = field(default_factory=asyncio.Queue)

    async def receive(self) -> aiohttp.WSMessage:
        return await self._messages.get()

    async def ping(self, token: bytes) -> None:
        self._messages.put_nowait(aiohttp.WSMessage(WSMsgType.PONG, token, None))

    async def close(self) -> None:
        """Send a Close frame, and wait for the answer."""
        if not self.closed:
            self._end(freed_after=ROUND_TRIP / 2)
            await asyncio.sleep(ROUND_TRIP)

    def kill(self) -> None:
        """End without a Close frame: the process is gone."""
        if not self.closed:
            self._end(freed_after=PERMIT_TTL)

    def _end(self, freed_after: float) -> None:
        self.closed = True
        self._messages.put_nowait(_CLOSING)
        self.server.free(freed_after)


def _now() -> float:
    return asyncio.get_running_loop().time()
