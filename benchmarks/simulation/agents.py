"""How the agent of one call gets its connections: the plugin as it is, or patched."""

from __future__ import annotations

import asyncio
import functools
import math
import random
from typing import Any, Protocol

from xai_pool_patch.manager import PoolManager
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.plugin.conversation import Conversation
from xai_pool_patch.plugin.provider import ask_or_make_room
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import DialFailedError
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.protocol.request import Request
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.shortage import Shortage

from .server import Server, Socket

HOST = "api.x.ai"
URL = f"wss://{HOST}/v1/tts"
CONNECT_TIMEOUT = 10.0
"""Seconds. LiveKit's `APIConnectOptions`."""

_TEXT = '{"type":"text.delta","delta":"Hello"}'


class Agent(Protocol):
    """The agent of one call, in a process of its own."""

    def user_begins_to_speak(self) -> None: ...

    def reply_begins(self) -> None:
        """LiveKit emits `speech_created`, and asks the LLM."""

    async def acquire(self) -> None:
        """There is text: get a connection. Raises what the plugin would."""

    async def release(self, *, cut_off: bool) -> None:
        """The utterance is over, completely or not."""

    def reply_ends(self) -> None:
        """Nothing is heard of the reply any more."""

    async def aclose(self) -> None:
        """The call is over."""

    def kill(self) -> None:
        """End without a Close frame."""


class UnpatchedAgent:
    """Dials for each reply and closes after it, as the plugin does before 1.6.5."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._socket: Socket | None = None

    def user_begins_to_speak(self) -> None:
        pass

    def reply_begins(self) -> None:
        pass

    async def acquire(self) -> None:
        self._socket = await self._server.connect()

    async def release(self, *, cut_off: bool) -> None:
        if self._socket is not None:
            await self._socket.close()

    def reply_ends(self) -> None:
        pass

    async def aclose(self) -> None:
        await self.release(cut_off=True)

    def kill(self) -> None:
        if self._socket is not None:
            self._socket.kill()


class _Session:
    """What a request needs of an HTTP session."""

    closed = False
    connector = None

    def __init__(self, server: Server, sockets: set[Socket]) -> None:
        self._server = server
        self._sockets = sockets

    async def ws_connect(self, *args: object, **kwargs: object) -> Socket:
        socket = await self._server.connect()
        self._sockets.difference_update([each for each in self._sockets if each.closed])
        self._sockets.add(socket)
        return socket


class _TTS:
    """What `PoolManager` needs of the plugin's TTS: that it can be referred to."""


class _AgentSession:
    """What a `Conversation` needs of LiveKit's: the same."""


class PatchedAgent:
    """Uses the package's own `PoolManager`, with one TTS in one `AgentSession`.

    Args:
        server: where it dials.
        options: see `PoolOptions`.
        store: where it hears of refusals that others met.
        dials_at_speech: expects a reply from the user's first word on; no option of the package.
        jitter: spreads what processes would otherwise do at the same moment.
    """

    def __init__(
        self,
        server: Server,
        options: PoolOptions,
        store: Store,
        *,
        dials_at_speech: bool,
        jitter: random.Random,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._sockets: set[Socket] = set()
        self._dials_at_speech = dials_at_speech
        shortage = Shortage(HOST, loop.time, loop.time, jitter.uniform)
        self._pools = PoolManager(
            options,
            _no_fault,
            shortage_at=lambda host: shortage,
            store=store,
            make_room=lambda: self._pools.let_go(),
        )
        self._pools._jitter.seed(jitter.random())
        self._tts = _TTS()
        session: Any = _Session(server, self._sockets)
        request = Request(session, (URL,), {}, max_age=math.inf)
        self._pool = self._pools.register(self._tts, request)
        self._pool.prewarm()  # as an AgentSession does when it starts
        self._session = _AgentSession()
        self._conversation = Conversation(self._session)
        self._connection: Connection | None = None

    def user_begins_to_speak(self) -> None:
        if self._dials_at_speech:
            self._conversation.expect_at(self._pool)

    def reply_begins(self) -> None:
        self._conversation.expect_at(self._pool)

    async def acquire(self) -> None:
        ask = functools.partial(self._pool.acquire, caller=self._conversation)
        try:
            acquired = await ask_or_make_room(ask, CONNECT_TIMEOUT, self._pools.let_go)
        except DialFailedError as failure:
            raise failure.error from None
        self._connection = acquired.connection
        self._conversation.speaks(self._tts, self._pool)

    async def release(self, *, cut_off: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if cut_off:
            connection.utterance.sent(_TEXT)  # so that the server owes an answer
        self._pool.give_back(connection, Outcome.INTERRUPTED if cut_off else Outcome.FINISHED)

    def reply_ends(self) -> None:
        self._conversation.withdraw()

    async def aclose(self) -> None:
        await self.release(cut_off=True)
        await self._pools.aclose()

    def kill(self) -> None:
        for socket in self._sockets:
            socket.kill()


class Board(Store):
    """A place that some processes see: a file, or a Redis."""

    name = "board"

    def __init__(self) -> None:
        self._until: float | None = None

    async def read(self, host: str) -> float | None:
        return self._until

    async def write(self, host: str, until: float) -> None:
        self._until = until

    async def probe(self, host: str) -> None:
        """Do nothing: it works."""


def _no_fault(operation: str, fault: Exception) -> None:
    raise AssertionError(f"a fault in {operation}") from fault
