"""A lease, which the plugin sees as its WebSocket, behaves like one of aiohttp's."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.live.peer import PROTOCOL, Peer, connection, line, until, with_send_frame
from tests.unit.pool_kit import TakesBack
from xai_pool_patch.pool.entries import Acquired, Outcome
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.protocol.exchange import Exchange
from xai_pool_patch.protocol.lease import Lease

pytestmark = pytest.mark.usefixtures("no_tasks_left")

NOTE = '{"type":"note"}'
TEXT = '{"type":"text.delta","delta":"Hello"}'


def lease_of(live: Connection, pool: Any, acquire_fresh: Any = None) -> Lease:
    """Of a connection that was dialled for it, or of a reused one that can be replaced."""
    acquired = Acquired(
        live, waited=0.0, reused=acquire_fresh is not None, fresh=acquire_fresh is None
    )
    exchange = Exchange(
        acquired,
        pool,
        acquire_fresh=acquire_fresh or _never,
        on_replayed=_never if acquire_fresh is None else lambda *_: None,
    )
    return Lease(exchange, _never)


def _never(*_: object) -> Any:
    raise AssertionError("a fresh connection is not replaced")


@contextlib.asynccontextmanager
async def leased() -> AsyncIterator[tuple[Lease, Peer]]:
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        lease = lease_of(live, TakesBack())
        yield lease, peer
        lease.end(Outcome.INTERRUPTED)
        assert watch.faults == []


@pytest.fixture(params=["bare", "leased"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, Peer]]:
    """Both sides of a connection: aiohttp's own WebSocket or a lease, and the peer."""
    async with line() if request.param == "bare" else leased() as (ws, peer):
        yield ws, peer


Ends = tuple[aiohttp.ClientWebSocketResponse, Peer]


# As aiohttp has it


async def test_it_has_the_attributes_of_aiohttps_websocket(ends: Ends) -> None:
    """It is an instance of aiohttp's class, too."""
    ws, _ = ends
    assert isinstance(ws, aiohttp.ClientWebSocketResponse)
    assert (ws.closed, ws.close_code, ws.exception()) == (False, None, None)
    assert (ws.protocol, ws.compress, ws.client_notakeover) == (PROTOCOL, 0, False)
    assert ws.get_extra_info("peername")[0] == "127.0.0.1"
    assert ws.get_extra_info("shoe size", "not known") == "not known"


async def test_frames_sent_reach_the_peer(ends: Ends) -> None:
    """Text, JSON, bytes and PONGs, in order."""
    ws, peer = ends
    await ws.send_str(NOTE)
    await ws.send_json({"a": 1})
    await ws.send_bytes(b"\1")
    await ws.pong(b"\2")
    heard = [await peer.hears() for _ in range(4)]
    assert [(message.type, message.data) for message in heard] == [
        (WSMsgType.TEXT, NOTE),
        (WSMsgType.TEXT, '{"a": 1}'),
        (WSMsgType.BINARY, b"\1"),
        (WSMsgType.PONG, b"\2"),
    ]


@with_send_frame
async def test_send_frame_reaches_the_peer(ends: Ends) -> None:
    """And raises after the end, as aiohttp's does."""
    ws, peer = ends
    await ws.send_frame(b"\1", WSMsgType.BINARY)
    heard = await peer.hears()
    assert (heard.type, heard.data) == (WSMsgType.BINARY, b"\1")
    await ws.close()
    with pytest.raises(ConnectionResetError):
        await ws.send_frame(b"", WSMsgType.BINARY)


async def test_pings_and_pongs_reach_the_peer(ends: Ends) -> None:
    """With a payload and without."""
    ws, peer = ends
    peer.answers_pings = False
    await ws.ping(b"there?")
    await ws.ping()
    await ws.pong()
    heard = [await peer.hears() for _ in range(3)]
    assert [(message.type, message.data) for message in heard] == [
        (WSMsgType.PING, b"there?"),
        (WSMsgType.PING, b""),
        (WSMsgType.PONG, b""),
    ]


@pytest.mark.parametrize(
    "send",
    [
        lambda ws: ws.send_str(TEXT, 15),
        lambda ws: ws.send_bytes(TEXT.encode(), 15),
        pytest.param(
            lambda ws: ws.send_frame(TEXT.encode(), WSMsgType.TEXT, 15), marks=with_send_frame
        ),
    ],
)
async def test_the_compress_argument_reaches_the_socket(ends: Ends, send: Any) -> None:
    """The peer has not agreed to any, so it reports a protocol error."""
    ws, peer = ends
    await send(ws)
    heard = await peer.hears()
    assert (heard.type, heard.data.code) == (WSMsgType.ERROR, 1002)


async def test_each_receive_method_returns_its_type(ends: Ends) -> None:
    """And raises a TypeError for a message of another type."""
    ws, peer = ends
    await peer.ws.send_str(NOTE)
    await peer.ws.send_str(NOTE)
    await peer.ws.send_bytes(b"\1")
    await peer.ws.send_str(NOTE)
    assert (await ws.receive()).data == NOTE
    assert await ws.receive_json() == json.loads(NOTE)
    assert await ws.receive_bytes() == b"\1"
    with pytest.raises(TypeError, match="Received message"):
        await ws.receive_bytes()


async def test_iteration_ends_with_the_connection(ends: Ends) -> None:
    """Every receive() after that returns CLOSED."""
    ws, peer = ends
    await peer.ws.send_str(NOTE)
    closing = asyncio.create_task(peer.ws.close(code=1001))
    assert [message.data async for message in ws] == [NOTE]
    await closing
    await until(lambda: ws.closed)
    assert ws.close_code == 1001
    for _ in range(3):
        assert (await asyncio.wait_for(ws.receive(), 5.0)).type is WSMsgType.CLOSED


async def test_a_receive_that_times_out_loses_no_message(ends: Ends) -> None:
    """The next one returns it."""
    ws, peer = ends
    with pytest.raises(asyncio.TimeoutError):
        await ws.receive(timeout=0.01)
    await peer.ws.send_str(NOTE)
    assert await ws.receive_str(timeout=5.0) == NOTE


async def test_concurrent_receives_are_refused(ends: Ends) -> None:
    """The first one goes on undisturbed."""
    ws, peer = ends
    first = asyncio.create_task(ws.receive())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="Concurrent call to receive"):
        await ws.receive()
    await peer.ws.send_str(NOTE)
    assert (await first).data == NOTE
    await peer.ws.send_str(NOTE)
    assert (await ws.receive()).data == NOTE


async def test_after_a_cancelled_receive_another_may_follow(ends: Ends) -> None:
    """It loses no message."""
    ws, peer = ends
    first = asyncio.create_task(ws.receive())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    await peer.ws.send_str(NOTE)
    assert (await ws.receive()).data == NOTE


async def test_after_close_it_receives_closed_and_refuses_to_send(ends: Ends) -> None:
    """A second close() returns False."""
    ws, _ = ends
    assert await ws.close() is True
    assert ws.closed
    assert await ws.close() is False
    for _ in range(3):
        assert (await asyncio.wait_for(ws.receive(), 5.0)).type is WSMsgType.CLOSED
    for send in (ws.send_str, ws.send_bytes, ws.ping, ws.pong):
        with pytest.raises(ConnectionResetError):
            await send("" if send == ws.send_str else b"")  # type: ignore[arg-type,operator]


async def test_close_accepts_a_code_and_a_message(ends: Ends) -> None:
    """As aiohttp's does."""
    ws, _ = ends
    assert await ws.close(code=1001, message=b"going away")


async def test_leaving_the_context_closes_it(ends: Ends) -> None:
    """`async with` gives the object itself."""
    ws, _ = ends
    async with ws as entered:
        assert entered is ws
        assert not ws.closed
    assert ws.closed


# As the pool needs it


async def test_closing_a_lease_keeps_the_socket_open() -> None:
    """It ends the plugin's receive(). Only `end()` releases the connection."""
    async with connection() as (live, _, _):
        pool = TakesBack()
        lease = lease_of(live, pool)
        waiting = asyncio.create_task(lease.receive())
        await asyncio.sleep(0)
        await lease.close()
        assert (await waiting).type is WSMsgType.CLOSED
        assert (live.ws.closed, live.is_reusable, pool.came_back) == (False, True, [])
        lease.end(Outcome.FINISHED)
        assert pool.came_back == [Outcome.FINISHED]


@pytest.mark.parametrize("outcome", Outcome)
async def test_only_the_first_end_of_a_lease_counts(outcome: Outcome) -> None:
    """It gives the connection back; repr() shows the state."""
    async with connection() as (live, _, _):
        pool = TakesBack()
        lease = lease_of(live, pool)
        assert repr(lease) == "<Lease open <Exchange heard <Connection open leased clean>>>"
        await lease.close()
        lease.end(outcome)
        lease.end(Outcome.FAILED)
        assert pool.came_back == [outcome]
        assert lease.closed
        assert not live.ws.closed
        assert repr(lease) == "<Lease closed <Exchange heard <Connection open idle clean>>>"


async def test_a_lease_that_is_not_closed_belongs_to_the_application() -> None:
    """L1: with its connection, which it goes on to use and closes."""
    async with connection() as (live, peer, watch):
        pool = TakesBack()
        lease = lease_of(live, pool)
        lease.end(Outcome.FINISHED)
        lease.end(Outcome.FAILED)
        assert pool.came_back == ["given away"]
        assert not lease.closed
        await lease.send_str(TEXT)
        assert (await peer.hears()).data == TEXT
        await peer.ws.send_str('{"type":"error"}')
        assert await lease.receive_json() == {"type": "error"}
        await lease.close()
        assert (await peer.hears()).type is WSMsgType.CLOSE
        assert (pool.came_back, watch.faults) == (["given away"], [])


@pytest.mark.parametrize("outcome", [Outcome.INTERRUPTED, Outcome.FAILED])
async def test_what_was_cut_off_is_not_given_away(outcome: Outcome) -> None:
    """Nobody has a use for it."""
    async with connection() as (live, _, _):
        pool = TakesBack()
        lease = lease_of(live, pool)
        lease.end(outcome)
        assert (pool.came_back, lease.closed) == ([outcome], True)


async def test_a_fault_ends_the_utterance_as_the_network_does() -> None:
    """A4: LiveKit retries it, and the plugin's own connect carries the retry."""
    async with connection() as (live, _, _):
        lease, faults = lease_of(live, TakesBack()), list[tuple[str, Exception]]()
        lease.on_fault = lambda *fault: faults.append(fault)
        fault = ValueError("of ours")

        async def fails(*_: object) -> None:
            raise fault

        lease._exchange.send = fails  # type: ignore[method-assign,assignment]
        with pytest.raises(ConnectionResetError, match="xai_pool_patch failed"):
            await lease.send_str(TEXT)
        assert faults == [("send_str", fault)]
        lease.end(Outcome.FAILED)


async def test_messages_read_before_the_connection_ended_are_still_received() -> None:
    """None is lost."""
    async with connection() as (live, peer, _):
        lease = lease_of(live, TakesBack())
        await peer.ws.send_str(NOTE)
        await peer.ws.send_str(NOTE)
        peer.hangs_up()
        await until(lambda: live.reader.done())
        assert [message.data async for message in lease if message.type is WSMsgType.TEXT] == [
            NOTE,
            NOTE,
        ]


async def test_an_exception_in_the_inbox_is_raised_by_receive() -> None:
    """So a failed replay reaches the plugin."""
    async with connection() as (live, _, _):
        lease = lease_of(live, TakesBack())
        lease._exchange.inbox.put(ConnectionError("no replacement"))
        with pytest.raises(ConnectionError, match="no replacement"):
            await lease.receive()


async def test_it_is_not_closed_during_a_replay() -> None:
    """L1: whoever looks at `closed` before it goes on must not give up the utterance."""
    dialling = asyncio.get_running_loop().create_future()
    async with connection() as (dead, peer, watch), connection() as (live, other_peer, _):
        lease = lease_of(dead, TakesBack(), acquire_fresh=lambda: dialling)
        await lease.send_str(TEXT)
        peer.hangs_up()
        await until(lambda: watch.lost)
        assert not lease.closed
        dialling.set_result(Acquired(live, waited=0.1, reused=False, fresh=True))
        assert (await other_peer.hears()).data == TEXT
        assert not lease.closed
        other_peer.hangs_up()
        await until(lambda: lease.closed)
        lease.end(Outcome.FAILED)


async def test_a_send_that_fails_after_the_replay_does_not_reach_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L3: a full buffer held the frame up until its connection was replaced."""
    blocked = asyncio.Event()

    async def fails_late(*_: object) -> None:
        await blocked.wait()
        raise ConnectionResetError

    async with connection() as (dead, peer, _), connection() as (live, other_peer, _):
        monkeypatch.setattr(dead.ws, "send_str", fails_late)
        lease = lease_of(dead, TakesBack(), acquire_fresh=lambda: _returning(live))
        sending = asyncio.create_task(lease.send_str(TEXT))
        await until(lambda: lease._exchange._sent)

        await peer.ws.send_str('{"type":"error"}')
        assert (await other_peer.hears()).data == TEXT
        blocked.set()
        await sending
        lease.end(Outcome.FAILED)


async def _returning(live: Connection) -> Acquired[Connection]:
    return Acquired(live, waited=0.1, reused=False, fresh=True)
