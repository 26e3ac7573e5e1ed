"""A WebSocket that is read for its whole life, checked by PINGs, and closed in the background."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import WSMsgType

from ..pool.soft_timeout import SoftTimeout
from ..pool.supervisor import Supervisor
from ..telemetry.log import LogEvent, log_event
from .utterance import Stage, UtteranceTracker, type_of

IDENTIFIER = re.compile(r"[a-z_]{1,20}(\.[a-z_]{1,20})?")
ENDINGS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
CLOSED_MESSAGE = aiohttp.WSMessage(WSMsgType.CLOSED, None, None)

SUSPICIOUS = 2
"""The heartbeat stops after so many connections in a row that ended without a PONG. A single one
may have lost its peer."""

SAYS_RATE_LIMITED = re.compile(
    r"(session|connection|concurren|rate|request)\w*\W+(\w+\W+)?limit"
    r"|too many|limit (was )?(reached|exceeded)",
    re.IGNORECASE,
)
"""In the text of an error frame. xAI documents neither a text nor a code for it."""

TEXT_CLEAR = '{"type":"text.clear"}'

Sink = Callable[[aiohttp.WSMessage, str], None]
"""Takes a message that the reader has read, and the type that its JSON names."""


class State(enum.Enum):
    OPEN = "open"
    LOST = "lost"
    """The peer ended the connection, or sent something that nobody asked for."""
    CLOSING = "closing"
    """The pool closes the connection."""


@dataclass(eq=False)
class _Fence:
    """See `Connection.ping_as_fence`."""

    token: bytes
    soft_timeout: SoftTimeout
    is_overdue: bool = False
    """The PONG took so long that it no longer separates old audio from new."""
    held: list[tuple[aiohttp.WSMessage, str]] = field(default_factory=list)
    """Audio that came before the PONG, with its type."""


class Heartbeat:
    """The PINGs by which aiohttp finds a peer that has vanished: it ends the connection.

    If a server answers no PING at all, new connections send none. Otherwise aiohttp would end one
    connection after the other without a Close frame, and the server would count each as a session
    long after. A PONG on any connection starts the heartbeat again.

    Args:
        interval: see `PoolOptions.heartbeat`.

    Attributes:
        are_late: a PING left ahead of a text, and its PONG came after the answer to that text, or
            never. PONGs of this server do not show which utterance an answer is for.
    """

    def __init__(self, interval: float) -> None:
        self.are_late = False
        self._interval = interval
        self._unanswered = 0

    @property
    def interval(self) -> float | None:
        """Seconds between the PINGs of the next connection; None for no PINGs."""
        return self._interval if self._unanswered < SUSPICIOUS else None

    def answered(self) -> None:
        """A PONG came."""
        self._unanswered = 0

    def unanswered(self) -> None:
        """A connection ended that never got a PONG."""
        self._unanswered += 1
        if self._unanswered == SUSPICIOUS:
            log_event(LogEvent.PINGS_UNANSWERED)


class Connection:
    """A WebSocket with one reader for its whole life.

    The reader answers PINGs and notices a peer that goes away, also while the connection is idle.
    The sink of the lease gets everything else. The WebSocket must have been opened with
    `autoping=False`, so that PINGs and PONGs reach the reader.

    Args:
        supervisor: owns the tasks.
        heartbeat: learns whether PINGs are answered.
        close_timeout: seconds the peer has to answer a Close frame.
        on_rate_limited: called for an error frame that says that there are too many sessions.

    Attributes:
        sink: takes what the reader reads; None while the connection is idle.
        reader: the task that reads.
        unhandled: the message that the reader has read and not passed on yet.
        last_heard: when the last message came, a PONG included; time of the event loop.
        round_trip: seconds that the last PONG took; None while none has come.
        sent_stale_audio: the server acknowledged a clear, and yet sent more of the cleared
            utterance.
    """

    def __init__(
        self,
        ws: aiohttp.ClientWebSocketResponse,
        *,
        supervisor: Supervisor,
        heartbeat: Heartbeat,
        close_timeout: float,
        on_rate_limited: Callable[[], None],
    ) -> None:
        self.ws = ws
        self._supervisor = supervisor
        self._heartbeat = heartbeat
        self.utterance = UtteranceTracker()
        self.state = State.OPEN
        self.on_lost: Callable[[], None] | None = None
        self.on_stale_audio: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self.last_heard = self._loop.time()
        self.round_trip: float | None = None
        self.sent_stale_audio = False
        self.sink: Sink | None = None
        self.unhandled: aiohttp.WSMessage | None = None
        self._pinged_at: dict[bytes, float] = {}
        self._fence: _Fence | None = None
        self._close_timeout = close_timeout
        self._on_rate_limited = on_rate_limited
        self._closer: asyncio.Task[None] | None = None
        self._transport = transport_of(ws)
        self.reader = supervisor.spawn(self._read(), name="xai_pool_patch.reader")

    def __repr__(self) -> str:
        use = "leased" if self.sink is not None else "idle"
        return f"<Connection {self.state.value} {use} {self.utterance.stage.value}>"

    @property
    def is_reusable(self) -> bool:
        return self.state is State.OPEN and self.utterance.is_clean

    @property
    def is_over(self) -> bool:
        """The reader has ended."""
        return self.reader.done()

    def attach(self, sink: Sink) -> None:
        """Pass everything that is read from now on to a sink."""
        self.sink = sink

    def detach(self) -> None:
        """Pass nothing on any more."""
        self.sink = None
        self._lift_fence()

    async def ping(self) -> None:
        """Send a PING. Its PONG sets `last_heard` and `round_trip`."""
        await self.ws.ping(self._new_token())

    def _new_token(self) -> bytes:
        now = self._loop.time()
        token = repr(now).encode()
        self._pinged_at = {token: now}
        return token

    async def ping_as_fence(self, timeout: float) -> None:
        """Send a PING ahead of an utterance's first text, to separate old audio from new.

        Audio that comes before the PONG left the server before the text arrived there. The
        connection holds such audio, and drops it when the PONG comes. If no PONG comes within
        `timeout`, the plugin hears the held audio, and PINGs to this server are not used as fences
        any more. The same follows if audio comes before the PONG of a connection's first utterance,
        where no audio can be old.

        After a clear the connection is stricter: it passes on no audio without a PONG. Only the
        acknowledgement says that nothing more comes of the cleared utterance, and the PONG is the
        only check of that.
        """
        token = self._new_token()
        if self._trusts_pongs or self.utterance.was_cleared:
            on_end = self._fence_timed_out
            self._fence = _Fence(token, SoftTimeout(self._supervisor, timeout, on_end))
        await self.ws.ping(token)

    def sending(self, frame: object) -> None:
        """Follow a frame that is about to be sent.

        Call this before the send: a send that is cancelled may have left all the same.
        """
        self.utterance.sent(frame)

    async def clear(self) -> None:
        """Send a `text.clear`: the server cancels the current utterance, or owes nothing already.

        Returns when the acknowledgement has come, or cannot come any more. `is_reusable` says
        which. The connection must not be leased.
        """
        over = self._loop.create_future()

        def take(message: aiohttp.WSMessage, type_: str) -> None:
            if not over.done() and (message.type in ENDINGS or not self.utterance.awaits_clear):
                over.set_result(None)

        self.attach(take)
        try:
            self.sending(TEXT_CLEAR)
            await self.ws.send_str(TEXT_CLEAR)
            if self.utterance.awaits_clear:
                # The reader does not pause between messages that arrived together. So audio that
                # came right behind the acknowledgement is judged before this task runs again, and
                # such a connection is not handed out.
                await over
        except OSError:
            pass  # the reader reports the end
        finally:
            self.detach()

    def close(self) -> asyncio.Task[None] | None:
        """Send a Close frame in the background, wait up to `close_timeout`, then abort.

        Returns:
            The task that does so; None if the peer has closed the socket already.
        """
        if self.state is State.OPEN:
            self.state = State.CLOSING
        if self.ws.closed:
            self._abort()
        elif self._closer is None:
            self._closer = self._supervisor.spawn(self._shut(), name="xai_pool_patch.close")
        return self._closer

    async def _shut(self) -> None:
        # Not wait_for(): before Python 3.12 it makes a task of its own, and a loop that is closed
        # in the meantime complains about that task.
        closing = self._supervisor.spawn(self._send_close(), name="xai_pool_patch.close_frame")
        try:
            await asyncio.wait([closing], timeout=self._close_timeout)
        finally:
            if not self._loop.is_closed():
                closing.cancel()
                self._abort()
        await asyncio.wait([self.reader])

    async def _send_close(self) -> None:
        try:
            await self.ws.close()
        except Exception as error:  # whatever it is, `_abort` follows
            log_event(LogEvent.CLOSE_FAILED, error=error)

    def _abort(self) -> None:
        # A peer that answered the Close frame sends nothing more. For one that did not, the TLS
        # layer would wait for the end of its own handshake.
        if self._transport is not None:
            # A TLS transport that is closed already has nothing to abort. Python 3.11.2 raises.
            with contextlib.suppress(AttributeError):
                self._transport.abort()

    async def _read(self) -> None:
        try:
            await self.ping()  # so that the round trip is known before the first probe
            while self.state is State.OPEN:
                self.unhandled = await self.ws.receive()
                await self._handle(self.unhandled)
                self.unhandled = None
        except OSError:  # a PING or PONG into a socket that has just died
            self._lose()
        except Exception as fault:
            self._supervisor.on_fault("reading", fault)
            return  # the supervisor keeps the socket: an utterance may go on over it
        finally:
            # No `on_lost` here. If the reader was cancelled, the loop is ending, and the pool would
            # dial a new connection on it.
            if self.state is State.OPEN:
                self.state = State.LOST
            self._deliver(CLOSED_MESSAGE)
        self._supervisor.sockets.discard(self.ws)

    async def _handle(self, message: aiohttp.WSMessage) -> None:
        if message.type in ENDINGS:
            if isinstance(message.data, aiohttp.ServerTimeoutError) and self.round_trip is None:
                self._heartbeat.unanswered()
            self._lift_fence()
            self._deliver(message)
            self._lose()
            return
        self.last_heard = self._loop.time()
        if message.type is WSMsgType.PING:
            await self.ws.pong(message.data)
        elif message.type is WSMsgType.PONG:
            self._take_pong(bytes(message.data))
        else:
            self._take(message, type_of(message.data))

    def _take_pong(self, token: bytes) -> None:
        pinged_at = self._pinged_at.pop(token, None)
        if pinged_at is not None:
            self.round_trip = self.last_heard - pinged_at
            self._heartbeat.answered()
        if self._fence is not None and token == self._fence.token:
            was_stale = bool(self._fence.held)
            self._lift_fence()
            self.utterance.is_unambiguous = True
            if was_stale:
                self._dropped_stale_audio()

    def _take(self, message: aiohttp.WSMessage, type_: str) -> None:
        if type_ == "audio.delta" and self.utterance.is_first and self._awaits_early_pong:
            self._heartbeat.are_late = True
            self._lift_fence()
        if self._fence is not None and type_.startswith("audio."):
            if self._trusts_pongs and not self._fence.is_overdue:
                self._fence.held.append((message, type_))
            else:
                self._distrust()
            return
        if type_ == "error" and SAYS_RATE_LIMITED.search(message.data):
            self._on_rate_limited()
        may_be_heard = self.utterance.received(type_)
        is_idle_and_dirty = self.sink is None and self.utterance.stage is Stage.DIRTY
        if not may_be_heard and self.utterance.was_cleared:
            self._distrust()
        elif not may_be_heard or is_idle_and_dirty:
            self._lose()
        elif self.sink is None:
            # The type comes from the server and may be anything, so only plain words are logged.
            kind = type_ if IDENTIFIER.fullmatch(type_) else "?"
            log_event(LogEvent.IGNORED, message_type=kind)
        else:
            self._deliver(message, type_)

    @property
    def _trusts_pongs(self) -> bool:
        return self.round_trip is not None and not self._heartbeat.are_late

    @property
    def _awaits_early_pong(self) -> bool:
        """A PING left ahead of the utterance, and its PONG has not come yet."""
        return self._fence is not None or self.round_trip is None

    def _fence_timed_out(self) -> None:
        fence = self._fence
        if fence is None:
            return
        self._heartbeat.are_late |= bool(fence.held)
        if self.utterance.was_cleared:
            fence.is_overdue = True
            if fence.held:
                self._distrust()
            return
        self._lift_fence()
        for message, type_ in fence.held:
            self._take(message, type_)

    def _lift_fence(self) -> None:
        if self._fence is not None:
            self._fence.soft_timeout.stop()
            self._fence = None

    def _dropped_stale_audio(self) -> None:
        log_event(LogEvent.STALE_AUDIO)
        if self.utterance.was_cleared and self.on_stale_audio is not None:
            self.on_stale_audio()

    def _distrust(self) -> None:
        """Give the connection up: audio of a cleared utterance came, or may have come."""
        self.sent_stale_audio = True
        self._lose()

    def _deliver(self, message: aiohttp.WSMessage, type_: str = "") -> None:
        if self.sink is not None:
            self.sink(message, type_)

    def _lose(self) -> None:
        if self.state is State.OPEN:
            self.state = State.LOST
            self._lift_fence()
            if self.on_lost is not None:
                self.on_lost()


def transport_of(ws: aiohttp.ClientWebSocketResponse) -> asyncio.WriteTransport | None:
    """The transport, which is needed to abort: aiohttp has no public way to do either."""
    connection = getattr(getattr(ws, "_response", None), "connection", None)
    return getattr(connection, "transport", None)
