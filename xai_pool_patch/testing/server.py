"""A fake of xAI's streaming TTS: the real wire protocol, made-up audio, faults on demand.

Clients reach it as `wss://api.x.ai/v1/tts` through `FakeServer.client_session()`, over real sockets
and real TLS, by way of a `SlowNetwork`. Everything runs on 127.0.0.1 and in the event loop of the
caller, who may look at the records at any time. All times are loop times, in seconds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import enum
import functools
import json
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.abc import AbstractResolver, ResolveResult

from .network import HOST, Route, SlowNetwork, reset_transport

try:
    import trustme
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the fake server needs trustme: pip install "xai_pool_patch[testing]"', name="trustme"
    ) from error

SERVER_NAME = "api.x.ai"
PATH = "/v1/tts"
SAMPLE_RATE = 24_000
BYTES_PER_SECOND = 2 * SAMPLE_RATE
HIGHEST_SAMPLE = 32_766
SWITCHING_PROTOCOLS = 101
CLOSE_TIMEOUT = 1.0
"""Seconds the server waits for the answer to its Close frame before it drops the connection."""


class End(enum.Enum):
    """How a connection ended."""

    CLIENT_CLOSE = "the client sent a Close frame"
    CLIENT_DROPPED = "EOF or reset by the client, without a Close frame"
    SERVER_CLOSE = "the server sent a Close frame"
    SERVER_RESET = "the server reset it"
    SERVER_SILENT = "the server is gone and the client did not notice"
    PING_TIMEOUT = "the client did not answer a PING, and was reset"
    SHUTDOWN = "the fake server stopped"


class Ending(enum.Enum):
    """How the server ends a connection, where `Behaviour` can choose."""

    CLOSE = End.SERVER_CLOSE
    RESET = End.SERVER_RESET
    SILENT = End.SERVER_SILENT


class Outcome(enum.Enum):
    """What became of an utterance."""

    UNDER_WAY = "under way"
    FINISHED = "audio.done was sent"
    CLEARED = "cancelled by text.clear"
    FAILED = "answered with an error frame"
    CUT_OFF = "the connection ended first"


class Clearing(enum.Enum):
    """What the server does about `text.clear`."""

    ACKNOWLEDGED = "it stops speaking and says audio.clear, as documented"
    IGNORED = "nothing"
    REFUSED = "it says that it does not know the message, and speaks on"
    LATE = "it speaks on, and does as documented only after `clear_delay`"
    CROSSED = "it has just finished the utterance: audio.done comes, and audio.clear behind it"
    LEAKING = "it does as documented, and after `clear_delay` more audio of the utterance comes"


class Refusal(enum.Enum):
    """How a client learns that no session is left for it."""

    TOO_MANY_REQUESTS = "HTTP 429 at the handshake"
    UNAVAILABLE = "HTTP 503 at the handshake"
    ERROR_FRAME = "the handshake succeeds; an error frame comes, then a Close frame"

    @property
    def status(self) -> int:
        """The HTTP status of the handshake."""
        return _STATUS_OF_REFUSAL[self]


_STATUS_OF_REFUSAL = {
    Refusal.TOO_MANY_REQUESTS: 429,
    Refusal.UNAVAILABLE: 503,
    Refusal.ERROR_FRAME: SWITCHING_PROTOCOLS,
}


class Wordless(enum.Enum):
    """What the server does about an utterance of nothing but blanks and punctuation."""

    SPOKEN = "each character is as long as any other"
    DONE = "audio.done without any audio"
    SILENCE = "a chunk of zeros"
    REFUSED = "an error frame"


@dataclass
class Behaviour:
    """How the server behaves. Every field may be changed while it runs, with effect at once.

    The defaults are a server that works, at about the speed of xAI's.
    """

    generation: float = 0.31
    """Seconds from an utterance's first message to its first audio.delta."""
    pace: float = 5.0
    """Seconds of audio sent per second."""
    speech_per_character: float = 0.06
    """Seconds of audio per character of text."""
    chunk: float = 0.1
    """Seconds of audio per audio.delta, at most; rounded to an odd number of bytes."""

    api_key: str = field(default="fake-api-key", repr=False)
    """The only key that is accepted; any other gets 401."""
    voices: set[str] | None = None
    """The voices that are accepted, any other gets 400; None accepts all."""
    max_sessions: int | None = None
    """The sessions that a team has, see `FakeServer.session_count`; None for any number."""
    refusal: Refusal = Refusal.TOO_MANY_REQUESTS
    """What a client gets when no session is left."""
    permit_ttl: float = 0.0
    """Seconds for which a session still counts that ended without a Close frame."""
    retry_after: int | None = None
    """Seconds that the Retry-After header of a refusal above `max_sessions` names."""
    close_frees_after: float = 0.0
    """Seconds for which a session still counts after the client's Close."""
    max_utterances: int | None = None
    """Utterances under way above which the first text of another gets an error frame."""
    refuse: int | None = None
    """The HTTP status that every handshake gets."""
    refuse_next: list[int] = field(default_factory=list)
    """The HTTP statuses that the next handshakes get, one each: `[503] * 3` refuses three."""
    handshake_delay: float = 0.0
    """Seconds before a handshake is answered, refused ones included."""

    answer_pings: bool = True
    """Whether the client's PINGs are answered."""
    pong_delay: float = 0.0
    """Seconds by which the answer to a PING is late."""
    edge_distance: float = 0.0
    """Seconds that a message takes from an edge, which answers the PINGs, to the server."""
    idle_death: float | None = None
    """Seconds without an utterance under way after which a connection answers PINGs and nothing
    else."""
    answer_close: bool = True
    """Whether the client's Close is answered. If not, the connection stays until it is dropped."""
    ping_interval: float | None = None
    """Seconds between PINGs; a client that has not answered one by the next is reset."""
    idle_limit: float | None = None
    """Seconds without an utterance under way after which `ending` is done to a connection."""
    ending: Ending = Ending.CLOSE
    """How `idle_limit` ends a connection."""
    deadline: float | None = None
    """Seconds after connecting when an error frame comes. From then on texts are not answered."""

    mute: bool = False
    """If true, utterances that begin now are read but not answered, and neither is text.clear."""
    error_on_text: str | None = None
    """The error message that answers an utterance's first text."""
    wordless: Wordless = Wordless.SPOKEN
    """What answers an utterance without a letter or a digit, after its text.done."""
    raw_before_audio: list[str | bytes] = field(default_factory=list, repr=False)
    """Text and binary frames sent verbatim before an utterance's first audio.delta."""
    end_before_audio: Ending | None = None
    """Ends the connection when the first audio.delta of an utterance is due, in its place."""
    end_after_audio: Ending | None = None
    """Ends the connection after the first audio.delta of an utterance."""
    late_audio: float | None = None
    """Seconds after audio.done when one more audio.delta of the same utterance comes."""
    stray_done: bool = False
    """Sends an audio.done when a connection opens."""
    clearing: Clearing = Clearing.ACKNOWLEDGED
    """What is done about a text.clear."""
    clear_delay: float = 0.0
    """Seconds; see `Clearing`. Audio leaks only until the client says something: from then on it
    could not be distinguished from what the client has asked for."""

    _on_change: Callable[[], None] | None = field(default=None, init=False, repr=False)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if self._on_change is not None:
            self._on_change()


@dataclass(eq=False)
class Handshake:
    """One attempt to connect, refused ones included.

    Attributes:
        number: its place in `FakeServer.handshakes`, from 1.
        at: when the request came, in loop time.
        query: of its URL: voice, language, codec and so on.
        status: the HTTP status of the answer, 101 if accepted. None before the answer, and when the
            client left before it.
    """

    number: int
    at: float
    query: dict[str, str]
    status: int | None = None


@dataclass(eq=False)
class Utterance:
    """One text, and its audio. Every sample of the audio has the value `number`.

    Attributes:
        number: its place in `FakeServer.utterances`, from 1.
        connection: the number of the connection that it came on.
        first_text_at: when its first message came, in loop time.
        text: what has come of it so far.
        text_done: whether text.done has come.
        first_audio_at: when its first audio.delta was sent, in loop time.
        outcome: what became of it.
        audio_bytes: how much audio was sent.
        replace: the pronunciations of its connection when it began; see `ServedConnection`.
    """

    number: int
    connection: int
    first_text_at: float
    text: str = ""
    text_done: bool = False
    first_audio_at: float | None = None
    outcome: Outcome = Outcome.UNDER_WAY
    audio_bytes: int = 0
    replace: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def finished(self) -> bool:
        """True when its audio.done was sent."""
        return self.outcome is Outcome.FINISHED

    @property
    def cut_off(self) -> bool:
        """True when the connection ended first."""
        return self.outcome is Outcome.CUT_OFF


@dataclass(eq=False)
class ServedConnection:
    """One accepted WebSocket.

    Attributes:
        number: its place in `FakeServer.connections`, from 1.
        opened_at: when it was accepted, in loop time.
        query: of its URL: voice, language, codec and so on.
        route: its way through the network. Freeze or reset it there.
        utterances: those that came on it, in order.
        ended: how it ended; None while it is open.
        ended_at: when it ended, in loop time.
        close_code: that of the first Close frame.
        pings_received: PINGs of the client.
        pongs_received: answers of the client to the server's PINGs.
        violations: what the client sent against the protocol, a sentence each.
        over_limit: whether it was refused by `Refusal.ERROR_FRAME`. It holds no session.
    """

    number: int
    opened_at: float
    query: dict[str, str]
    route: Route = field(repr=False)
    utterances: list[Utterance] = field(default_factory=list, repr=False)
    ended: End | None = None
    ended_at: float | None = None
    close_code: int | None = None
    pings_received: int = 0
    pongs_received: int = 0
    violations: list[str] = field(default_factory=list)
    over_limit: bool = False
    clears: int = 0
    """text.clear messages that have come."""
    leaks: int = 0
    """Times that audio came after the acknowledgement of one; see `Clearing.LEAKING`."""
    replace: dict[str, str] = field(default_factory=dict, repr=False)
    """The pronunciations that the last session.update asked for."""

    @property
    def is_open(self) -> bool:
        """True until either side has ended it."""
        return self.ended is None

    def holds_session(self, now: float, behaviour: Behaviour) -> bool:
        """Whether it counts as a session at the loop time `now`."""
        if self.over_limit:
            return False
        if self.ended is None or self.ended_at is None:
            return True
        lasts = {End.CLIENT_CLOSE: behaviour.close_frees_after, End.SERVER_CLOSE: 0.0}
        return now < self.ended_at + lasts.get(self.ended, behaviour.permit_ttl)


class FakeServer:
    """A fake xAI server, with a slow network in front; an async context manager.

    Use it and its client sessions in one event loop, that of the test: it answers only while its
    loop runs.

    Args:
        round_trip: seconds of the network; `network.round_trip` changes it later.
        behaviour: what the server does, `Behaviour()` by default.

    Attributes:
        behaviour: change its fields to change what the server does.
        network: the network in front of the server.
        handshakes: every attempt to connect, in order.
        connections: every connection that was accepted, in order.
        utterances: every utterance of all connections, in order.
        peak_open: the highest number of connections open at a time.
        peak_sessions: the highest `session_count`.
    """

    network: SlowNetwork

    def __init__(self, *, round_trip: float = 0.0, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour if behaviour is not None else Behaviour()
        self.handshakes: list[Handshake] = []
        self.connections: list[ServedConnection] = []
        self.utterances: list[Utterance] = []
        self.peak_open = 0
        self.peak_sessions = 0
        self._round_trip = round_trip
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sessions: set[_Session] = set()
        self._handlers: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        """All records, one a line."""
        records = [*self.handshakes, *self.connections, *self.utterances]
        summary = f"<FakeServer open={self.open_count} peak_open={self.peak_open}>"
        return "\n  ".join([summary, *map(repr, records)])

    async def __aenter__(self) -> FakeServer:
        self._loop = asyncio.get_running_loop()
        self._next_change: asyncio.Future[None] = self._loop.create_future()
        self.behaviour._on_change = self.note_change
        app = web.Application()
        app.router.add_get(PATH, self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0, ssl_context=_server_context()).start()
        self.network = SlowNetwork(
            self._runner.addresses[0][1], round_trip=self._round_trip, on_change=self.note_change
        )
        await self.network.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for session in list(self._sessions):
            session.end(End.SHUTDOWN)
        handlers = list(self._handlers)
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await self.network.close()
        await self._runner.cleanup()
        self.behaviour._on_change = None

    @property
    def url(self) -> str:
        """What the plugin connects to, without the query."""
        return f"wss://{SERVER_NAME}{PATH}"

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """A client's context that trusts the fake server's certificate, and no other."""
        # The system's certificates, which are loaded otherwise, take 0.04 s.
        return ssl.create_default_context(cadata=_authority().cert_pem.bytes().decode())

    @property
    def open_count(self) -> int:
        """Connections that are open now."""
        return sum(connection.is_open for connection in self.connections)

    def has_too_many_utterances(self, utterance: Utterance) -> bool:
        """Whether this one began while as many were under way as the behaviour allows."""
        limit = self.behaviour.max_utterances
        if limit is None:
            return False
        under_way = [each for each in self.utterances if each.outcome is Outcome.UNDER_WAY]
        return utterance in under_way[limit:]

    @property
    def session_count(self) -> int:
        """Sessions that count now: open connections, and those that ended less than `permit_ttl`
        ago without a Close frame, or less than `close_frees_after` ago with one."""
        now, behaviour = _now(), self.behaviour
        return sum(each.holds_session(now, behaviour) for each in self.connections)

    def client_session(self, **kwargs: Any) -> aiohttp.ClientSession:
        """An HTTP session for which every host name leads here; the caller closes it.

        Give it to the plugin: `xai.TTS(http_session=...)`. `kwargs` are those of aiohttp's
        `ClientSession`.

        Raises:
            RuntimeError: the server is not running, or only in a loop that is not.
        """
        self._check_answers()
        resolver = _Resolver(self.network.port, self._check_answers)
        connector = aiohttp.TCPConnector(resolver=resolver, ssl=self.ssl_context)
        return aiohttp.ClientSession(connector=connector, **kwargs)

    def utterance_for(self, text: str) -> Utterance:
        """The newest utterance that contains `text`; white space does not count.

        Raises:
            LookupError: there is none.
        """
        wanted = _without_space(text)
        for utterance in reversed(self.utterances):
            if wanted in _without_space(utterance.text):
                return utterance
        raise LookupError(f"no utterance with {text!r} in\n{self!r}")

    async def wait_for(
        self, predicate: Callable[[FakeServer], object], timeout: float = 5.0
    ) -> None:
        """Waits until `predicate(self)` is true; it is looked at after every change.

        Raises:
            TimeoutError: it was not true within `timeout` seconds. The message has all records.
            RuntimeError: the server is not running, or only in a loop that is not.
        """
        self._check_answers()
        give_up_at = _now() + timeout
        while not predicate(self):
            if _now() >= give_up_at:
                raise TimeoutError(f"not so within {timeout} s:\n{self!r}")
            await self.wait_for_change(until=give_up_at)

    async def close_all(self, code: int = 1000) -> None:
        """Sends a Close frame to every open connection; does not wait for the answers."""
        for session in list(self._sessions):
            session.end(End.SERVER_CLOSE, code)

    def reset_all(self) -> None:
        """Resets every open connection."""
        for session in list(self._sessions):
            session.end(End.SERVER_RESET)

    def mute_all(self) -> None:
        """Every open connection answers PINGs from here on, and nothing else."""
        for session in self._sessions:
            session.is_dead = True

    def freeze_all(self) -> None:
        """Makes every connection half-open: neither side receives anything from the other."""
        self.network.freeze()

    async def broadcast(self, frame: str | bytes) -> None:
        """Sends a text or binary frame on every open connection."""
        for session in list(self._sessions):
            await session.send(frame)

    def note_change(self) -> None:
        """Wakes all tasks that wait for a change of the records or of the behaviour."""
        self._next_change.set_result(None)
        # Not the running loop: a synchronous fixture may set a field while none runs.
        self._next_change = self._next_change.get_loop().create_future()

    async def wait_for_change(self, until: float | None = None) -> None:
        """Waits for the next change, at the longest until the loop time `until`."""
        timeout = None if until is None else until - _now()
        await asyncio.wait([self._next_change], timeout=timeout)

    def _check_answers(self) -> None:
        """
        Raises:
            RuntimeError: no client would be answered. Otherwise each handshake would time out.
        """
        if self._loop is None:
            raise RuntimeError("this FakeServer does not run: async with FakeServer() as server")
        if asyncio.get_running_loop() is not self._loop and not self._loop.is_running():
            raise RuntimeError(
                "this FakeServer was started in another event loop, which does not run now, so it"
                " cannot answer. Start it in the loop of the test: in the test itself, or in a"
                " fixture of the same scope (pytest-asyncio: the same loop_scope)"
            )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            return await self._shake_hands(request)
        finally:
            self._handlers.discard(handler)

    async def _shake_hands(self, request: web.Request) -> web.StreamResponse:
        handshake = Handshake(len(self.handshakes) + 1, _now(), dict(request.query))
        self.handshakes.append(handshake)
        self.note_change()
        await asyncio.sleep(self.behaviour.handshake_delay)
        transport = request.transport
        route = self._route_of(transport) if transport is not None else None
        if transport is None or route is None:  # the client has left meanwhile
            return web.Response(status=400)
        handshake.status = self._judge(request)
        self.note_change()
        if handshake.status != SWITCHING_PROTOCOLS:
            return web.Response(status=handshake.status, headers=self._refusal_headers())
        ws = web.WebSocketResponse(timeout=CLOSE_TIMEOUT, autoping=False, autoclose=False)
        await ws.prepare(request)
        connection = ServedConnection(
            len(self.connections) + 1,
            _now(),
            dict(request.query),
            route,
            over_limit=self._is_full and self.behaviour.refusal is Refusal.ERROR_FRAME,
        )
        await self._serve(_Session(self, ws, transport, connection), connection)
        return ws

    def _route_of(self, transport: asyncio.Transport) -> Route | None:
        return self.network.route_from(transport.get_extra_info("peername")[1])

    def _judge(self, request: web.Request) -> int:
        """The HTTP status that answers a handshake."""
        behaviour = self.behaviour
        if behaviour.refuse_next:
            return behaviour.refuse_next.pop(0)
        if behaviour.refuse is not None:
            return behaviour.refuse
        if request.headers.get("Authorization") != f"Bearer {behaviour.api_key}":
            return 401
        if behaviour.voices is not None and request.query.get("voice") not in behaviour.voices:
            return 400
        return behaviour.refusal.status if self._is_full else SWITCHING_PROTOCOLS

    @property
    def _is_full(self) -> bool:
        limit = self.behaviour.max_sessions
        return limit is not None and self.session_count >= limit

    def _refusal_headers(self) -> dict[str, str]:
        retry_after = self.behaviour.retry_after
        is_for_limit = self._is_full and retry_after is not None
        return {"Retry-After": str(retry_after)} if is_for_limit else {}

    async def _serve(self, session: _Session, connection: ServedConnection) -> None:
        self._sessions.add(session)
        self.connections.append(connection)
        self.peak_open = max(self.peak_open, self.open_count)
        self.peak_sessions = max(self.peak_sessions, self.session_count)
        self.note_change()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)


class _Session:
    """One open connection: reads the client, speaks the utterance under way, minds the time."""

    def __init__(
        self,
        server: FakeServer,
        ws: web.WebSocketResponse,
        transport: asyncio.Transport,
        connection: ServedConnection,
    ) -> None:
        self._server = server
        self._ws = ws
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        self._connection = connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = self._start(self._read())
        self._speaker: asyncio.Task[None] | None = None
        self._current: Utterance | None = None
        self._idle_since = connection.opened_at
        self._pinged_at = connection.opened_at
        self._pong_due = False
        self._frames_heard = 0
        self._expired = False
        self.is_dead = False

    async def run(self) -> None:
        """Serves the connection to its end."""
        try:
            self._start(self._mind_the_time())
            if self._connection.over_limit:
                await self._say("error", message="concurrent session limit reached")
                self.end(End.SERVER_CLOSE, WSCloseCode.TRY_AGAIN_LATER)
            if self._server.behaviour.stray_done:
                await self._say("audio.done", trace_id="stray")
            await asyncio.wait([self._reader])
            if self._connection.ended is End.SERVER_CLOSE:
                await self._ws.close(code=self._connection.close_code or 1000)
        finally:
            self._note_end(End.CLIENT_DROPPED)
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, end: End, code: int = 1000) -> None:
        """Ends the connection from the server's side, unless it has ended."""
        if not self._connection.is_open:
            return
        self._note_end(end)
        if end is End.SERVER_CLOSE:
            self._connection.close_code = code
            # run() goes on to close: aiohttp waits for the client's answer only when no task is
            # inside receive().
            self._reader.cancel()
            return
        if end is End.SERVER_SILENT:
            self._connection.route.half_open_at_end()
        reset_transport(self._transport, self._socket)

    async def send(self, frame: str | bytes) -> None:
        """Sends a text or binary frame, if the connection is open."""
        if not self._connection.is_open:
            return
        with contextlib.suppress(ConnectionError):  # the reader sees it too
            if isinstance(frame, str):
                await self._ws.send_str(frame)
            else:
                await self._ws.send_bytes(frame)

    async def _say(self, kind: str, **fields: str) -> None:
        await self.send(json.dumps({"type": kind, **fields}))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _note_end(self, end: End) -> None:
        if not self._connection.is_open:
            return
        self._connection.ended = end
        self._connection.ended_at = _now()
        self._stop_speaker()
        if self._current is not None and self._current.outcome is Outcome.UNDER_WAY:
            self._current.outcome = Outcome.CUT_OFF
        self._server.note_change()

    # What the client says.

    async def _read(self) -> None:
        """Reads until the client has closed or is gone."""
        while True:
            frame = await self._ws.receive()
            self._frames_heard += 1
            if frame.type is WSMsgType.TEXT:
                await self._take(frame.data)
            elif frame.type is WSMsgType.BINARY:
                await self._object("binary frame")
            elif frame.type is WSMsgType.PING:
                await self._on_ping(frame.data)
            elif frame.type is WSMsgType.PONG:
                self._connection.pongs_received += 1
                self._pong_due = False
            elif frame.type is WSMsgType.CLOSE:
                await self._on_close(frame.data)
                return
            else:
                return  # the connection is gone
            self._server.note_change()

    async def _on_ping(self, data: bytes) -> None:
        self._connection.pings_received += 1
        if not self._server.behaviour.answer_pings:
            return
        if self._server.behaviour.pong_delay:
            self._start(self._answer_ping(data))
        else:
            await self._answer_ping(data)

    async def _answer_ping(self, data: bytes) -> None:
        await asyncio.sleep(self._server.behaviour.pong_delay)
        with contextlib.suppress(ConnectionError):
            await self._ws.pong(data)

    async def _on_close(self, code: int) -> None:
        self._connection.close_code = code
        self._server.note_change()
        if not self._server.behaviour.answer_close:
            # After a Close aiohttp reads no more; the network knows when the client drops it.
            await self._connection.route.client_left.wait()
        self._note_end(End.CLIENT_CLOSE)
        await self._ws.close(code=code or 1000)

    async def _take(self, data: str) -> None:
        """Passes a message on from the edge, if there is one. PINGs overtake it there."""
        if self._server.behaviour.edge_distance:
            self._start(self._on_distant_message(data))
        else:
            await self._on_message(data)

    async def _on_distant_message(self, data: str) -> None:
        await asyncio.sleep(self._server.behaviour.edge_distance)
        await self._on_message(data)
        self._server.note_change()

    async def _on_message(self, data: str) -> None:
        match _parsed(data):
            case {"type": "text.delta", "delta": str(text)}:
                await self._on_text(text, done=False)
            case {"type": "text.done"}:
                await self._on_text("", done=True)
            case {"type": "text.clear"}:
                await self._on_clear()
            case {"type": "session.update", "replace": dict(replace)}:
                await self._on_update(replace)
            case _:
                await self._object(f"unknown message: {data[:80]}")

    async def _on_text(self, text: str, *, done: bool) -> None:
        utterance = self._current
        if utterance is None:
            utterance = self._begin()
        elif utterance.text_done:
            await self._object("text after text.done and before audio.done")
            return
        utterance.text += text
        utterance.text_done = done
        if done and utterance.outcome is Outcome.FAILED:
            self._conclude(utterance, Outcome.FAILED)

    async def _on_update(self, replace: dict[str, str]) -> None:
        self._connection.replace = replace
        if not self._is_mute:
            await self._say("session.updated")

    async def _on_clear(self) -> None:
        self._connection.clears += 1
        clearing = self._server.behaviour.clearing
        if self._is_mute or clearing is Clearing.IGNORED:
            return
        if clearing is Clearing.REFUSED:
            await self._say("error", message="unknown message type: text.clear")
        elif clearing is Clearing.LATE:
            self._start(self._clear_late())
        else:
            await self._clear(clearing)

    async def _clear_late(self) -> None:
        await asyncio.sleep(self._server.behaviour.clear_delay)
        await self._clear(Clearing.LATE)

    async def _clear(self, clearing: Clearing) -> None:
        cleared = self._current
        if cleared is not None:
            self._stop_speaker()
            self._conclude(cleared, Outcome.CLEARED)
            if clearing is Clearing.CROSSED:
                await self._say("audio.done", trace_id=f"trace-{cleared.number}")
        await self._say("audio.clear")
        if cleared is not None and clearing is Clearing.LEAKING:
            self._start(self._leak(cleared))

    async def _leak(self, cleared: Utterance) -> None:
        heard_before = self._frames_heard
        await asyncio.sleep(self._server.behaviour.clear_delay)
        if self._connection.is_open and self._frames_heard == heard_before:
            self._connection.leaks += 1
            await self._say_audio(cleared, self._chunk_size)

    async def _object(self, violation: str) -> None:
        self._connection.violations.append(violation)
        if not self._is_mute:
            await self._say("error", message=violation)

    # The utterance under way.

    @property
    def _is_mute(self) -> bool:
        return self._expired or self.is_dead or self._server.behaviour.mute

    def _begin(self) -> Utterance:
        count = len(self._server.utterances)
        utterance = Utterance(count % HIGHEST_SAMPLE + 1, self._connection.number, _now())
        utterance.replace = self._connection.replace
        self._server.utterances.append(utterance)
        self._connection.utterances.append(utterance)
        self._current = utterance
        if not self._is_mute:
            self._speaker = self._start(self._answer(utterance))
        return utterance

    def _conclude(self, utterance: Utterance, outcome: Outcome) -> None:
        utterance.outcome = outcome
        if outcome is Outcome.FAILED and not utterance.text_done:
            return  # the rest of its text is still to come
        self._current = None
        self._idle_since = _now()
        self._server.note_change()

    def _stop_speaker(self) -> None:
        if self._speaker is not None:
            self._speaker.cancel()

    async def _answer(self, utterance: Utterance) -> None:
        behaviour = self._server.behaviour
        refusal = behaviour.error_on_text
        if self._server.has_too_many_utterances(utterance):
            refusal = "too many concurrent requests"
        if refusal is not None:
            self._conclude(utterance, Outcome.FAILED)
            await self._say("error", message=refusal)
            return
        is_wordless = behaviour.wordless is not Wordless.SPOKEN and await self._is_wordless(
            utterance
        )
        await _sleep_until(utterance.first_text_at + behaviour.generation)
        if is_wordless:
            await self._answer_wordless(utterance)
            return
        for frame in behaviour.raw_before_audio:
            await self.send(frame)
        if behaviour.end_before_audio is not None:
            self.end(behaviour.end_before_audio.value)
            return
        await self._speak(utterance)
        self._conclude(utterance, Outcome.FINISHED)
        await self._say("audio.done", trace_id=f"trace-{utterance.number}")
        if behaviour.late_audio is not None:
            await asyncio.sleep(behaviour.late_audio)
            await self._say_audio(utterance, self._chunk_size)

    async def _is_wordless(self, utterance: Utterance) -> bool:
        """Whether there is nothing to be spoken in it, as soon as that is known."""
        while not any(map(str.isalnum, utterance.text)):
            if utterance.text_done:
                return True
            await self._server.wait_for_change()
        return False

    async def _answer_wordless(self, utterance: Utterance) -> None:
        wordless = self._server.behaviour.wordless
        if wordless is Wordless.REFUSED:
            self._conclude(utterance, Outcome.FAILED)
            await self._say("error", message="nothing to be spoken")
            return
        if wordless is Wordless.SILENCE:
            await self._say_audio(utterance, self._chunk_size & ~1, sample=0)
        self._conclude(utterance, Outcome.FINISHED)
        await self._say("audio.done", trace_id=f"trace-{utterance.number}")

    async def _speak(self, utterance: Utterance) -> None:
        """Sends the audio at its pace while text arrives, until all of it is spoken."""
        behaviour = self._server.behaviour
        due = _now()
        while size := await self._next_size(utterance):
            due = max(due, _now())
            await _sleep_until(due)
            due += size / BYTES_PER_SECOND / behaviour.pace
            await self._say_audio(utterance, size)
            if utterance.first_audio_at is None:
                utterance.first_audio_at = _now()
                self._server.note_change()
                if behaviour.end_after_audio is not None:
                    self.end(behaviour.end_after_audio.value)
        await _sleep_until(due)

    async def _next_size(self, utterance: Utterance) -> int:
        """Bytes of the next audio.delta, once there is text for it; 0 when all is spoken."""
        while True:
            seconds = len(utterance.text) * self._server.behaviour.speech_per_character
            unsaid = 2 * round(seconds * SAMPLE_RATE) - utterance.audio_bytes
            if unsaid > 0:
                return min(unsaid, self._chunk_size)
            if utterance.text_done:
                return 0
            await self._server.wait_for_change()

    @property
    def _chunk_size(self) -> int:
        """Bytes, an odd number."""
        return int(self._server.behaviour.chunk * BYTES_PER_SECOND) | 1

    async def _say_audio(self, utterance: Utterance, size: int, sample: int | None = None) -> None:
        sample = utterance.number if sample is None else sample
        pcm = sample.to_bytes(2, "little") * (size // 2 + 2)
        start = utterance.audio_bytes % 2
        utterance.audio_bytes += size
        await self._say("audio.delta", delta=base64.b64encode(pcm[start : start + size]).decode())

    # What time brings.

    async def _mind_the_time(self) -> None:
        """Does what the clock says; a change of the behaviour may change what that is."""
        while self._connection.is_open:
            appointments = self._appointments()
            operation = min(appointments, key=appointments.__getitem__, default=None)
            if operation is None:
                await self._server.wait_for_change()
            elif appointments[operation] > _now():
                await self._server.wait_for_change(until=appointments[operation])
            else:
                await operation()

    def _appointments(self) -> dict[Callable[[], Awaitable[None]], float]:
        behaviour = self._server.behaviour
        due: dict[Callable[[], Awaitable[None]], float] = {}
        if behaviour.ping_interval is not None:
            due[self._ping] = self._pinged_at + behaviour.ping_interval
        if behaviour.idle_limit is not None and self._current is None:
            due[self._end_idle] = self._idle_since + behaviour.idle_limit
        if behaviour.idle_death is not None and self._current is None and not self.is_dead:
            due[self._die] = self._idle_since + behaviour.idle_death
        if behaviour.deadline is not None and not self._expired:
            due[self._expire] = self._connection.opened_at + behaviour.deadline
        return due

    async def _ping(self) -> None:
        if self._pong_due:
            self.end(End.PING_TIMEOUT)
            return
        self._pong_due = True
        self._pinged_at = _now()
        with contextlib.suppress(ConnectionError):
            await self._ws.ping()

    async def _end_idle(self) -> None:
        self.end(self._server.behaviour.ending.value)

    async def _die(self) -> None:
        self.is_dead = True

    async def _expire(self) -> None:
        self._expired = True
        self._stop_speaker()
        if self._current is not None:
            self._conclude(self._current, Outcome.FAILED)
        age = _now() - self._connection.opened_at
        await self._say(
            "error", message=f"TTS pipeline timed out after {age:.0f}s: Deadline expired"
        )


class _Resolver(AbstractResolver):
    """Sends every host name to one port of this machine.

    Args:
        check: raises if no server answers there.
    """

    def __init__(self, port: int, check: Callable[[], None]) -> None:
        self._port = port
        self._check = check

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self._check()
        return [
            ResolveResult(
                hostname=host, host=HOST, port=self._port, family=socket.AF_INET, proto=0, flags=0
            )
        ]

    async def close(self) -> None:
        """Holds nothing."""


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # its handshake takes one round trip
    _authority().issue_cert(SERVER_NAME, "localhost").configure_cert(context)
    return context


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _sleep_until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - _now()))


def _parsed(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _without_space(text: str) -> str:
    return "".join(text.split())
