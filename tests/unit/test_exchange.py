"""What one utterance does with its connection: in which order, and how it gives it back."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.clock import in_virtual_time
from tests.unit.pool_kit import TakesBack
from xai_pool_patch.pool.entries import Acquired, Outcome
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.protocol.exchange import Exchange
from xai_pool_patch.protocol.host import Host

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'


class Socket:
    """Keeps what is sent, and says nothing."""

    closed = False

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def receive(self) -> aiohttp.WSMessage:
        return await asyncio.get_running_loop().create_future()

    async def ping(self, token: bytes) -> None:
        self.sent.append("PING")

    async def send_str(self, frame: str, compress: int | None = None) -> None:
        self.sent.append(frame)


async def exchange_of(outcome: Outcome, *, fresh: bool) -> tuple[Socket, TakesBack]:
    socket: Any = Socket()
    pool: Any = TakesBack()
    connection = Connection(
        socket,
        supervisor=pool.supervisor,
        host=Host(),
        heartbeat=20.0,
        is_shared=True,
        on_refused=_never,
    )
    await asyncio.sleep(0)
    exchange = Exchange(
        Acquired(connection, waited=0.0, reused=not fresh, fresh=fresh),
        pool,
        acquire_fresh=_never,
        on_replayed=_never,
    )
    for frame in (TEXT, DONE):
        await exchange.send("send_str", frame, None)
    exchange.end(outcome)
    connection.reader.cancel()
    await asyncio.wait([connection.reader])
    return socket, pool


def _never(*_: object) -> Any:
    raise AssertionError("nothing has failed")


@pytest.mark.parametrize(
    ("fresh", "sent"), [(True, ["PING", TEXT, DONE]), (False, ["PING", "PING", TEXT, DONE])]
)
@in_virtual_time
async def test_a_ping_precedes_the_text_on_a_reused_connection(
    fresh: bool, sent: list[str]
) -> None:
    """Its PONG separates old audio from new. The first PING is the one of the dial."""
    socket, _ = await exchange_of(Outcome.FINISHED, fresh=fresh)
    assert socket.sent == sent


@pytest.mark.parametrize("outcome", Outcome)
@in_virtual_time
async def test_the_pool_hears_how_the_utterance_ended(outcome: Outcome) -> None:
    """It may clear a connection that was interrupted. After a failure it closes it."""
    _, pool = await exchange_of(outcome, fresh=True)
    assert pool.came_back == [outcome]
