"""One WebSocket over a real socket, and the other side of it, which does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer

from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.protocol.host import Host

with_send_frame = pytest.mark.skipif(
    not hasattr(aiohttp.ClientWebSocketResponse, "send_frame"),
    reason="aiohttp has no send_frame() before 3.11",
)
PROTOCOL = "voice"
ENDS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
HEARTBEAT = 20.0
WHILE = 5.0
"""Seconds: far more than anything here takes."""


@dataclass(eq=False)
class Peer:
    """The server's side of one connection."""

    answers_pings: bool = True
    answers_close: bool = True
    heard: asyncio.Queue[aiohttp.WSMessage] = field(default_factory=asyncio.Queue)
    """Without PINGs, if they are answered."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """The test has seen enough."""
    ws: web.WebSocketResponse = field(init=False)
    transport: asyncio.Transport = field(init=False)

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        self.ws = web.WebSocketResponse(autoping=False, autoclose=False, protocols=[PROTOCOL])
        await self.ws.prepare(request)
        assert request.transport is not None
        self.transport = request.transport
        while (message := await self.ws.receive()).type not in ENDS:
            if message.type is WSMsgType.PING and self.answers_pings:
                await self.ws.pong(message.data)
            else:
                self.heard.put_nowait(message)
        self.heard.put_nowait(message)
        if message.type is WSMsgType.CLOSE and not self.answers_close:
            await self.over.wait()
        await self.ws.close()
        return self.ws

    async def hears(self) -> aiohttp.WSMessage:
        return await asyncio.wait_for(self.heard.get(), WHILE)

    def hangs_up(self) -> None:
        """Without a Close frame."""
        self.transport.abort()


@asynccontextmanager
async def line(
    **behaviour: bool,
) -> AsyncIterator[tuple[aiohttp.ClientWebSocketResponse, Peer]]:
    """A WebSocket of aiohttp, opened as the pool opens its own."""
    peer = Peer(**behaviour)
    app = web.Application()
    app.router.add_get("/", peer.serve)
    async with TestClient(TestServer(app)) as client:
        try:
            yield await client.ws_connect("/", autoping=False, protocols=[PROTOCOL]), peer
        finally:
            peer.over.set()


@dataclass(eq=False)
class Watch:
    """What a connection reported of itself."""

    host: Host
    lost: int = 0
    refused: int = 0
    faults: list[Exception] = field(default_factory=list)
    supervisor: Supervisor = field(init=False)
    taken: asyncio.Queue[tuple[Any, str]] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(lambda _, fault: self.faults.append(fault))

    def note_loss(self) -> None:
        self.lost += 1

    def note_refusal(self) -> None:
        self.refused += 1

    def take(self, message: aiohttp.WSMessage, type_: str) -> None:
        self.taken.put_nowait((message, type_))

    async def takes(self) -> tuple[Any, str]:
        return await asyncio.wait_for(self.taken.get(), WHILE)


@asynccontextmanager
async def connection(
    host: Host | None = None,
    *,
    heartbeat: float = HEARTBEAT,
    is_shared: bool = True,
    **behaviour: bool,
) -> AsyncIterator[tuple[Connection, Peer, Watch]]:
    async with line(**behaviour) as (ws, peer):
        watch = Watch(host or Host())
        made = Connection(
            ws,
            supervisor=watch.supervisor,
            host=watch.host,
            heartbeat=heartbeat,
            is_shared=is_shared,
            on_refused=watch.note_refusal,
        )
        made.on_lost = watch.note_loss
        yield made, peer, watch
        made.close()
        await until(lambda: made.reader.done())


async def until(condition: Any) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), WHILE)
