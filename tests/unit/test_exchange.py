"""What one utterance does with its connection: in which order, and how it gives it back."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.unit.pool_kit import TakesBack, no_fault
from tests.virtual import run
from xai_pool_patch.pool.pool import Acquired, Reason
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.protocol.connection import Connection, Heartbeat
from xai_pool_patch.protocol.exchange import Exchange, Frame
from xai_pool_patch.protocol.first_audio import FirstAudio

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


def exchange_of(cut_off: Reason | None, *, fresh: bool) -> tuple[Socket, TakesBack]:
    socket: Any = Socket()
    pool: Any = TakesBack()

    async def utterance() -> None:
        supervisor = Supervisor(no_fault, close_timeout=1.0)
        connection = Connection(
            socket,
            supervisor=supervisor,
            heartbeat=Heartbeat(20.0),
            close_timeout=1.0,
            on_rate_limited=_raise,
        )
        await asyncio.sleep(0)
        frames: list[Frame] = []
        exchange = Exchange(
            Acquired(connection, waited=0.0, reused=not fresh, fresh=fresh),
            pool,
            frames,
            supervisor=supervisor,
            acquire_fresh=_no_replay,
            first_audio=FirstAudio(5.0),
            on_replayed=_raise,
        )
        for frame in (TEXT, DONE):
            frames.append(Frame("send_str", (frame, None), {}))
            await exchange.send()
        exchange.end(cut_off)
        connection.reader.cancel()
        await asyncio.wait([connection.reader])

    run(utterance())
    return socket, pool


async def _no_replay() -> Any:
    raise AssertionError("nothing has failed")


def _raise(fault: object, _: object) -> None:
    raise AssertionError(fault)


@pytest.mark.parametrize(
    ("fresh", "sent"), [(True, ["PING", TEXT, DONE]), (False, ["PING", "PING", TEXT, DONE])]
)
def test_a_ping_leaves_ahead_of_the_text(fresh: bool, sent: list[str]) -> None:
    """Of a connection that was used before: its PONG comes between old audio and new.

    The first PING is that of the dial.
    """
    socket, _ = exchange_of(None, fresh=fresh)
    assert socket.sent == sent


@pytest.mark.parametrize(
    ("cut_off", "comes_back"),
    [
        (None, "released"),
        (Reason.INTERRUPTED, "released cut off"),
        (Reason.FAILED, Reason.FAILED),
    ],
)
def test_only_an_interruption_is_worth_a_clear(cut_off: Reason | None, comes_back: Any) -> None:
    """What ended otherwise proves nothing good of its connection."""
    _, pool = exchange_of(cut_off, fresh=True)
    assert pool.came_back == [comes_back]
