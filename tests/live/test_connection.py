"""One connection by itself: what its reader does with what comes, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.live.peer import HEARTBEAT, Peer, Watch, connection, until
from xai_pool_patch.protocol.connection import (
    CLOSED_MESSAGE,
    SUSPICIOUS,
    TEXT_CLEAR,
    Connection,
    Heartbeat,
    State,
)
from xai_pool_patch.protocol.utterance import Stage

pytestmark = pytest.mark.usefixtures("no_tasks_left")

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'


def message(type_: str, **fields: str) -> str:
    return json.dumps({"type": type_, **fields})


async def say(live: Connection, frame: str) -> None:
    live.sending(frame)
    await live.ws.send_str(frame)


async def cleared(live: Connection, peer: Any) -> None:
    """An utterance is under way, cut off, and the server says that nothing more comes."""
    await say(live, TEXT)
    assert (await peer.hears()).data == TEXT
    clearing = asyncio.create_task(live.clear())
    assert (await peer.hears()).data == TEXT_CLEAR
    await peer.ws.send_str(message("audio.clear"))
    await clearing
    assert live.is_reusable


async def answered(live: Connection, peer: Any) -> None:
    """An utterance has been spoken to its end."""
    for frame in (TEXT, DONE):
        await say(live, frame)
        assert (await peer.hears()).data == frame
    for answer in (NEW, message("audio.done")):
        await peer.ws.send_str(answer)
    await until(lambda: live.is_reusable)


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
    assert caplog.messages == ["PINGs unanswered, heartbeat off"]


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
        assert [vars(record)["xai_pool_message_type"] for record in noted] == ["session.note", "?"]


@pytest.mark.parametrize(
    "frame", [message("audio.delta", delta=""), message("audio.done"), message("error"), "{", b"\0"]
)
async def test_what_spoils_an_idle_connection(frame: str | bytes) -> None:
    async with connection() as (live, peer, watch):
        await (peer.ws.send_str(frame) if isinstance(frame, str) else peer.ws.send_bytes(frame))
        await until(lambda: watch.lost)
        assert (live.state, live.is_reusable, live.sent_stale_audio) == (State.LOST, False, False)
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
        await say(live, TEXT)
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


async def test_a_fault_of_the_sink_ends_the_reading_and_is_told() -> None:
    """Whoever hears of it ends all else: no new connection is dialled in its place."""
    fault = ValueError("of the sink")
    calls = []

    def fails(message: aiohttp.WSMessage, type_: str) -> None:
        calls.append(message)
        raise fault

    async with connection() as (live, peer, watch):
        live.attach(fails)
        await peer.ws.send_str(message("note"))
        await until(lambda: live.is_over)
        assert (watch.faults[0], watch.lost, live.state) == (fault, 0, State.LOST)
        assert calls[1:] == [CLOSED_MESSAGE]


async def test_a_reader_that_is_cancelled_tells_only_the_sink() -> None:
    """The loop is ending: who hears of a loss would dial anew."""
    async with connection() as (live, _, watch):
        await until(lambda: live.round_trip is not None)
        live.attach(watch.take)
        live.reader.cancel()
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, watch.lost, watch.faults) == (State.LOST, 0, [])


# Sending


async def test_what_is_sent_arrives_and_is_followed() -> None:
    async with connection() as (live, peer, _):
        await say(live, TEXT)
        assert (await peer.hears()).data == TEXT
        assert live.utterance.stage is Stage.ASKED
        assert not live.is_reusable
        live.sending(b"\1")
        await live.ws.send_bytes(b"\1")
        assert (await peer.hears()).data == b"\1"
        assert live.utterance.stage is Stage.DIRTY


# Restoring


async def test_a_clear_makes_it_reusable_again() -> None:
    async with connection() as (live, peer, watch):
        await cleared(live, peer)
        await peer.ws.send_str(message("audio.delta", delta=""))
        await until(lambda: watch.lost)
        assert live.sent_stale_audio


async def test_old_audio_does_not_end_the_wait_for_the_acknowledgement() -> None:
    async with connection() as (live, peer, watch):
        await say(live, TEXT)
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        await peer.hears()
        for type_ in ("audio.delta", "audio.done"):
            await peer.ws.send_str(message(type_))
        await peer.ws.ping()
        await peer.hears()
        assert not clearing.done()
        assert not live.is_reusable
        await peer.ws.send_str(message("audio.clear"))
        await clearing
        assert live.is_reusable
        assert watch.lost == 0


@pytest.mark.parametrize("answer", [message("error"), message("audio.done"), "{"])
async def test_any_other_answer_ends_the_wait(answer: str) -> None:
    async with connection() as (live, peer, _):
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        await peer.ws.send_str(answer)
        await asyncio.wait_for(clearing, 5.0)
        assert not live.is_reusable


@pytest.mark.parametrize("answer", ["Close", "reset"])
async def test_an_end_instead_of_an_acknowledgement(answer: str) -> None:
    async with connection() as (live, peer, watch):
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        if answer == "Close":
            await asyncio.gather(peer.ws.close(), clearing)
        else:
            peer.hangs_up()
            await clearing
        await until(lambda: live.is_over)
        assert (live.is_reusable, watch.lost, watch.faults) == (False, 1, [])


async def test_a_clear_into_a_dead_socket_ends_quietly() -> None:
    async with connection() as (live, peer, watch):
        peer.hangs_up()
        await until(lambda: watch.lost)
        await asyncio.wait_for(live.clear(), 5.0)
        assert (live.is_reusable, watch.faults) == (False, [])


async def test_a_fault_while_clearing_is_the_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ValueError("of ours")

    async def fails(*_: object) -> None:
        raise fault

    async with connection() as (live, _, _):
        with monkeypatch.context() as patch:
            patch.setattr(live.ws, "send_str", fails)
            with pytest.raises(ValueError, match="of ours"):
                await live.clear()
        assert "idle" in repr(live)


async def test_one_that_cannot_be_cleared_is_not_waited_for() -> None:
    async with connection() as (live, _, _):
        live.sending(b"")
        await asyncio.wait_for(live.clear(), 5.0)
        assert not live.is_reusable


async def test_who_gives_up_the_wait_lets_go_of_the_connection() -> None:
    async with connection() as (live, peer, _):
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        assert "leased" in repr(live)
        clearing.cancel()
        await asyncio.wait([clearing])
        assert "idle" in repr(live)


# Telling old audio from new

LONG, SHORT = 5.0, 0.05
OLD, NEW = message("audio.delta", delta="b2xk"), message("audio.delta", delta="bmV3")


@asynccontextmanager
async def asked(
    *, clear: bool = False, patience: float = LONG
) -> AsyncIterator[tuple[Connection, Peer, Watch, bytes]]:
    """An utterance begins on a connection that was used before; its PING is answered by hand."""
    async with connection() as (live, peer, watch):
        if clear:
            await cleared(live, peer)
        else:
            await answered(live, peer)
        await until(lambda: live.round_trip is not None)
        peer.answers_pings = False
        live.attach(watch.take)
        live.on_stale_audio = watch.note_stale_audio

        def lost() -> None:  # as a pool does
            watch.note_loss()
            live.close()

        live.on_lost = lost
        await live.ping_as_fence(patience)
        await say(live, TEXT)
        ping = await peer.hears()
        assert (await peer.hears()).data == TEXT
        yield live, peer, watch, ping.data


@pytest.mark.parametrize("clear", [False, True])
async def test_audio_ahead_of_the_pong_is_old_and_dropped(
    clear: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It left the server before that knew of the text. After a clear, it broke its word, too."""
    caplog.set_level(logging.INFO, "xai_pool_patch")
    async with asked(clear=clear) as (live, peer, watch, ping):
        for old in (OLD, message("audio.done"), message("note")):
            await peer.ws.send_str(old)
        assert (await watch.takes())[1] == "note"
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, live.utterance.stage) == (State.OPEN, Stage.SPEAKING)
        assert (watch.stale_audio, watch.lost) == (clear, 0)
        assert caplog.messages == ["stale audio dropped"]


@pytest.mark.parametrize("clear", [False, True])
async def test_audio_behind_the_pong_is_new(clear: bool) -> None:
    async with asked(clear=clear) as (live, peer, watch, ping):
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, watch.stale_audio, watch.lost) == (State.OPEN, 0, 0)


async def test_audio_is_heard_in_order_when_the_pong_does_not_come() -> None:
    """And no PONG of that server is relied on from then on."""
    async with asked(patience=SHORT) as (live, peer, watch, ping):
        await peer.ws.send_str(OLD)
        await peer.ws.send_str(NEW)
        assert [(await watch.takes())[0].data for _ in range(2)] == [OLD, NEW]
        await peer.ws.pong(ping)
        await live.ping_as_fence(LONG)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, watch.stale_audio, watch.lost) == (State.OPEN, 0, 0)


async def test_a_pong_that_is_late_like_everything_else_says_nothing_of_the_next() -> None:
    """A stall of the network holds up the audio too."""
    async with asked(patience=SHORT) as (live, peer, watch, _):
        await until(lambda: live._fence is None)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        await live.ping_as_fence(LONG)
        await peer.ws.send_str(OLD)
        await peer.ws.pong((await peer.hears()).data)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW


@pytest.mark.parametrize("when", ["in time", "late"])
async def test_without_a_pong_nothing_is_heard_after_a_clear(when: str) -> None:
    """That nothing more comes of what was cleared is the server's word alone."""
    async with asked(clear=True, patience=SHORT) as (live, peer, watch, _):
        if when == "late":
            await until(lambda: live._fence is not None and live._fence.is_overdue)
        await peer.ws.send_str(OLD)
        await until(lambda: live.is_over)
        types = [watch.taken.get_nowait()[1] for _ in range(watch.taken.qsize())]
        assert not any(types), "audio was heard"
        assert (live.state, live.sent_stale_audio, watch.lost) == (State.LOST, True, 1)


async def test_held_audio_of_a_connection_that_ends_is_not_heard() -> None:
    async with asked() as (live, peer, watch, _):
        await peer.ws.send_str(OLD)
        peer.hangs_up()
        assert (await watch.takes())[0].type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert live.state is State.LOST


@pytest.mark.parametrize("is_spare", [True, False])
async def test_audio_ahead_of_the_pong_is_new_on_a_connection_without_a_past(
    is_spare: bool,
) -> None:
    """There, nothing can be old: what is late is the PONG, and none is relied on again."""
    async with connection(answers_pings=is_spare) as (live, peer, watch):
        if is_spare:
            await until(lambda: live.round_trip is not None)
        peer.answers_pings = False
        live.attach(watch.take)
        if is_spare:
            await live.ping_as_fence(LONG)
        ping = await peer.hears()
        await say(live, TEXT)
        await say(live, DONE)
        await peer.ws.send_str(NEW)
        await peer.ws.pong(ping.data)
        await peer.ws.send_str(message("audio.done"))
        assert [(await watch.takes())[1] for _ in range(2)] == ["audio.delta", "audio.done"]
        await until(lambda: live.is_reusable)
        await live.ping_as_fence(LONG)
        await say(live, TEXT)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW


async def test_a_later_ping_does_not_move_the_fence() -> None:
    """Between the two PONGs comes what the text was answered with."""
    async with asked() as (live, peer, watch, ping):
        await live.ping()
        later = await peer.hears()
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        await peer.ws.pong(later.data)
        assert (await watch.takes())[0].data == NEW


async def test_no_pong_is_relied_on_where_none_has_come() -> None:
    async with connection(answers_pings=False) as (live, peer, watch):
        await peer.hears()  # the first PING
        await answered(live, peer)
        live.attach(watch.take)
        await live.ping_as_fence(LONG)
        await say(live, TEXT)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW


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
        [told] = [record for record in caplog.records if record.getMessage() == "close failed"]
        assert vars(told)["xai_pool_error"].startswith("ConnectionResetError at fails")


async def test_repr() -> None:
    async with connection() as (live, _, watch):
        assert repr(live) == "<Connection open idle clean>"
        live.attach(watch.take)
        await say(live, TEXT)
        assert repr(live) == "<Connection open leased asked>"
