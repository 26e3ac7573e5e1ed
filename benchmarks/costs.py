"""What the pool itself costs, against a fake server without delay.

The fake server runs in a process of its own, so that its work is not counted: a thread would share
the interpreter's lock and its garbage collector with the client, and each would pay for what the
other does. What is counted is `time.process_time()`, the CPU that the client's process has used, in
seconds. It differs from machine to machine, so each cost is a ratio to something else that was
measured in the same run, by turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.plugin.asking import Asking
from xai_pool_patch.plugin.provider import ConnectionProvider
from xai_pool_patch.plugin.releases import MODULE, Shape, detect, installed_version
from xai_pool_patch.plugin.turn import Turn
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.registry import Registry
from xai_pool_patch.testing import Behaviour

from .servers import Address, client_session, connect

ROUNDS = 5
"""Of each comparison, by turns."""

SPOKEN_TURNS = 60
SPOKEN_TEXT = "Your order left the warehouse last night, and it will be there soon"
"""40 messages."""

CONN_OPTIONS = APIConnectOptions(max_retry=0, timeout=30.0)
"""Two hundred handshakes at once take their time."""


@dataclass(frozen=True)
class Load:
    """What is spoken over bare WebSockets and over leases of the pool, to compare the two."""

    connections: int
    """They speak at once."""
    text: str
    turns: int = 1
    """Of each connection in a round, one after another."""
    messages_per_second: float = 500.0
    """Per connection. Slow enough for each message to wake its listener by itself, as in a
    conversation, and all together enough to keep the processor awake: woken from its sleep for
    every single message it takes several times as long for anything."""
    connections_per_server: int = 10
    """A fake server wakes all its tasks at every change: twice as many cost it four times as
    much."""

    @property
    def servers(self) -> int:
        return math.ceil(self.connections / self.connections_per_server)


HIT = Load(connections=1, text="", turns=200)
MESSAGE = Load(connections=10, text="a" * 400)
STREAMS = Load(
    connections=200, text="Your order left the warehouse last night.", messages_per_second=50.0
)


@dataclass(frozen=True)
class PairedCosts:
    """CPU time of the client per message received, one value a round."""

    bare: list[float]
    """From WebSockets of aiohttp."""
    pooled: list[float]
    """From leases of the pool."""


# The pool's part of a turn


class _Pooled:
    """Runs turns with leases, as the patched plugin does. An async context manager."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        module = sys.modules[MODULE]
        shape = detect(module, installed_version(), allow_unverified=True)
        registry = Registry(PoolOptions(warm="always"), None)
        self._provider = ConnectionProvider(registry, Asking(module, shape))
        self._opts = None if shape is Shape.READS_OPTIONS else self._tts._opts

    async def turn(self, text: str) -> int:
        """The number of messages received."""
        turn = Turn()
        lease = await self._provider.lease(turn, self._tts, CONN_OPTIONS.timeout, self._opts)
        assert lease is not None
        received = await _speak_bare(lease, text)
        await lease.close()
        self._provider.end_turn(turn, self._tts, Outcome.FINISHED)
        await self._provider.close_if_over(turn)
        return received

    async def __aenter__(self) -> _Pooled:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._provider.close(self._tts, self._tts.aclose)


def compare(address: Address, load: Load) -> PairedCosts:
    """Speaks the same over bare WebSockets and over leases, by turns."""
    return asyncio.run(_compare(address, load))


async def _compare(address: Address, load: Load) -> PairedCosts:
    costs = PairedCosts([], [])
    async with (
        client_session(address) as http,
        _Pooled(http) as pooled,
        contextlib.AsyncExitStack() as stack,
    ):
        sockets = [await stack.enter_async_context(connect(http)) for _ in range(load.connections)]
        over_bare = [functools.partial(_speak_bare, ws, load.text) for ws in sockets]
        over_leases = [functools.partial(pooled.turn, load.text) for _ in sockets]
        await _per_message(over_leases, 1)  # the handshakes
        for _ in range(ROUNDS):
            costs.bare.append(await _per_message(over_bare, load.turns))
            costs.pooled.append(await _per_message(over_leases, load.turns))
    return costs


Speak = Callable[[], Awaitable[int]]
"""Speaks once; gives the number of messages received."""


async def _per_message(speakers: Sequence[Speak], turns: int) -> float:
    """CPU time, while all of them speak at once."""
    gc.collect()
    began_at = time.process_time()
    received = await asyncio.gather(*(_repeatedly(speak, turns) for speak in speakers))
    return (time.process_time() - began_at) / sum(received)


async def _repeatedly(speak: Speak, turns: int) -> int:
    return sum([await speak() for _ in range(turns)])


async def _speak_bare(ws: aiohttp.ClientWebSocketResponse, text: str) -> int:
    """The number of messages of one utterance."""
    if text:
        await ws.send_json({"type": "text.delta", "delta": text})
    await ws.send_json({"type": "text.done"})
    received = 1
    while json.loads((await ws.receive()).data)["type"] != "audio.done":
        received += 1
    return received


# A whole turn


def speak_turns(address: Address, *, patched: bool) -> float:
    """CPU time of the client per turn of the plugin, handshakes included."""
    if patched:
        xai_pool_patch.install()
    try:
        return asyncio.run(_speak_turns(address))
    finally:
        xai_pool_patch.uninstall()


async def _speak_turns(address: Address) -> float:
    gc.collect()
    began_at = time.process_time()
    async with client_session(address) as http:
        tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        for _ in range(SPOKEN_TURNS):
            await speak(tts)
        await tts.aclose()
    return (time.process_time() - began_at) / SPOKEN_TURNS


async def speak(tts: xai.TTS) -> None:
    async with tts.stream(conn_options=CONN_OPTIONS) as stream:
        stream.push_text(SPOKEN_TEXT)
        stream.end_input()
        async for _ in stream:
            pass
