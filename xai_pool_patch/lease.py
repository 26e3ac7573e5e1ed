"""What the plugin sees as its WebSocket, for one utterance."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from .connection import CLOSED_MESSAGE
from .delivery import Delivery
from .pool import Reason


class Lease(aiohttp.ClientWebSocketResponse):
    """A `ClientWebSocketResponse` whose socket belongs to a pool.

    Only what touches the socket is overridden. The rest of the class (`receive_str`, `send_json`,
    iteration, `async with` …) is built on these and works as it is.
    """

    def __init__(self, delivery: Delivery) -> None:
        # The base class would take over the socket, which has a reader already.
        self._delivery = delivery
        self._is_receiving = False
        self._is_closed = False
        self._is_ended = False

    def __repr__(self) -> str:
        return f"<Lease {'ended' if self._is_ended else 'held'} {self._delivery!r}>"

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
        self._delivery.end(cut_off)

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        if self._is_receiving:
            raise RuntimeError("Concurrent call to receive() is not allowed")
        inbox = self._delivery.inbox
        if self._is_closed or (self._delivery.is_over and inbox.empty()):
            return CLOSED_MESSAGE
        self._is_receiving = True
        try:
            waiting = inbox.get()
            received = await (asyncio.wait_for(waiting, timeout) if timeout else waiting)
        finally:
            self._is_receiving = False
        if isinstance(received, Exception):
            raise received
        return received

    async def send_str(self, data: str, compress: int | None = None) -> None:
        self._check_open()
        await self._delivery.send(lambda connection: connection.send_str(data, compress))

    async def send_bytes(self, data: bytes, compress: int | None = None) -> None:
        self._check_open()
        await self._delivery.send(lambda connection: connection.send_bytes(data, compress))

    async def send_frame(
        self, message: bytes, opcode: WSMsgType, compress: int | None = None
    ) -> None:
        self._check_open()
        await self._delivery.send(lambda c: c.send_frame(message, opcode, compress))

    async def ping(self, message: bytes = b"") -> None:
        self._check_open()
        await self._delivery.connection.ws.ping(message)

    async def pong(self, message: bytes = b"") -> None:
        self._check_open()
        await self._delivery.connection.ws.pong(message)

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Ends the use of the socket. Whether the socket itself goes is decided by `end`."""
        was_open = not self._is_closed
        self._mark_closed()
        return was_open

    @property
    def closed(self) -> bool:
        return self._is_closed or self._delivery.is_over

    @property
    def close_code(self) -> int | None:
        return self._delivery.connection.ws.close_code

    @property
    def protocol(self) -> str | None:
        return self._delivery.connection.ws.protocol

    @property
    def compress(self) -> int:
        return self._delivery.connection.ws.compress

    @property
    def client_notakeover(self) -> bool:
        return self._delivery.connection.ws.client_notakeover

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._delivery.connection.ws.get_extra_info(name, default)

    def exception(self) -> BaseException | None:
        return self._delivery.connection.ws.exception()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionResetError("Cannot write to a closed lease")

    def _mark_closed(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._delivery.inbox.put_nowait(CLOSED_MESSAGE)
