"""How the agent of one call gets its connections: the plugin as it is, or patched."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Protocol

from xai_pool_patch.manager import PoolKey, PoolManager
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.plugin.conversation import Conversation
from xai_pool_patch.plugin.provider import _acquire  # what a caller does that is refused
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.shortage import Shortage

from .server import Server, Socket

API_KEY = "key"
HOST = "api.x.ai"
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
    """What `PoolKey` needs of an HTTP session."""

    closed = False


class _TTS:
    """What `_acquire` and `PoolManager` need of the plugin's TTS: that it can be referred to."""


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
        self._server = server
        self._sockets: set[Socket] = set()
        self._dials_at_speech = dials_at_speech
        shortage = Shortage(HOST, loop.time, loop.time, jitter.uniform)
        self._pools = PoolManager(options, _no_fault, shortage, store)
        self._pools._jitter.seed(jitter.random())
        self._tts = _TTS()
        session: Any = _Session()
        key = PoolKey(API_KEY, session, ())
        self._pool = self._pools.register(self._tts, key, lambda: self._connect)
        self._pool.prewarm()  # as an AgentSession does when it starts
        self._conversation = Conversation()
        self._connection: Connection | None = None

    def user_begins_to_speak(self) -> None:
        if self._dials_at_speech:
            self._conversation.expect_at(self._pool)

    def reply_begins(self) -> None:
        self._conversation.expect_at(self._pool)

    async def acquire(self) -> None:
        acquired = await _acquire(
            self._pools,
            self._pool,
            API_KEY,
            CONNECT_TIMEOUT,
            fresh=False,
            caller=self._conversation,
        )
        self._connection = acquired.connection
        self._conversation.speaks(self._tts, self._pool)

    async def release(self, *, cut_off: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if cut_off:
            connection.utterance.sent(_TEXT)  # so that the server owes an answer
            self._pool.release_cut_off(connection)
        else:
            self._pool.release(connection)

    def reply_ends(self) -> None:
        self._conversation.withdraw()

    async def aclose(self) -> None:
        await self.release(cut_off=True)
        await self._pools.aclose()

    def kill(self) -> None:
        for socket in self._sockets:
            socket.kill()

    async def _connect(self, timeout: float) -> Any:
        socket = await self._server.connect()
        self._sockets = {each for each in self._sockets if not each.closed} | {socket}
        return socket


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
