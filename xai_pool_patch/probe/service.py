"""xAI's streaming TTS as the probe sees it: dials, sockets, and everything that comes on them.

All times are in seconds, moments are those of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import aiohttp
from aiohttp import WSMsgType

from ..options import PoolOptions
from ..protocol.connection import transport_of
from .redaction import plain_words, public_headers

HOST = "api.x.ai"
URL = f"wss://{HOST}/v1/tts"
VOICE = "ara"
PONG, PING = "PONG", "PING"
"""What `Heard.type` is of a frame that is no message."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the probe waits for what."""

    dial: float = 20.0
    """Longest time for a handshake."""
    settle: float = 1.0
    """Longest time after a handshake in which a refusal may follow as an error frame."""
    answer: float = 10.0
    """Longest time for something that should come."""
    quiet: float = 2.0
    """How long the probe listens for what must not come."""
    gap: float = 10.0
    """The pause between two pieces of one text."""
    close: float = 2.0
    """Longest time for the answer to a Close frame."""
    heartbeat: float = PoolOptions.heartbeat
    """Interval of PINGs while a connection only waits."""
    deadline: float = 2100.0
    """Age at which xAI was seen to end connections."""
    frees: float = 660.0
    """Longest time for a session to become free. xAI documents 600 s for a lost connection."""


class DialError(Exception):
    """A handshake failed. The message says how, without a secret."""


class UnreachableError(DialError):
    """The service did not answer."""


class RefusedError(DialError):
    """The service refused the handshake.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        named = [f"HTTP {status}", *(f"{name}: {headers[name]}" for name in headers)]
        super().__init__(", ".join(named))
        self.status = status


@dataclass(frozen=True)
class Handshake:
    """The parts of one."""

    dns: float | None
    """None if the address was known."""
    connect: float | None
    """TCP and TLS, which aiohttp does not separate. None if there was an open HTTP connection."""
    upgrade: float
    """From there to the WebSocket."""
    total: float


class End(enum.Enum):
    """How the service ended a connection."""

    CLOSE = "a Close frame"
    DROPPED = "a reset or EOF, without a Close frame"


@dataclass(frozen=True)
class Heard:
    """One message of the service, or a PING or PONG."""

    type: str
    at: float
    audio: int = 0
    """Bytes."""
    detail: str = ""
    """What an error message says, in plain words."""


@dataclass(frozen=True)
class Spoken:
    """What became of one utterance."""

    first_audio: float | None
    """Time from its text to its first audio."""
    audio: float
    """Seconds of audio."""
    is_done: bool
    """Its `audio.done` came."""
    outcome: str
    """How it ended, in words."""


class Socket:
    """One WebSocket. Its reader answers PINGs and keeps all that comes in `heard`.

    Attributes:
        handshake: how long it took.
        timing: how long to wait for what.
        opened_at: when it was open.
        heard: what has come, in order.
        end: how the service ended it; None while it is open, or if the probe closed it.
        ended_at: when it did.
        close_code: that of the service's Close frame.
    """

    def __init__(
        self, ws: aiohttp.ClientWebSocketResponse, handshake: Handshake, service: Service
    ) -> None:
        self.handshake = handshake
        self.timing = service.timing
        self.opened_at = now()
        self.heard: list[Heard] = []
        self.end: End | None = None
        self.ended_at: float | None = None
        self.close_code: int | None = None
        self._ws = ws
        self._service = service
        self._news = asyncio.get_running_loop().create_future()
        self._is_closing = False
        self._is_over = False
        self._reader = asyncio.create_task(self._read())

    @property
    def mark(self) -> int:
        """The place in `heard` of whatever comes next."""
        return len(self.heard)

    @property
    def is_open(self) -> bool:
        return not self._is_over and not self._is_closing

    async def __aenter__(self) -> Socket:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # Towards the service.

    async def send(self, type_: str, **fields: str) -> None:
        """Sends a message. The reader notices if the socket is gone."""
        with contextlib.suppress(OSError):
            await self._ws.send_str(json.dumps({"type": type_, **fields}))

    async def say(self, text: str) -> None:
        """Sends a piece of an utterance's text."""
        self._service.characters += len(text)
        await self.send("text.delta", delta=text)

    async def ping(self) -> float | None:
        """The round trip of a PING; None if no PONG came."""
        mark, sent_at = self.mark, now()
        await self.send_ping()
        pong = await self.first(PONG, since=mark)
        return None if pong is None else pong.at - sent_at

    async def send_ping(self) -> None:
        with contextlib.suppress(OSError):
            await self._ws.ping(b"probe")

    async def clear(self) -> float | None:
        """The time to the acknowledgement of a `text.clear`; None if none came."""
        mark, sent_at = self.mark, now()
        await self.send("text.clear")
        answer = await self.first("audio.clear", "error", since=mark)
        is_acknowledged = answer is not None and answer.type == "audio.clear"
        return answer.at - sent_at if answer is not None and is_acknowledged else None

    async def speak(self, text: str) -> Spoken:
        """Has an utterance spoken to its end."""
        mark, sent_at = self.mark, now()
        await self.say(text)
        await self.send("text.done")
        return await self.listen(since=mark, sent_at=sent_at)

    async def listen(self, *, since: int, sent_at: float) -> Spoken:
        """Waits for the end of an utterance whose text was sent at `sent_at`."""
        first = await self.first("audio.delta", "audio.done", "error", since=since)
        last = await self._last_of_utterance(since) if first is not None else None
        size = sum(heard.audio for heard in self.heard[since:])
        audio_at = first.at if first is not None and first.type == "audio.delta" else None
        return Spoken(
            first_audio=None if audio_at is None else audio_at - sent_at,
            audio=size / BYTES_PER_SECOND,
            is_done=last is not None and last.type == "audio.done",
            outcome=self.why_silent() if last is None else described(last),
        )

    async def _last_of_utterance(self, since: int) -> Heard | None:
        """Its `audio.done` or an error; None if no more of it comes."""
        while True:
            mark = self.mark
            last = self._find(("audio.done", "error"), since)
            if last is not None:
                return last
            if await self.first("audio.delta", "audio.done", "error", since=mark) is None:
                return None

    # From the service.

    async def first(self, *types: str, since: int, timeout: float | None = None) -> Heard | None:
        """The first message of these types; None if none comes in time, or the socket ends."""
        give_up_at = now() + (self.timing.answer if timeout is None else timeout)
        while True:
            found = self._find(types, since)
            if found is not None or not self.is_open or now() >= give_up_at:
                return found
            # Not wait_for(): before Python 3.12 it may swallow the cancellation by ^C.
            await asyncio.wait([self._news], timeout=give_up_at - now())

    def _find(self, types: tuple[str, ...], since: int) -> Heard | None:
        return next((heard for heard in self.heard[since:] if heard.type in types), None)

    def count(self, type_: str, *, since: int = 0) -> int:
        return sum(heard.type == type_ for heard in self.heard[since:])

    def why_silent(self) -> str:
        """Why something did not come, in words."""
        if self.end is None:
            return "no answer"
        code = f" {self.close_code}" if self.end is End.CLOSE else ""
        return f"the connection ended with {self.end.value}{code}"

    async def _read(self) -> None:
        with contextlib.suppress(OSError):  # the answer to a PING, into a socket that is gone
            while await self._take(await self._ws.receive()):
                self._wake()
        if not self._is_closing:
            self.end = self.end or End.DROPPED
            self.ended_at = now()
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        """Wakes what waits in `first()`."""
        self._news.set_result(None)
        self._news = asyncio.get_running_loop().create_future()

    async def _take(self, frame: aiohttp.WSMessage) -> bool:
        """Keeps what came. False at the end."""
        if frame.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
            if frame.type is WSMsgType.CLOSE:
                self.end, self.close_code = End.CLOSE, frame.data
            return False
        if frame.type is WSMsgType.PING:
            await self._ws.pong(frame.data)
        self.heard.append(_heard(frame))
        return True

    # The end.

    async def close(self) -> None:
        """Sends a Close frame and waits for the answer, up to `Timing.close`."""
        self._is_closing = True
        closing = asyncio.ensure_future(self._ws.close())
        try:
            await asyncio.wait([closing], timeout=self.timing.close)
        finally:
            closing.cancel()
            self._abort()
            await asyncio.gather(closing, self._reader, return_exceptions=True)
            self._service.forget(self)

    async def drop(self) -> None:
        """Ends the connection without a Close frame, as a process does that is killed."""
        self._is_closing = True
        self._abort()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._service.forget(self)

    def _abort(self) -> None:
        transport = transport_of(self._ws)
        if transport is not None:
            # A TLS transport that is closed already has nothing to abort. Python 3.11.2 raises.
            with contextlib.suppress(AttributeError):
                transport.abort()


class Service:
    """Dials, and closes whatever is still open at its end; an async context manager.

    Args:
        http: an HTTP session that was made with `tracing()`.
        api_key: the key to dial with.
        timing: how long to wait for what.

    Attributes:
        characters: how many were sent to be spoken.
    """

    def __init__(self, http: aiohttp.ClientSession, api_key: str, timing: Timing) -> None:
        self.timing = timing
        self.characters = 0
        self._http = http
        self._api_key = api_key
        self._sockets: set[Socket] = set()
        self._dials: set[asyncio.Task[Socket]] = set()

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._dials:
            # A handshake in progress may have a session already, which only a Close frame frees.
            _, pending = await asyncio.wait(self._dials, timeout=self.timing.close)
            for dial in pending:
                dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        await asyncio.gather(*(socket.close() for socket in self._sockets))

    async def dial(self, *, voice: str = VOICE, api_key: str | None = None) -> Socket:
        """Opens a WebSocket. Close it, or use it as a context manager.

        Raises:
            RefusedError: the service refused.
            UnreachableError: the service did not answer.
        """
        dial = asyncio.create_task(self._dial(voice, api_key or self._api_key))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)
        return await asyncio.shield(dial)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Socket]:
        """A socket of the usual voice; as `dial()`."""
        async with await self.dial() as socket:
            yield socket

    async def dial_settled(self) -> Socket:
        """Opens a WebSocket and waits until the service has accepted it, or has not.

        Raises:
            DialError: as `dial()`; also for an error frame or an end right after the handshake.
        """
        socket = await self.dial()
        await socket.send_ping()
        answer = await socket.first(PONG, "error", since=0, timeout=self.timing.settle)
        if socket.is_open and (answer is None or answer.type == PONG):
            return socket
        await socket.close()
        raise DialError(socket.why_silent() if answer is None else described(answer))

    def forget(self, socket: Socket) -> None:
        """The socket is closed."""
        self._sockets.discard(socket)

    async def _dial(self, voice: str, api_key: str) -> Socket:
        moments: dict[str, float] = {}
        _moments.set(moments)
        began = now()
        try:
            ws = await asyncio.wait_for(self._connect(voice, api_key), self.timing.dial)
        except aiohttp.WSServerHandshakeError as error:
            raise RefusedError(error.status, public_headers(error.headers or {})) from None
        except asyncio.TimeoutError:
            raise UnreachableError(f"no answer within {self.timing.dial:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{type(error).__name__}: {error}") from None
        except ValueError:
            raise UnreachableError("the key cannot be sent in an HTTP header") from None
        socket = Socket(ws, _measured(moments, began), self)
        self._sockets.add(socket)
        return socket

    async def _connect(self, voice: str, api_key: str) -> aiohttp.ClientWebSocketResponse:
        query = {"voice": voice, "language": "en", "codec": "pcm", "sample_rate": SAMPLE_RATE}
        headers = {"Authorization": f"Bearer {api_key}"}
        return await self._http.ws_connect(
            f"{URL}?{urlencode(query)}", headers=headers, autoping=False
        )


SAMPLE_RATE = 24_000
BYTES_PER_SECOND = 2 * SAMPLE_RATE

_moments: contextvars.ContextVar[dict[str, float]] = contextvars.ContextVar("moments")
"""When each step of the handshake in progress was done. A task has its own."""


def tracing() -> aiohttp.TraceConfig:
    """What an HTTP session needs so that its handshakes are measured in their parts."""
    trace = aiohttp.TraceConfig(trace_config_ctx_factory=_moments_in_progress)  # type: ignore[arg-type]
    for signal in ("dns_resolvehost_start", "dns_resolvehost_end"):
        getattr(trace, f"on_{signal}").append(_note(signal))
    for signal in ("connection_create_start", "connection_create_end"):
        getattr(trace, f"on_{signal}").append(_note(signal))
    return trace


def _moments_in_progress(trace_request_ctx: object = None) -> dict[str, float]:
    return _moments.get()


def _note(name: str) -> Callable[..., Awaitable[None]]:
    async def note(session: object, moments: dict[str, float], params: object) -> None:
        moments.setdefault(name, now())

    return note


def _measured(moments: dict[str, float], began: float) -> Handshake:
    def lasted(step: str) -> float | None:
        start, end = moments.get(f"{step}_start"), moments.get(f"{step}_end")
        return None if start is None or end is None else end - start

    over = now()
    dns, created = lasted("dns_resolvehost"), lasted("connection_create")
    return Handshake(
        dns=dns,
        connect=None if created is None else created - (dns or 0.0),
        upgrade=over - moments.get("connection_create_end", began),
        total=over - began,
    )


def _heard(frame: aiohttp.WSMessage) -> Heard:
    if frame.type in (WSMsgType.PING, WSMsgType.PONG):
        return Heard(PING if frame.type is WSMsgType.PING else PONG, now())
    try:
        message: Any = json.loads(frame.data)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        return Heard("unreadable", now())
    return Heard(
        type=str(message.get("type")),
        at=now(),
        audio=len(str(message.get("delta", ""))) * 3 // 4,
        detail=plain_words(str(message.get("message", ""))),
    )


def described(heard: Heard) -> str:
    """A message in words: its type, and what an error says."""
    return f"{heard.type}: {heard.detail}" if heard.detail else heard.type


def now() -> float:
    """The time of the event loop."""
    return asyncio.get_running_loop().time()
