"""One connection by itself: what its reader does with what comes, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.live.peer import HEARTBEAT, connection, until, with_send_frame
from xai_pool_patch.connection import (
    CLOSED_MESSAGE,
    SUSPICIOUS,
    TEXT_CLEAR,
    Connection,
    Heartbeat,
    State,
)
from xai_pool_patch.utterance import Stage

pytestmark = pytest.mark.usefixtures("no_tasks_left")

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'


def message(type_: str, **fields: str) -> str:
    return json.dumps({"type": type_, **fields})


async def cleared(live: Connection, peer: Any) -> None:
    """An utterance is under way, cut off, and the server says that nothing more comes."""
    await live.send_str(TEXT, None)
    assert (await peer.hears()).data == TEXT
    restoring = asyncio.create_task(live.restore())
    assert (await peer.hears()).data == TEXT_CLEAR
    await peer.ws.send_str(message("audio.clear"))
    await restoring
    assert live.is_reusable


# Liveness


async def test_the_first_ping_tells_the_round_trip() -> None:
    async with connection() as (live, _, _):
        opened_at = live.last_heard
        assert live.round_trip is None
        await until(lambda: live.round_trip is not None)
        assert live.last_heard > opened_at
        assert 0 < live.round_trip <= live.last_heard - opened_at  # type: ignore[operator]


async def test_a_pong_that_nobody_asked_for_is_a_sign_of_life_and_no_more() -> None:
    async with connection(answers_pings=False) as (live, peer, _):
        ping = await peer.hears()
        heard_at = live.last_heard
        await peer.ws.pong(b"unasked")
        await until(lambda: live.last_heard > heard_at)
        assert live.round_trip is None
        await peer.ws.pong(ping.data)
        await until(lambda: live.round_trip is not None)


async def test_only_the_last_ping_counts() -> None:
    async with connection(answers_pings=False) as (live, peer, _):
        first = await peer.hears()
        await live.ping()
        last = await peer.hears()
        heard_at = live.last_heard
        await peer.ws.pong(first.data)
        await until(lambda: live.last_heard > heard_at)
        assert live.round_trip is None
        await peer.ws.pong(last.data)
        await until(lambda: live.round_trip is not None)


async def test_a_server_that_answers_no_ping_is_not_held_to_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One connection alone may as well have vanished."""
    heartbeat = Heartbeat(HEARTBEAT)
    for expected in (HEARTBEAT, None, None):
        mute = connection(heartbeat, answers_pings=False, pinged_every=0.02)
        async with mute as (live, _, watch):
            await until(lambda: watch.lost)
            assert live.round_trip is None
        assert heartbeat.interval == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == ["PINGs are not answered, new connections go without"]


async def test_a_server_that_has_answered_a_ping_is_held_to_them() -> None:
    async with connection(pinged_every=0.02) as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        peer.answers_pings = False
        await until(lambda: watch.lost)
        assert watch.heartbeat.interval == HEARTBEAT


async def test_an_end_by_the_peer_says_nothing_of_pings() -> None:
    async with connection(answers_pings=False) as (_, peer, watch):
        await peer.hears()
        peer.hangs_up()
        await until(lambda: watch.lost)
        assert watch.heartbeat.interval == HEARTBEAT


async def test_a_pong_brings_the_heartbeat_back() -> None:
    async with connection() as (live, _, watch):
        for _ in range(SUSPICIOUS):
            watch.heartbeat.unanswered()
        assert watch.heartbeat.interval is None
        await until(lambda: live.round_trip is not None)
        assert watch.heartbeat.interval == HEARTBEAT


@pytest.mark.parametrize("leased", [True, False])
async def test_pings_of_the_peer_are_answered(leased: bool) -> None:
    async with connection() as (live, peer, watch):
        if leased:
            live.attach(watch.take)
        await peer.ws.ping(b"there?")
        answer = await peer.hears()
        assert (answer.type, answer.data) == (WSMsgType.PONG, b"there?")
        assert watch.taken.empty()


# Reading


async def test_the_sink_gets_what_is_read_while_it_is_attached() -> None:
    async with connection() as (live, peer, watch):
        await peer.ws.send_str(message("note", text="before"))
        await peer.ws.ping()
        await peer.hears()  # so it has been read
        live.attach(watch.take)
        await peer.ws.send_str(message("note", text="now"))
        taken, type_ = await watch.takes()
        assert (json.loads(taken.data)["text"], type_) == ("now", "note")
        live.detach()
        await peer.ws.send_str(message("note", text="after"))
        await peer.ws.ping()
        await peer.hears()
        assert watch.taken.empty()
        live.attach(watch.take)
        await peer.ws.send_bytes(b"\0")
        taken, type_ = await watch.takes()
        assert (taken.type, taken.data, type_) == (WSMsgType.BINARY, b"\0", "unreadable")


async def test_an_unknown_message_is_noted_while_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "xai_pool_patch")
    async with connection() as (live, peer, watch):
        await peer.ws.send_str(message("session.note"))
        await peer.ws.send_str(message("Dear Mr. Smith"))
        await peer.ws.ping()
        await peer.hears()
        assert live.is_reusable
        assert watch.lost == 0
        noted = [record for record in caplog.records if record.getMessage() == "ignored while idle"]
        assert [vars(record)["message_type"] for record in noted] == ["session.note", "?"]


@pytest.mark.parametrize(
    "frame", [message("audio.delta", delta=""), message("audio.done"), message("error"), "{", b"\0"]
)
async def test_what_spoils_an_idle_connection(frame: str | bytes) -> None:
    async with connection() as (live, peer, watch):
        await (peer.ws.send_str(frame) if isinstance(frame, str) else peer.ws.send_bytes(frame))
        await until(lambda: watch.lost)
        assert (live.state, live.is_reusable, live.broke_word) == (State.LOST, False, False)
        await until(lambda: live.is_over)
        assert watch.lost == 1


async def test_audio_that_nobody_asked_for_is_not_heard() -> None:
    async with connection() as (live, peer, watch):
        live.attach(watch.take)
        await peer.ws.send_str(message("audio.delta", delta=""))
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, watch.lost) == (State.LOST, 1)


async def test_an_error_during_an_utterance_is_for_the_plugin() -> None:
    async with connection() as (live, peer, watch):
        live.attach(watch.take)
        await live.send_str(TEXT, None)
        await peer.ws.send_str(message("error"))
        assert (await watch.takes())[1] == "error"
        assert (live.state, live.is_reusable, watch.lost) == (State.OPEN, False, 0)


@pytest.mark.parametrize("ends", ["Close", "reset"])
async def test_the_end_by_the_peer_is_told_to_both(ends: str) -> None:
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        live.attach(watch.take)
        if ends == "Close":
            await asyncio.gather(peer.ws.close(code=1001), until(lambda: watch.lost))
            assert (await watch.takes())[0].type is WSMsgType.CLOSE
        else:
            peer.hangs_up()
            assert (await watch.takes())[0].type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, live.is_over, watch.lost) == (State.LOST, True, 1)


async def test_a_fault_of_the_sink_ends_the_connection_and_is_told() -> None:
    fault = ValueError("of the sink")
    calls = []

    def fails(message: aiohttp.WSMessage, type_: str) -> None:
        calls.append(message)
        raise fault

    async with connection() as (live, peer, watch):
        live.attach(fails)
        await peer.ws.send_str(message("note"))
        await until(lambda: live.is_over)
        assert (watch.faults, watch.lost, live.state) == ([fault], 1, State.LOST)
        assert calls[1:] == [CLOSED_MESSAGE]


async def test_a_reader_that_is_cancelled_tells_only_the_sink() -> None:
    """The loop is ending: who hears of a loss would dial anew."""
    async with connection() as (live, _, watch):
        await until(lambda: live.round_trip is not None)
        live.attach(watch.take)
        live._reader.cancel()
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, watch.lost, watch.faults) == (State.LOST, 0, [])


# Sending


async def test_what_is_sent_arrives_and_is_followed() -> None:
    async with connection() as (live, peer, _):
        await live.send_str(TEXT, None)
        assert (await peer.hears()).data == TEXT
        assert live.utterance.stage is Stage.ASKED
        assert not live.is_reusable
        await live.send_bytes(b"\1", None)
        assert (await peer.hears()).data == b"\1"
        assert live.utterance.stage is Stage.SPOILED


@with_send_frame
async def test_a_frame_of_any_kind_arrives_and_spoils() -> None:
    async with connection() as (live, peer, _):
        await live.send_frame(DONE.encode(), WSMsgType.TEXT, None)
        heard = await peer.hears()
        assert (heard.type, heard.data) == (WSMsgType.TEXT, DONE)
        assert live.utterance.stage is Stage.SPOILED


@pytest.mark.parametrize(
    "send",
    [
        lambda live: live.send_str(TEXT, 15),
        lambda live: live.send_bytes(TEXT.encode(), 15),
        pytest.param(
            lambda live: live.send_frame(TEXT.encode(), WSMsgType.TEXT, 15), marks=with_send_frame
        ),
    ],
)
async def test_compression_reaches_the_wire(send: Any) -> None:
    """The peer has not agreed to any, and says so."""
    async with connection() as (live, peer, _):
        await send(live)
        heard = await peer.hears()
        assert (heard.type, heard.data.code) == (WSMsgType.ERROR, 1002)


# Restoring


async def test_a_clear_makes_it_reusable_again() -> None:
    async with connection() as (live, peer, watch):
        await cleared(live, peer)
        await peer.ws.send_str(message("audio.delta", delta=""))
        await until(lambda: watch.lost)
        assert live.broke_word


async def test_old_audio_does_not_end_the_wait_for_the_acknowledgement() -> None:
    async with connection() as (live, peer, watch):
        await live.send_str(TEXT, None)
        restoring = asyncio.create_task(live.restore())
        await peer.hears()
        await peer.hears()
        for type_ in ("audio.delta", "audio.done"):
            await peer.ws.send_str(message(type_))
        await peer.ws.ping()
        await peer.hears()
        assert not restoring.done()
        assert not live.is_reusable
        await peer.ws.send_str(message("audio.clear"))
        await restoring
        assert live.is_reusable
        assert watch.lost == 0


@pytest.mark.parametrize("answer", [message("error"), message("audio.done"), "{"])
async def test_any_other_answer_ends_the_wait(answer: str) -> None:
    async with connection() as (live, peer, _):
        restoring = asyncio.create_task(live.restore())
        await peer.hears()
        await peer.ws.send_str(answer)
        await asyncio.wait_for(restoring, 5.0)
        assert not live.is_reusable


@pytest.mark.parametrize("answer", ["Close", "reset"])
async def test_an_end_instead_of_an_acknowledgement(answer: str) -> None:
    async with connection() as (live, peer, watch):
        restoring = asyncio.create_task(live.restore())
        await peer.hears()
        if answer == "Close":
            await asyncio.gather(peer.ws.close(), restoring)
        else:
            peer.hangs_up()
            await restoring
        await until(lambda: live.is_over)
        assert (live.is_reusable, watch.lost, watch.faults) == (False, 1, [])


async def test_a_clear_into_a_dead_socket_ends_quietly() -> None:
    async with connection() as (live, peer, watch):
        peer.hangs_up()
        await until(lambda: watch.lost)
        await asyncio.wait_for(live.restore(), 5.0)
        assert (live.is_reusable, watch.faults) == (False, [])


async def test_a_fault_while_clearing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ValueError("of ours")

    async def fails(*_: object) -> None:
        raise fault

    async with connection() as (live, _, watch):
        with monkeypatch.context() as patch:
            patch.setattr(live.ws, "send_str", fails)
            await live.restore()
        assert watch.faults == [fault]


async def test_one_that_cannot_be_cleared_is_not_waited_for() -> None:
    async with connection() as (live, _, _):
        await live.send_bytes(b"", None)
        await asyncio.wait_for(live.restore(), 5.0)
        assert not live.is_reusable


async def test_who_gives_up_the_wait_lets_go_of_the_connection() -> None:
    async with connection() as (live, peer, _):
        restoring = asyncio.create_task(live.restore())
        await peer.hears()
        assert "leased" in repr(live)
        restoring.cancel()
        await asyncio.wait([restoring])
        assert "idle" in repr(live)


async def test_audio_ahead_of_the_pong_is_old_on_a_connection_that_was_cleared() -> None:
    async with connection() as (live, peer, watch):
        await cleared(live, peer)
        peer.answers_pings = False
        live.attach(watch.take)
        await live.ping()
        await live.send_str(TEXT, None)
        await peer.hears()
        await peer.ws.send_str(message("audio.delta", delta=""))
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, live.broke_word, watch.lost) == (State.LOST, True, 1)


async def test_audio_behind_the_pong_is_new() -> None:
    async with connection() as (live, peer, watch):
        await cleared(live, peer)
        live.attach(watch.take)
        await live.ping()
        await live.send_str(TEXT, None)
        await peer.hears()
        await peer.ws.send_str(message("note"))
        await peer.ws.send_str(message("audio.delta", delta=""))
        assert [(await watch.takes())[1], (await watch.takes())[1]] == ["note", "audio.delta"]
        assert (live.state, live.broke_word) == (State.OPEN, False)


async def test_no_pong_is_relied_on_where_nothing_was_cleared() -> None:
    async with connection(answers_pings=False) as (live, peer, watch):
        live.attach(watch.take)
        await live.ping()
        await live.send_str(TEXT, None)
        await peer.ws.send_str(message("audio.delta", delta=""))
        assert (await watch.takes())[1] == "audio.delta"


# Closing


async def test_closing_says_so_and_waits_for_the_answer() -> None:
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        live.attach(watch.take)
        closing = live.close()
        assert closing is not None
        assert live.close() is closing
        assert (live.state, live.is_reusable) == (State.CLOSING, False)
        await closing
        heard = await peer.hears()
        assert (heard.type, heard.data) == (WSMsgType.CLOSE, 1000)
        assert (live.state, live.is_over, watch.lost) == (State.CLOSING, True, 0)
        taken = [watch.taken.get_nowait() for _ in range(watch.taken.qsize())]
        assert taken[-1] == (CLOSED_MESSAGE, "")


async def test_a_peer_that_does_not_answer_is_dropped() -> None:
    async with connection(answers_close=False, close_timeout=0.05) as (live, _, _):
        socket = live.ws.get_extra_info("socket")
        began = asyncio.get_running_loop().time()
        closing = live.close()
        assert closing is not None
        await asyncio.wait_for(closing, 5.0)  # aiohttp itself would wait for ten
        assert asyncio.get_running_loop().time() - began >= 0.05
        assert live.is_over
        await until(lambda: socket.fileno() == -1)


async def test_one_that_the_peer_has_closed_needs_no_closing() -> None:
    async with connection() as (live, peer, watch):
        await asyncio.gather(peer.ws.close(), until(lambda: watch.lost))
        assert live.close() is None
        assert live.state is State.LOST


@pytest.mark.parametrize("by_the_peer", [False, True])
async def test_a_transport_that_has_nothing_left_to_abort(
    monkeypatch: pytest.MonkeyPatch, by_the_peer: bool
) -> None:
    """In Python 3.11.2 a TLS transport that was closed twice raises."""

    def abort() -> None:
        raise AttributeError("'NoneType' object has no attribute '_abort'")

    async with connection() as (live, peer, watch):
        monkeypatch.setattr(live, "_transport", SimpleNamespace(abort=abort))
        if by_the_peer:
            await asyncio.gather(peer.ws.close(), until(lambda: watch.lost))
            assert live.close() is None
        else:
            closing = live.close()
            assert closing is not None
            await closing
        assert watch.faults == []


async def test_a_cancelled_close_drops_the_socket() -> None:
    async with connection(answers_close=False) as (live, peer, _):
        socket = live.ws.get_extra_info("socket")
        closing = live.close()
        assert closing is not None
        assert (await peer.hears()).type is WSMsgType.CLOSE
        closing.cancel()
        await asyncio.wait([closing])
        await until(lambda: live.is_over)
        await until(lambda: socket.fileno() == -1)


async def test_a_close_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "xai_pool_patch")

    async def fails() -> bool:
        raise ConnectionResetError("in the middle of it")

    async with connection() as (live, _, _):
        socket = live.ws.get_extra_info("socket")
        with monkeypatch.context() as patch:
            patch.setattr(live.ws, "close", fails)
            closing = live.close()
            assert closing is not None
            await closing
        await until(lambda: socket.fileno() == -1)
        [told] = [record for record in caplog.records if record.getMessage() == "close cut short"]
        assert vars(told)["error"].startswith("ConnectionResetError at fails")


async def test_repr() -> None:
    async with connection() as (live, _, watch):
        assert repr(live) == "<Connection open idle clean>"
        live.attach(watch.take)
        await live.send_str(TEXT, None)
        assert repr(live) == "<Connection open leased asked>"
