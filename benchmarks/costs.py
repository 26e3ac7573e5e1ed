"""What the pool itself costs, against a fake server without delay.

The fake server runs in a process of its own, so that its work is not counted: a thread would share
the interpreter's lock and its garbage collector with the client, and each would pay for what the
other does. What is counted is `time.process_time()`, the CPU that the client's process has used,
or `time.perf_counter()` where nothing is waited for. All times are in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.manager import Registry
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.plugin.provider import ConnectionProvider
from xai_pool_patch.plugin.releases import MODULE, Shape, detect, installed_version
from xai_pool_patch.plugin.wrappers import connect_of
from xai_pool_patch.testing import Behaviour
from xai_pool_patch.testing.server import PATH, SERVER_NAME

from .servers import Address, client_session

TURNS = 2000

LISTENERS = 10
MESSAGES_PER_SECOND = 500.0
"""Per listener. Slow enough for each message to wake its listener by itself, as in a conversation,
and all together enough to keep the processor awake: woken from its sleep for every single message
it takes several times as long for anything."""
RECEIVED_TEXT = "a" * 400
"""About 240 messages."""
RECEIVE_ROUNDS = 8

STREAMS = 200
STREAMS_PER_SERVER = 10
"""A fake server wakes everybody on it at every change: twice as many cost it four times as much."""
SPOKEN_TEXT = "Your order left the warehouse last night."
PAIRS = 5
SPOKEN_AGAIN = 2
"""Rounds of all streams over the same connections."""

URL = f"wss://{SERVER_NAME}{PATH}"

CONN_OPTIONS = APIConnectOptions(max_retry=0, timeout=30.0)
"""Two hundred handshakes at once take their time."""


@dataclass(frozen=True)
class MessageCosts:
    """CPU time of the client per message received, one value a round."""

    bare: list[float]
    """From WebSockets of aiohttp."""
    pooled: list[float]
    """From leases of the pool."""


@dataclass(frozen=True)
class StreamCosts:
    """CPU time of the client for a number of streams that speak at once."""

    first: float
    """With the handshakes."""
    again: float
    """Over the same connections again; the median of some rounds."""

    @property
    def handshakes(self) -> float:
        return self.first - self.again


# The pool's part of a turn

Use = Callable[[Any], Awaitable[int]]
"""Speaks with a lease; gives the number of messages received."""


@dataclass(frozen=True)
class _Turn:
    """One turn over a lease of the pool."""

    received: int
    acquire_and_release: float
    """Seconds before and after the lease was used."""


class _Pooled:
    """Runs turns with leases, as the patched plugin does. An async context manager."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        module = sys.modules[MODULE]
        shape = detect(module, installed_version(), allow_unverified=True)
        self._provider = ConnectionProvider(
            Registry(PoolOptions(), []), shape, connect_of(xai.TTS, shape)
        )
        self._opts = None if shape is Shape.READS_OPTIONS else self._tts._opts

    async def turn(self, use: Use) -> _Turn:
        began_at = time.perf_counter()
        async with self._provider.turn(SimpleNamespace()) as turn:
            lease = await self._provider.connect(
                turn, self._tts, CONN_OPTIONS.timeout, self._opts, _no_other_way
            )
            acquired_at = time.perf_counter()
            received = await use(lease)
            used_at = time.perf_counter()
        released_at = time.perf_counter()
        return _Turn(received, (acquired_at - began_at) + (released_at - used_at))

    async def __aenter__(self) -> _Pooled:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._provider.close(self._tts, self._tts.aclose)


async def _no_other_way() -> None:
    raise AssertionError("the pool has failed")


def acquire_and_release(address: Address) -> list[float]:
    """The time that acquire and release take in a turn that finds its connection ready."""
    return asyncio.run(_acquire_and_release(address))


async def _acquire_and_release(address: Address) -> list[float]:
    async with client_session(address) as http, _Pooled(http) as pooled:
        await pooled.turn(_say_nothing)  # the handshake
        return [(await pooled.turn(_say_nothing)).acquire_and_release for _ in range(TURNS)]


async def _say_nothing(ws: aiohttp.ClientWebSocketResponse) -> int:
    """The shortest utterance. A connection that was never heard is not reused."""
    await ws.send_json({"type": "text.done"})
    await ws.receive()
    return 1


def receive(address: Address) -> MessageCosts:
    """Receives the same from bare WebSockets and from leases, by turns."""
    return asyncio.run(_receive(address))


async def _receive(address: Address) -> MessageCosts:
    costs = MessageCosts([], [])
    async with (
        client_session(address) as http,
        _Pooled(http) as pooled,
        contextlib.AsyncExitStack() as stack,
    ):

        async def receive_pooled() -> int:
            return (await pooled.turn(_receive_all)).received

        headers = {"Authorization": f"Bearer {Behaviour().api_key}"}
        connect = functools.partial(http.ws_connect, URL, headers=headers)
        sockets = [await stack.enter_async_context(connect()) for _ in range(LISTENERS)]
        await asyncio.gather(*(receive_pooled() for _ in sockets))  # the handshakes
        for _ in range(RECEIVE_ROUNDS):
            costs.bare.append(await _per_message([_receive_all(ws) for ws in sockets]))
            costs.pooled.append(await _per_message([receive_pooled() for _ in sockets]))
    return costs


async def _per_message(listeners: list[Coroutine[Any, Any, int]]) -> float:
    gc.collect()
    began_at = time.process_time()
    received = await asyncio.gather(*listeners)
    return (time.process_time() - began_at) / sum(received)


async def _receive_all(ws: aiohttp.ClientWebSocketResponse) -> int:
    """The number of messages of one utterance."""
    await ws.send_json({"type": "text.delta", "delta": RECEIVED_TEXT})
    await ws.send_json({"type": "text.done"})
    received = 1
    while json.loads((await ws.receive()).data)["type"] != "audio.done":
        received += 1
    return received


# Many streams at once


class _KeepsOpen(xai.TTS):
    """Speaks over the same connections again, so that there is something to compare with.

    It does the least that this takes, and nothing that makes it safe.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._min_size: list[aiohttp.ClientWebSocketResponse] = []

    async def _connect_ws(self, *args: Any, **kwargs: Any) -> aiohttp.ClientWebSocketResponse:
        return (
            self._min_size.pop() if self._min_size else await super()._connect_ws(*args, **kwargs)
        )

    async def _close_ws(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._min_size.append(ws)

    async def aclose(self) -> None:
        await super().aclose()
        await asyncio.gather(*(ws.close() for ws in self._min_size))


def speak_at_once(address: Address, *, patched: bool, streams: int) -> StreamCosts:
    """Lets the plugin speak on many streams at once, and then again.

    The plugin as it is would begin each time with handshakes. Compared with that the pool would
    win by far, so the plugin is made to keep its connections, where it has no pool for that.
    """
    if patched:
        xai_pool_patch.install()
    try:
        return asyncio.run(_speak_repeatedly(address, streams, patched=patched))
    finally:
        xai_pool_patch.uninstall()


async def _speak_repeatedly(address: Address, streams: int, *, patched: bool) -> StreamCosts:
    async with client_session(address) as http:
        tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        if not patched and not hasattr(tts, "_pool"):
            tts = _KeepsOpen(api_key=Behaviour().api_key, http_session=http)
        first = await _speak_on(tts, streams)
        again = [await _speak_on(tts, streams) for _ in range(SPOKEN_AGAIN)]
        await tts.aclose()
        return StreamCosts(first, statistics.median(again))


async def _speak_on(tts: xai.TTS, streams: int) -> float:
    gc.collect()
    began_at = time.process_time()
    await asyncio.gather(*(_speak(tts) for _ in range(streams)))
    return time.process_time() - began_at


async def _speak(tts: xai.TTS) -> None:
    async with tts.stream(conn_options=CONN_OPTIONS) as stream:
        stream.push_text(SPOKEN_TEXT)
        stream.end_input()
        async for _ in stream:
            pass
