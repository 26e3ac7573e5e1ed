"""One WebSocket: its reader, its liveness, its close."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from collections.abc import Callable

import aiohttp
from aiohttp import WSMsgType

from .background import spawn
from .telemetry.log import Event, describe, tell
from .utterance import Stage, UtteranceTracker, type_of

IDENTIFIER = re.compile(r"[a-z_]{1,20}(\.[a-z_]{1,20})?")
ENDINGS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
CLOSED_MESSAGE = aiohttp.WSMessage(WSMsgType.CLOSED, None, None)

SUSPICIOUS = 2
"""Connections in a row that end without a PONG before none is expected: one may have vanished."""

TEXT_CLEAR = '{"type":"text.clear"}'

Sink = Callable[[aiohttp.WSMessage, str], None]
"""Takes what the reader read: the message, and the type that its JSON names."""


class State(enum.Enum):
    OPEN = "open"
    LOST = "lost"
    """The peer ended it, or said something that it was not asked for."""
    CLOSING = "closing"
    """By our own wish."""


class Heartbeat:
    """The PINGs by which aiohttp finds a peer that has vanished: it ends who does not answer.

    A server that answers none at all is not held to them. Its connections would go on ending, each
    without a Close frame, and so be counted as sessions long after. The PONG of any connection
    ends that suspicion.

    Args:
        interval: see `PoolOptions.heartbeat`.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._unanswered = 0

    @property
    def interval(self) -> float | None:
        """Seconds, for the next connection; None for no PINGs."""
        return self._interval if self._unanswered < SUSPICIOUS else None

    def answered(self) -> None:
        self._unanswered = 0

    def unanswered(self) -> None:
        """A connection ended that was never answered a PING in all its life."""
        self._unanswered += 1
        if self._unanswered == SUSPICIOUS:
            tell(Event.PINGS_UNANSWERED)


class Connection:
    """A WebSocket with one reader for its whole life.

    The reader answers PINGs and notices a peer that goes away, also while nobody uses the
    connection. What it reads goes to whoever leases it. The WebSocket must have been opened with
    `autoping=False`, so that PINGs and PONGs reach the reader.

    Args:
        heartbeat: is told whether PINGs are answered.
        close_timeout: seconds the peer has to answer a Close frame.
        on_fault: is told what is wrong with the reader itself.

    Attributes:
        last_heard: when anything came last, a PONG included; time of the event loop.
        round_trip: seconds that the last PONG took; None while none has come.
        broke_word: it acknowledged a `text.clear`, and more came of what was cleared.
    """

    def __init__(
        self,
        ws: aiohttp.ClientWebSocketResponse,
        *,
        heartbeat: Heartbeat,
        close_timeout: float,
        on_fault: Callable[[Exception], None],
    ) -> None:
        self.ws = ws
        self._heartbeat = heartbeat
        self._on_fault = on_fault
        self.utterance = UtteranceTracker()
        self.state = State.OPEN
        self.on_lost: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self.last_heard = self._loop.time()
        self.round_trip: float | None = None
        self.broke_word = False
        self._pinged_at: dict[bytes, float] = {}
        self._fence: bytes | None = None
        self._close_timeout = close_timeout
        self._sink: Sink | None = None
        self._closer: asyncio.Task[None] | None = None
        self._transport = _transport_of(ws)
        self._reader = spawn(self._read(), name="xai_pool_patch.reader")

    def __repr__(self) -> str:
        use = "leased" if self._sink is not None else "idle"
        return f"<Connection {self.state.value} {use} {self.utterance.stage.value}>"

    @property
    def is_reusable(self) -> bool:
        return self.state is State.OPEN and self.utterance.is_clean

    @property
    def is_over(self) -> bool:
        """Nothing more will be read."""
        return self._reader.done()

    def attach(self, sink: Sink) -> None:
        """From here on the sink gets what is read, and nothing that was read before."""
        self._sink = sink

    def detach(self) -> None:
        self._sink = None

    async def ping(self) -> None:
        """Asks for a sign of life; the PONG sets `last_heard` and `round_trip`.

        Sent ahead of an utterance's first text it is a fence, too: audio that comes before the
        PONG left the server before it knew of that text. Where an utterance was cleared, such
        audio is what remained of that one; elsewhere nobody depends on PONGs.
        """
        now = self._loop.time()
        token = repr(now).encode()
        self._pinged_at = {token: now}
        if self.utterance.was_cleared:
            self._fence = token
        await self.ws.ping(token)

    async def send_str(self, frame: str, compress: int | None) -> None:
        self.utterance.sent(frame)
        await self.ws.send_str(frame, compress)

    async def send_bytes(self, data: bytes, compress: int | None) -> None:
        self.utterance.sent(data)
        await self.ws.send_bytes(data, compress)

    async def send_frame(self, data: bytes, opcode: WSMsgType, compress: int | None) -> None:
        self.utterance.sent(data)
        await self.ws.send_frame(data, opcode, compress)

    async def restore(self) -> None:
        """Has the server cancel what it owes, or prove that it owes nothing, by `text.clear`.

        Ends with the acknowledgement, or as soon as none can come any more; `is_reusable` tells
        which. For a connection that nobody uses.
        """
        over = self._loop.create_future()

        def take(message: aiohttp.WSMessage, type_: str) -> None:
            if not over.done() and (message.type in ENDINGS or not self.utterance.awaits_clear):
                over.set_result(None)

        self.attach(take)
        try:
            await self.send_str(TEXT_CLEAR, None)
            if self.utterance.awaits_clear:
                # What was read together with the acknowledgement is seen before this goes on: the
                # reader does not pause in between.
                await over
        except OSError:
            pass  # its reader hears of its end
        except Exception as fault:
            self._on_fault(fault)
        finally:
            self.detach()

    def close(self) -> asyncio.Task[None] | None:
        """Closes in the background: a Close frame, `close_timeout` for the answer, then abort.

        Returns:
            The task that does it; None if the peer has closed it already.
        """
        if self.state is State.OPEN:
            self.state = State.CLOSING
        if self.ws.closed:
            self._abort()
        elif self._closer is None:
            self._closer = spawn(self._shut(), name="xai_pool_patch.close")
        return self._closer

    async def _shut(self) -> None:
        # Not wait_for(): before Python 3.12 it makes a task that a closing loop complains of.
        closing = spawn(self.ws.close(), name="xai_pool_patch.close_frame")
        try:
            done, _ = await asyncio.wait([closing], timeout=self._close_timeout)
        finally:
            if not self._loop.is_closed():
                closing.cancel()
                self._abort()
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                tell(Event.CLOSE_FAILED, error=describe(error))
        await asyncio.wait([self._reader])

    def _abort(self) -> None:
        # A peer that answered has nothing more to say, and one that did not would keep the TLS
        # layer waiting for its goodbye.
        if self._transport is not None:
            # Closed twice, a TLS transport has nothing left to abort. Python 3.11.2 raises there.
            with contextlib.suppress(AttributeError):
                self._transport.abort()

    async def _read(self) -> None:
        try:
            await self.ping()  # so that the round trip is known before it matters
            while self.state is State.OPEN:
                await self._handle(await self.ws.receive())
        except OSError:  # a PING or PONG into a socket that has just died
            self._lose()
        except Exception as fault:
            self._on_fault(fault)
            self._lose()
        finally:
            # Cancelled, the loop is ending: nobody is told, lest a new connection be dialled.
            if self.state is State.OPEN:
                self.state = State.LOST
            with contextlib.suppress(Exception):  # the sink may be what is at fault
                self._deliver(CLOSED_MESSAGE)

    async def _handle(self, message: aiohttp.WSMessage) -> None:
        if message.type in ENDINGS:
            if isinstance(message.data, aiohttp.ServerTimeoutError) and self.round_trip is None:
                self._heartbeat.unanswered()
            self._deliver(message)
            self._lose()
            return
        self.last_heard = self._loop.time()
        if message.type is WSMsgType.PING:
            await self.ws.pong(message.data)
        elif message.type is WSMsgType.PONG:
            token = bytes(message.data)
            pinged_at = self._pinged_at.pop(token, None)
            if pinged_at is not None:
                self.round_trip = self.last_heard - pinged_at
                self._heartbeat.answered()
            if token == self._fence:
                self._fence = None
        else:
            self._take(message)

    def _take(self, message: aiohttp.WSMessage) -> None:
        type_ = type_of(message.data)
        is_early = self._fence is not None and type_.startswith("audio.")
        may_be_heard = self.utterance.received(type_) and not is_early
        is_idle_and_spoiled = self._sink is None and self.utterance.stage is Stage.SPOILED
        if not may_be_heard or is_idle_and_spoiled:
            self.broke_word = not may_be_heard and self.utterance.was_cleared
            self._lose()
            return
        if self._sink is None:
            # What the server writes there is not known, and may be anything.
            kind = type_ if IDENTIFIER.fullmatch(type_) else "?"
            tell(Event.IGNORED, message_type=kind)
        self._deliver(message, type_)

    def _deliver(self, message: aiohttp.WSMessage, type_: str = "") -> None:
        if self._sink is not None:
            self._sink(message, type_)

    def _lose(self) -> None:
        if self.state is State.OPEN:
            self.state = State.LOST
            if self.on_lost is not None:
                self.on_lost()


def _transport_of(ws: aiohttp.ClientWebSocketResponse) -> asyncio.WriteTransport | None:
    """aiohttp has no public way to it, and none to abort a connection."""
    connection = getattr(getattr(ws, "_response", None), "connection", None)
    return getattr(connection, "transport", None)
