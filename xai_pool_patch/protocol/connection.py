"""A WebSocket that is read for its whole life, checked by PINGs, and closed in the background."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import WSMsgType

from ..pool.soft_timeout import SoftTimeout
from ..pool.supervisor import CLOSE_TIMEOUT, Supervisor, within
from ..sessions.refusal import says_refused
from ..telemetry.log import LogEvent, log_event
from .host import Host
from .utterance import SPEAKING, UNHEARD, Stage, UtteranceTracker, parsed, type_of

IDENTIFIER = re.compile(r"[a-z_]{1,20}(\.[a-z_]{1,20})?")
DATA = (WSMsgType.TEXT, WSMsgType.BINARY)
CLOSED_MESSAGE = aiohttp.WSMessage(WSMsgType.CLOSED, None, None)

CLOSE_COUNTS = 1.0
"""Seconds after which a Close frame has reached the peer, though it has not answered."""

FRESH = 5.0
"""Seconds after the handshake in which a Close is the server's answer to it."""

TEXT_CLEAR = '{"type":"text.clear"}'

Sink = Callable[[aiohttp.WSMessage, str], None]
"""Takes a message that the reader has read, and the type that its JSON names."""


class State(enum.Enum):
    OPEN = "open"
    LOST = "lost"
    """The peer ended the connection, or sent something unasked."""
    CLOSING = "closing"
    """The pool closes the connection."""


@dataclass(eq=False)
class _Probe:
    """A PING that left just ahead of an utterance's first text. See `Connection.probe`."""

    token: bytes
    separates: bool
    """What comes before its PONG may be of an older utterance."""
    timeout: SoftTimeout
    is_answered: bool = False


@dataclass(eq=False)
class Connection:
    """A WebSocket with one reader for its whole life.

    The reader answers PINGs and notices a peer that goes away, also while the connection is idle.
    The sink of the lease gets everything else. The WebSocket must have been opened with
    `autoping=False`, so that PINGs and PONGs reach the reader.

    Attributes:
        sink: takes what the reader reads; None while the connection is idle.
        reader: the task that reads.
        last_heard: when the last message came, a PONG included; time of the event loop.
        round_trip: seconds that the last PONG took; None while none has come.
        sent_stale_audio: the server acknowledged a clear, and yet sent more of the cleared
            utterance.
        is_given_away: the application uses it, and hears whatever comes.
    """

    ws: aiohttp.ClientWebSocketResponse
    supervisor: Supervisor
    """Owns the tasks and timers."""
    host: Host
    """What is known about the server. It learns from this connection."""
    heartbeat: float
    """See `PoolOptions.heartbeat`."""
    is_shared: bool
    """Several TTS instances may use it."""
    on_refused: Callable[[], None]
    """Called if the server's first answer says that there are too many sessions."""

    def __post_init__(self) -> None:
        self.utterance = UtteranceTracker()
        self.state = State.OPEN
        self.on_lost: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._opened_at = self.last_heard = self._loop.time()
        self.round_trip: float | None = None
        self.sent_stale_audio = False
        self.is_given_away = False
        self.sink: Sink | None = None
        self._has_answered = False
        self._pinged_at: dict[bytes, float] = {}
        self._probe: _Probe | None = None
        self._held: aiohttp.WSMessage | None = None
        """An `audio.done` that came ahead of any audio, and of the probe's PONG."""
        self._closer: asyncio.Task[None] | None = None
        self._close_sent_at = math.inf
        self._sign_of_life: asyncio.Future[None] = self._loop.create_future()
        self._response = getattr(self.ws, "_response", None)
        self._transport = transport_of(self.ws)
        self._beat_at(self._opened_at + self.heartbeat)
        self.reader = self.supervisor.spawn(self._read(), name="xai_pool_patch.reader")

    def __repr__(self) -> str:
        use = "leased" if self.sink is not None else "idle"
        return f"<Connection {self.state.value} {use} {self.utterance.stage.value}>"

    @property
    def is_reusable(self) -> bool:
        utterance = self.utterance
        is_clean = self.state is State.OPEN and utterance.stage is Stage.CLEAN
        is_trusted = not (utterance.was_cleared and self.host.pongs_unordered)
        is_as_made = not (utterance.was_configured and self.is_shared)
        return is_clean and is_trusted and is_as_made

    @property
    def clear_round_trip(self) -> float | None:
        """None if PONGs cannot show that nothing more comes of a cleared utterance."""
        return None if self.host.pongs_unordered else self.round_trip

    @property
    def is_in_step(self) -> bool:
        """Whatever comes now answers the current utterance, not an older one."""
        return self._probe is None or not self._probe.separates or self._probe.is_answered

    def detach(self) -> None:
        """Pass nothing on any more."""
        self.sink = None
        self._end_probe()

    async def ping(self) -> None:
        """Send a PING. Its PONG sets `last_heard` and `round_trip`."""
        await self.ws.ping(self._new_token())

    def _new_token(self) -> bytes:
        now = self._loop.time()
        token = repr(now).encode()
        self._pinged_at = {token: now}
        return token

    async def probe(self, on_silence: Callable[[], object]) -> None:
        """Send a PING just ahead of an utterance's first text, on a connection that was idle.

        It asks for a sign of life: `on_silence` is called if nothing at all comes in time. And it
        separates old audio from new: what comes before its PONG may have left the server before the
        text arrived there (`is_in_step`). Only an `audio.done` by itself is no audio: it waits for
        the PONG or the end of that time, and is then either overtaken by audio or the answer.

        A server whose PONGs are known to come out of order is only asked for a sign of life, and
        one that has never answered a PING is asked for nothing.
        """
        token = self._new_token()
        if self.round_trip is not None:
            separates = not (self.utterance.is_unused or self.host.pongs_unordered)
            on_end = functools.partial(self._probe_over, self._loop.time(), on_silence)
            timeout = SoftTimeout(self.supervisor, self.host.patience(self.round_trip), on_end)
            self._end_probe()
            self._probe = _Probe(token, separates, timeout)
        await self.ws.ping(token)

    def _probe_over(self, began: float, on_silence: Callable[[], object]) -> None:
        held, self._held = self._held, None
        if held is not None and self.utterance.stage in (Stage.AWAITING, Stage.EMPTY):
            self._end_probe()
            self._accept(held, "audio.done")
            # If it was of an older utterance, the answer is still to come. The next utterance must
            # not get it.
            self.utterance.stage = Stage.DIRTY
            self.host.held_an_end()
        elif self.last_heard <= began:
            on_silence()

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.timeout.stop()
        self._probe = self._held = None

    async def clear(self) -> None:
        """Send a `text.clear`: the server cancels the current utterance.

        Returns when the acknowledgement has come, or cannot come any more. `is_reusable` says
        which. The connection must not be leased.
        """
        over = self._loop.create_future()

        def take(message: aiohttp.WSMessage, type_: str) -> None:
            is_clearing = message.type in DATA and self.utterance.stage is Stage.CLEARING
            if not is_clearing and not over.done():
                over.set_result(None)

        self.sink = take
        try:
            self.utterance.sent(TEXT_CLEAR)
            await self.ws.send_str(TEXT_CLEAR)
            if self.utterance.stage is Stage.CLEARING:
                # The reader does not pause between messages that arrived together. So audio that
                # came right behind the acknowledgement is judged before this task runs again, and
                # such a connection is not handed out.
                await over
        except OSError:
            pass  # the reader reports the end
        finally:
            self.detach()

    def close(self, *, listen: bool = False) -> asyncio.Task[None] | None:
        """Send a Close frame in the background, wait up to `CLOSE_TIMEOUT`, then abort.

        Args:
            listen: first wait as long for a sign of life, from which `host` learns how patient it
                has to be.

        Returns:
            The task that does so; None if the peer has closed the socket already.
        """
        if self.state is State.OPEN:
            self.state = State.CLOSING
        if self._closer is not None:
            return self._closer
        # Without its transport no Close frame can leave. aiohttp 3.10 calls that WebSocket open.
        is_cut = self._transport is not None and self._transport.is_closing()
        if self.ws.closed or is_cut:
            self._abort()
            if self._response is not None:
                self._response.close()  # aiohttp does that only once the end has been read
            return None
        if not listen:
            # Not in `_shut`, a step later: the wait for `CLOSE_COUNTS` begins now.
            self._close_sent_at = self._loop.time()
        self._closer = self.supervisor.spawn(self._shut(listen), name="xai_pool_patch.close")
        return self._closer

    def abort_if_closing(self) -> None:
        """Give up waiting for the peer's Close, if ours has most likely arrived."""
        if self._loop.time() >= self._close_sent_at + CLOSE_COUNTS:
            self._abort()

    async def _shut(self, listen: bool) -> None:
        if listen:
            await asyncio.wait([self._sign_of_life], timeout=CLOSE_TIMEOUT)
            self._close_sent_at = self._loop.time()
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(CLOSE_TIMEOUT, self._send_close(), "xai_pool_patch.close_frame")
        finally:
            if not self._loop.is_closed():
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

    # While nothing is heard

    def _beat_at(self, when: float) -> None:
        self._beat_timer = self.supervisor.call_at(when, self._beat)

    def _beat(self) -> None:
        """Send a PING if nothing has been heard for an interval.

        aiohttp's own heartbeat sets a timer anew for each message.
        """
        now, due = self._loop.time(), self.last_heard + self.heartbeat
        if now < due:
            self._beat_at(due)
            return
        self.supervisor.spawn(self._ping_quietly(), name="xai_pool_patch.heartbeat")
        SoftTimeout(self.supervisor, self.heartbeat / 2, functools.partial(self._beat_over, now))

    async def _ping_quietly(self) -> None:
        with contextlib.suppress(OSError):  # the reader reports the end
            await self.ping()

    def _beat_over(self, began: float) -> None:
        if self.reader.done():
            return
        if self.last_heard <= began and self.host.answers_pings:
            self._lose()
            self._abort()
        else:
            self._beat_at(self._loop.time() + self.heartbeat / 2)

    # Reading

    async def _read(self) -> None:
        try:
            await self.ping()  # so that the round trip is known before the first probe
            while True:
                message = await self.ws.receive()
                self.last_heard = self._loop.time()
                if message.type in DATA:
                    self._take(message)
                elif message.type is WSMsgType.PING:
                    await self.ws.pong(message.data)
                elif message.type is WSMsgType.PONG:
                    self._take_pong(bytes(message.data))
                else:
                    self._take_end(message)
                    break
        except OSError:  # a PING or PONG into a socket that has just died
            self._lose()
        finally:
            # No `on_lost` here. If the reader was cancelled, the loop is ending, and the pool would
            # dial a new connection on it.
            if self.state is State.OPEN:
                self.state = State.LOST
            self._beat_timer.cancel()
            self._gave_a_sign()  # or never will
            self._deliver(CLOSED_MESSAGE)
        self.supervisor.sockets.discard(self.ws)

    def _take_end(self, message: aiohttp.WSMessage) -> None:
        if message.type is WSMsgType.CLOSE and says_refused(message.data):
            self._says_refused()
        self._deliver(message)
        self._lose()

    def _says_refused(self) -> None:
        """The server says that there are too many sessions. Only as its first answer it counts."""
        is_young = self._loop.time() < self._opened_at + FRESH
        is_fresh = self.utterance.is_first or (self.utterance.is_unused and is_young)
        if is_fresh and not self._has_answered:
            self.on_refused()

    def _take_pong(self, token: bytes) -> None:
        pinged_at = self._pinged_at.pop(token, None)
        if pinged_at is not None:
            self.round_trip = self.last_heard - pinged_at
            self.host.answered(self.round_trip)
            self._gave_a_sign()
        if self._probe is not None and token == self._probe.token:
            self._probe.is_answered = True
            if self._held is None:
                self.host.was_in_order()

    def _gave_a_sign(self) -> None:
        if not self._sign_of_life.done():
            self._sign_of_life.set_result(None)

    def _take(self, message: aiohttp.WSMessage) -> None:
        type_ = type_of(message.data)
        is_more = type_ == "audio.delta" and self.utterance.stage in SPEAKING
        if is_more and self.sink is not None:
            self.sink(message, type_)  # the most frequent message changes nothing
            return
        if self.state is not State.OPEN:
            for pinged_at in self._pinged_at.values():  # it was evicted for its silence
                self.host.answered(self.last_heard - pinged_at)
            self._gave_a_sign()
            return
        if type_ == "error" and says_refused(error_message=parsed(message.data).get("message")):
            self._says_refused()
        self._has_answered = True
        is_answer = type_.startswith("audio.")
        # A PING left ahead of the utterance: its PONG is due first.
        is_due = self.round_trip is None if self._probe is None else not self._probe.is_answered
        if is_answer and self.utterance.is_first and is_due:
            self.host.pongs_unordered = True
        if not (is_answer and self._hold(message, type_)):
            self._accept(message, type_)

    def _hold(self, message: aiohttp.WSMessage, type_: str) -> bool:
        """Keep an `audio.done` that comes by itself, until it is known what it answers."""
        if self.is_in_step:
            self._end_probe()  # what was held is older than this
        elif type_ == "audio.done" and self.utterance.stage in UNHEARD:
            self._held = message
            return True
        return False

    def _accept(self, message: aiohttp.WSMessage, type_: str) -> None:
        is_out_of_step = type_.startswith("audio.") and not self.is_in_step
        self.sent_stale_audio |= is_out_of_step and self.utterance.was_cleared
        if is_out_of_step or self.is_given_away:
            self._deliver(message, type_)  # the exchange gives a connection out of step up
            return
        is_asked_for = self.utterance.received(type_)
        is_idle_and_dirty = self.sink is None and self.utterance.stage is Stage.DIRTY
        if not is_asked_for or is_idle_and_dirty:
            self.sent_stale_audio |= not is_asked_for and self.utterance.was_cleared
            self._lose()
        elif self.sink is None:
            # The type comes from the server and may be anything, so only plain words are logged.
            kind = type_ if IDENTIFIER.fullmatch(type_) else "?"
            log_event(LogEvent.IGNORED, message_type=kind)
        else:
            self._deliver(message, type_)

    def _deliver(self, message: aiohttp.WSMessage, type_: str = "") -> None:
        if self.sink is not None:
            self.sink(message, type_)

    def _lose(self) -> None:
        if self.state is State.OPEN:
            self.state = State.LOST
            self._end_probe()
            if self.on_lost is not None:
                self.on_lost()


def transport_of(ws: aiohttp.ClientWebSocketResponse) -> asyncio.WriteTransport | None:
    """The transport, which is needed to abort: aiohttp has no public way to do either."""
    connection = getattr(getattr(ws, "_response", None), "connection", None)
    return getattr(connection, "transport", None)
