"""One WebSocket: its reader, its liveness, its close."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable

import aiohttp
from aiohttp import WSMsgType

from .background import spawn
from .telemetry import describe, log
from .utterance import Stage, UtteranceTracker

_ENDINGS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
CLOSED_MESSAGE = aiohttp.WSMessage(WSMsgType.CLOSED, None, None)


class State(enum.Enum):
    OPEN = "open"
    LOST = "lost"
    """The peer ended it, or said something that it was not asked for."""
    CLOSING = "closing"
    """By our own wish."""


class Connection:
    """A WebSocket with one reader for its whole life.

    The reader answers PINGs and notices a peer that goes away, also while nobody uses the
    connection. What it reads goes to the inbox of the current lease. The WebSocket must have been
    opened with `autoping=False`, so that PINGs reach the reader.
    """

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, *, close_timeout: float) -> None:
        self.ws = ws
        self.utterance = UtteranceTracker()
        self.state = State.OPEN
        self.on_lost: Callable[[], None] | None = None
        self._close_timeout = close_timeout
        self._inbox: asyncio.Queue[aiohttp.WSMessage] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._transport = _transport_of(ws)
        self._reader = spawn(self._read(), name="xai_pool_patch.reader")

    def __repr__(self) -> str:
        use = "leased" if self._inbox is not None else "idle"
        return f"<Connection {self.state.value} {use} {self.utterance.stage.value}>"

    @property
    def is_reusable(self) -> bool:
        return self.state is State.OPEN and self.utterance.is_clean

    @property
    def is_over(self) -> bool:
        """Nothing more will be put into the inbox."""
        return self._reader.done()

    def attach(self) -> asyncio.Queue[aiohttp.WSMessage]:
        """A fresh inbox for a new lease: nothing read before can be in it."""
        self._inbox = asyncio.Queue()
        return self._inbox

    def detach(self) -> None:
        self._inbox = None

    async def send_str(self, frame: str, compress: int | None) -> None:
        self.utterance.sent(frame)
        await self.ws.send_str(frame, compress)

    async def send_bytes(self, data: bytes, compress: int | None) -> None:
        self.utterance.sent(data)
        await self.ws.send_bytes(data, compress)

    async def send_frame(self, data: bytes, opcode: WSMsgType, compress: int | None) -> None:
        self.utterance.sent(data)
        await self.ws.send_frame(data, opcode, compress)

    def close(self) -> asyncio.Task[None]:
        """Closes in the background: a Close frame, `close_timeout` for the answer, then abort."""
        if self._closer is None:
            if self.state is State.OPEN:
                self.state = State.CLOSING
            self._closer = spawn(self._shut(), name="xai_pool_patch.close")
        return self._closer

    async def _shut(self) -> None:
        try:
            await asyncio.wait_for(self.ws.close(), self._close_timeout)
        except Exception as error:
            # A time-out or a socket that broke meanwhile: the abort settles both.
            log().debug("close cut short", error=describe(error))
        finally:
            # A peer that answered has nothing more to say, and one that did not would keep the
            # TLS layer waiting for its goodbye.
            if self._transport is not None:
                self._transport.abort()
            await asyncio.wait([self._reader])

    async def _read(self) -> None:
        try:
            while self.state is State.OPEN:
                await self._handle(await self.ws.receive())
        except Exception as error:
            # A PONG into a socket that has just died; anything else would be a fault of ours.
            log().debug("reader stopped", error=describe(error))
            self._lose()
        finally:
            # Cancelled, the loop is ending: nobody is told, lest a new connection be dialled.
            if self.state is State.OPEN:
                self.state = State.LOST
            self._deliver(CLOSED_MESSAGE)

    async def _handle(self, message: aiohttp.WSMessage) -> None:
        if message.type is WSMsgType.PING:
            await self.ws.pong(message.data)
        elif message.type in _ENDINGS:
            self._deliver(message)
            self._lose()
        elif message.type is not WSMsgType.PONG:
            self._take(message)

    def _take(self, message: aiohttp.WSMessage) -> None:
        may_be_heard = self.utterance.received(message.data)
        is_idle_and_spoiled = self._inbox is None and self.utterance.stage is Stage.SPOILED
        if not may_be_heard or is_idle_and_spoiled:
            self._lose()
        else:
            self._deliver(message)

    def _deliver(self, message: aiohttp.WSMessage) -> None:
        if self._inbox is not None:
            self._inbox.put_nowait(message)

    def _lose(self) -> None:
        if self.state is State.OPEN:
            self.state = State.LOST
            if self.on_lost is not None:
                self.on_lost()


def _transport_of(ws: aiohttp.ClientWebSocketResponse) -> asyncio.WriteTransport | None:
    """aiohttp has no public way to it, and none to abort a connection."""
    connection = getattr(getattr(ws, "_response", None), "connection", None)
    return getattr(connection, "transport", None)
