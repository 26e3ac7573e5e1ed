"""The lease: what the plugin sees as its WebSocket, for one utterance."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import WSMsgType
from livekit.agents import APIError

from ..pool.pool import Reason
from ..pool.supervisor import Supervisor, spawn
from .connection import CLOSED_MESSAGE
from .exchange import Attempt, Exchange, Frame

Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any]])

NETWORK_ERRORS = (aiohttp.ClientError, APIError, OSError, asyncio.TimeoutError)
"""What the plugin's connect and its WebSocket raise when the network or the server fails."""

DATA = (WSMsgType.TEXT, WSMsgType.BINARY)


class _SteppedAsideError(Exception):
    """Wakes a `receive()` that waits when the lease steps aside."""


class _MisuseError(RuntimeError):
    """Raised for a call that aiohttp's own WebSocket refuses, too."""


def _fails_open(method: Method) -> Method:
    """After a fault of the patch, call the same method of the plugin's own WebSocket."""
    name = method.__name__

    @functools.wraps(method)
    async def guarded(lease: Lease, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("send_"):
            lease.frames.append(Frame(name, args, kwargs))
        if not lease.is_aside:
            try:
                return await method(lease, *args, **kwargs)
            except Exception as error:
                if not lease.is_aside:
                    if isinstance(error, (*NETWORK_ERRORS, _MisuseError)):
                        raise
                    lease.supervisor.on_fault(name, error)
        return await lease.go_on(name, *args, **kwargs)

    return guarded  # type: ignore[return-value]


class Lease(aiohttp.ClientWebSocketResponse):
    """A `ClientWebSocketResponse` whose socket belongs to a pool.

    Only what touches the socket is overridden. The rest of the class (`receive_str`, `send_json`,
    iteration, `async with` …) is built on these and works as it is.

    After a fault of the patch the lease steps aside. If the plugin has heard audio, the utterance
    goes on over the same socket; otherwise the lease replays it over a socket that the plugin's
    own connect opens. From then on only aiohttp is between the plugin and the server.

    Args:
        exchange: carries the utterance.
        supervisor: takes faults, and closes what is left open after one.
        connect: the plugin's own connect.
    """

    def __init__(
        self,
        exchange: Exchange,
        supervisor: Supervisor,
        connect: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse]],
    ) -> None:
        # No super().__init__(): the base class would take over a socket that has a reader already.
        self.frames = exchange.frames
        self.supervisor = supervisor
        self.is_aside = False
        self._exchange = exchange
        self._connect = connect
        self._is_receiving = False
        self._is_closed = False
        self._is_ended = False
        self._bare: _Bare | None = None
        self._opening: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Lease {'ended' if self._is_ended else 'held'} {self._exchange!r}>"

    def end(self, cut_off: Reason | None) -> None:
        """Give the connection back. Only the first call counts; never waits.

        Args:
            cut_off: what kept the plugin from finishing the utterance; None if it has finished.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._mark_closed()
        if self._opening is not None:
            self._opening.cancel()
        if self._bare is not None:
            self.supervisor.say_goodbye(self._bare.ws)
        elif not self.is_aside:
            self._exchange.end(cut_off)

    @_fails_open
    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        if self._is_receiving:
            raise _MisuseError("Concurrent call to receive() is not allowed")
        inbox = self._exchange.inbox
        if self._is_closed or (self._exchange.is_over and inbox.empty()):
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

    @_fails_open
    async def send_str(self, data: str, compress: int | None = None) -> None:
        await self._send()

    @_fails_open
    async def send_bytes(self, data: bytes, compress: int | None = None) -> None:
        await self._send()

    @_fails_open
    async def send_frame(
        self, message: bytes, opcode: WSMsgType, compress: int | None = None
    ) -> None:
        await self._send()

    async def _send(self) -> None:
        self._check_open()
        await self._exchange.send()

    @_fails_open
    async def ping(self, message: bytes = b"") -> None:
        self._check_open()
        await self._exchange.connection.ws.ping(message)

    @_fails_open
    async def pong(self, message: bytes = b"") -> None:
        self._check_open()
        await self._exchange.connection.ws.pong(message)

    @_fails_open
    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Mark the lease as closed. `end` decides whether the socket is closed."""
        was_open = not self._is_closed
        self._mark_closed()
        return was_open

    @property
    def closed(self) -> bool:
        if self._bare is not None:
            return self._bare.ws.closed
        return self._is_closed or self._exchange.is_over

    @property
    def close_code(self) -> int | None:
        return self._socket.close_code

    @property
    def protocol(self) -> str | None:
        return self._socket.protocol

    @property
    def compress(self) -> int:
        return self._socket.compress

    @property
    def client_notakeover(self) -> bool:
        return self._socket.client_notakeover

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket.get_extra_info(name, default)

    def exception(self) -> BaseException | None:
        return self._socket.exception()

    @property
    def _socket(self) -> aiohttp.ClientWebSocketResponse:
        return self._bare.ws if self._bare is not None else self._exchange.connection.ws

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionResetError("Cannot write to a closed lease")

    def _mark_closed(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._exchange.inbox.put_nowait(CLOSED_MESSAGE)

    # After a fault. Nothing below shares code with the rest, which may be what failed.

    def step_aside(self) -> aiohttp.ClientWebSocketResponse | None:
        """Take the patch out of the way. Only the first call counts; never waits.

        Returns:
            The socket that the plugin goes on with; None if the plugin needs another.
        """
        if not self.is_aside:
            self.is_aside = True
            attempt, inbox = self._exchange.heard, self._exchange.inbox
            if attempt is None:
                # The plugin has heard nothing yet, and will hear the answer to the replay.
                self._exchange.inbox = asyncio.Queue()
            else:
                connection = attempt.connection
                connection.sink = None
                unhandled = connection.unhandled
                if unhandled is not None and unhandled.type in DATA:
                    inbox.put_nowait(unhandled)
                connection.ws._autoping = True
                self._bare = _Bare(connection.ws, self.frames, attempt, inbox, connection.reader)
            inbox.put_nowait(_SteppedAsideError())
        return self._bare.ws if self._bare is not None else None

    async def go_on(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the plugin's own WebSocket."""
        if self._bare is None:
            if method == "close":
                return True
            if self._opening is None:
                self._opening = spawn(self._open(), name="xai_pool_patch.open")
                self._opening.add_done_callback(_retrieve)
            # Sender and receiver wait for the same socket. Without the shield, cancelling one of
            # them would cancel the dial of both.
            await asyncio.shield(self._opening)
        assert self._bare is not None
        if method.startswith("send_"):
            return await self._bare.send()
        if method == "receive":
            return await self._bare.receive(*args, **kwargs)
        return await getattr(self._bare.ws, method)(*args, **kwargs)

    async def _open(self) -> None:
        ws = await self._connect()
        if self._is_ended:
            # Before Python 3.12 wait_for() may swallow a cancellation that comes together with its
            # result. Nobody would close this socket.
            await ws.close()
            return
        self.supervisor.sockets.add(ws)
        self._bare = _Bare(ws, self.frames, _Progress())


@dataclass
class _Progress:
    """How many of the frames have been sent."""

    sent: int = 0


@dataclass(eq=False)
class _Bare:
    """A WebSocket of aiohttp, and how far the utterance has got on it."""

    ws: aiohttp.ClientWebSocketResponse
    frames: list[Frame]
    progress: _Progress | Attempt
    """Shared with a send that may still be running, so that no frame is sent twice."""
    received: asyncio.Queue[aiohttp.WSMessage | Exception] | None = None
    """Messages that came before, for the plugin to receive first."""
    reader: asyncio.Task[None] | None = None
    """The connection's reader, which is about to stop."""

    async def send(self) -> None:
        while self.progress.sent < len(self.frames):
            method, args, kwargs = self.frames[self.progress.sent]
            self.progress.sent += 1
            await getattr(self.ws, method)(*args, **kwargs)

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        await self.send()  # the fault may have stopped a replay halfway
        while self.received is not None and not self.received.empty():
            message = self.received.get_nowait()
            if not isinstance(message, Exception):
                return message
        if self.reader is not None:
            # aiohttp raises if two tasks receive at the same time.
            await asyncio.wait([self.reader])
        return await self.ws.receive(timeout)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Keep asyncio from logging an exception that nobody waited for."""
    if not task.cancelled():
        task.exception()
