"""The lease: what the plugin sees as its WebSocket, for one utterance."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp
from aiohttp import WSMsgType

from ..pool.entries import Outcome
from ..pool.supervisor import OnFault
from .connection import CLOSED_MESSAGE
from .exchange import Exchange

Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any]])

OF_THE_NETWORK = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""What a WebSocket raises when the network or the server fails."""


class _MisuseError(RuntimeError):
    """Raised for a call that aiohttp's own WebSocket refuses, too."""


def _reports_faults(method: Method) -> Method:
    """A fault of the package ends the utterance as the network does: LiveKit retries it."""

    @functools.wraps(method)
    async def guarded(lease: Lease, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(lease, *args, **kwargs)
        except (*OF_THE_NETWORK, _MisuseError):
            raise
        except Exception as fault:
            lease.on_fault(method.__name__, fault)
            raise ConnectionResetError("xai_pool_patch failed") from None

    return guarded  # type: ignore[return-value]


def _of_the_socket(name: str) -> Any:
    return property(lambda lease: getattr(lease._exchange.connection.ws, name))


class Lease(aiohttp.ClientWebSocketResponse):
    """A `ClientWebSocketResponse` whose socket belongs to a pool.

    Only what touches the socket is overridden. The rest of the class (`receive_str`, `send_json`,
    iteration, `async with` …) is built on these and works as it is. What the base class keeps for
    itself (`_response`, `_writer` …) is that of the current socket. So is what it tells of that: an
    application may have a class of its own for sockets.

    Args:
        exchange: carries the utterance.
        on_fault: takes a fault of the package.
    """

    close_code = _of_the_socket("close_code")
    protocol = _of_the_socket("protocol")
    compress = _of_the_socket("compress")
    client_notakeover = _of_the_socket("client_notakeover")
    get_extra_info = _of_the_socket("get_extra_info")
    exception = _of_the_socket("exception")

    def __init__(self, exchange: Exchange, on_fault: OnFault) -> None:
        # No super().__init__(): the base class would take over a socket that has a reader already.
        self.on_fault = on_fault
        self._exchange = exchange
        self._inbox = exchange.inbox
        self._is_receiving = False

    def __repr__(self) -> str:
        return f"<Lease {'closed' if self._inbox.is_closed else 'open'} {self._exchange!r}>"

    def __getattr__(self, name: str) -> Any:
        exchange = vars(self).get("_exchange")
        if exchange is None:
            raise AttributeError(name)
        return getattr(exchange.connection.ws, name)

    @property
    def was_configured(self) -> bool:
        """A `session.update` changed how its connection speaks."""
        return self._exchange.connection.utterance.was_configured

    def end(self, outcome: Outcome) -> None:
        """The utterance is over: give the connection back. Never waits.

        A lease that the plugin has not closed after a whole utterance belongs to the application
        from now on, with its connection.
        """
        if self._exchange.connection.is_given_away:
            return
        if outcome is Outcome.FINISHED and not self._inbox.is_closed:
            self._exchange.give_away()
        else:
            self.mark_closed()
            self._exchange.end(outcome)

    def mark_closed(self) -> None:
        """The plugin needs it no more."""
        self._inbox.close()

    @_reports_faults
    async def _receive(self, timeout: float | None) -> aiohttp.WSMessage | Exception:
        if self._is_receiving:
            raise _MisuseError("Concurrent call to receive() is not allowed")
        if self._exchange.is_over and not self._inbox:
            return CLOSED_MESSAGE
        self._is_receiving = True
        try:
            get = self._inbox.get()
            received = await (asyncio.wait_for(get, timeout) if timeout else get)
            return CLOSED_MESSAGE if received is None else received
        finally:
            self._is_receiving = False

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        received = await self._receive(timeout)
        if isinstance(received, Exception):
            raise received
        return received

    @_reports_faults
    async def send_str(self, data: str, compress: int | None = None) -> None:
        await self._send("send_str", data, compress)

    @_reports_faults
    async def send_bytes(self, data: bytes, compress: int | None = None) -> None:
        await self._send("send_bytes", data, compress)

    @_reports_faults
    async def send_frame(
        self, message: bytes, opcode: WSMsgType, compress: int | None = None
    ) -> None:
        await self._send("send_frame", message, opcode, compress)

    async def _send(self, method: str, *args: Any) -> None:
        self._check_open()
        await self._exchange.send(method, *args)

    @_reports_faults
    async def ping(self, message: bytes = b"") -> None:
        self._check_open()
        await self._exchange.connection.ws.ping(message)

    @_reports_faults
    async def pong(self, message: bytes = b"") -> None:
        self._check_open()
        await self._exchange.connection.ws.pong(message)

    @_reports_faults
    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Mark the lease as closed. `end` decides whether the socket is closed."""
        was_open = not self._inbox.is_closed
        self.mark_closed()
        if self._exchange.connection.is_given_away:
            self._exchange.end(Outcome.FAILED)
        return was_open

    @property
    def closed(self) -> bool:
        return self._inbox.is_closed or self._exchange.is_over

    def _check_open(self) -> None:
        if self._inbox.is_closed:
            raise ConnectionResetError("Cannot write to a closed lease")
