"""What the plugin sees as its WebSocket: the loan of one connection for one utterance."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from .connection import CLOSED_MESSAGE, Connection
from .pool import Pool, Reason


class Lease(aiohttp.ClientWebSocketResponse):
    """A `ClientWebSocketResponse` whose socket belongs to a pool.

    Only what touches the socket is overridden. The rest of the class (`receive_str`, `send_json`,
    iteration, `async with` …) is built on these and works as it is.
    """

    def __init__(self, pool: Pool[Connection], connection: Connection) -> None:
        # The base class would take over the socket, which has a reader already.
        self._pool = pool
        self._connection = connection
        self._inbox = connection.attach()
        self._is_receiving = False
        self._is_closed = False
        self._is_ended = False

    def __repr__(self) -> str:
        return f"<Lease {'ended' if self._is_ended else 'held'} {self._connection!r}>"

    def end(self, cut_off: Reason | None) -> None:
        """Ends the loan. Once; never waits.

        Args:
            cut_off: what kept the plugin from finishing the utterance, None if nothing did. Only
                then, and if the protocol agrees, is the connection fit for another.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._mark_closed()
        self._connection.detach()
        if cut_off is None:
            self._pool.release(self._connection)
        else:
            self._pool.discard(self._connection, cut_off)

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        if self._is_receiving:
            raise RuntimeError("Concurrent call to receive() is not allowed")
        if self._is_closed or (self._connection.is_over and self._inbox.empty()):
            return CLOSED_MESSAGE
        self._is_receiving = True
        try:
            return await asyncio.wait_for(self._inbox.get(), timeout)
        finally:
            self._is_receiving = False

    async def send_str(self, data: str, compress: int | None = None) -> None:
        self._check_open()
        await self._connection.send_str(data, compress)

    async def send_bytes(self, data: bytes, compress: int | None = None) -> None:
        self._check_open()
        await self._connection.send_bytes(data, compress)

    async def send_frame(
        self, message: bytes, opcode: WSMsgType, compress: int | None = None
    ) -> None:
        self._check_open()
        await self._connection.send_frame(message, opcode, compress)

    async def ping(self, message: bytes = b"") -> None:
        self._check_open()
        await self._connection.ws.ping(message)

    async def pong(self, message: bytes = b"") -> None:
        self._check_open()
        await self._connection.ws.pong(message)

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Ends the use of the socket. Whether the socket itself goes is decided by `end`."""
        was_open = not self._is_closed
        self._mark_closed()
        return was_open

    @property
    def closed(self) -> bool:
        return self._is_closed or self._connection.ws.closed

    @property
    def close_code(self) -> int | None:
        return self._connection.ws.close_code

    @property
    def protocol(self) -> str | None:
        return self._connection.ws.protocol

    @property
    def compress(self) -> int:
        return self._connection.ws.compress

    @property
    def client_notakeover(self) -> bool:
        return self._connection.ws.client_notakeover

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._connection.ws.get_extra_info(name, default)

    def exception(self) -> BaseException | None:
        return self._connection.ws.exception()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionResetError("Cannot write to a closed lease")

    def _mark_closed(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put_nowait(CLOSED_MESSAGE)
