"""One connection by itself: what its reader does with each message, and how it ends."""

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


async def test_the_first_pong_gives_the_round_trip() -> None:
    """Unknown until then."""
    async with connection() as (live, _, _):
        opened_at = live.last_heard
        assert live.round_trip is None
        await until(lambda: live.round_trip is not None)
        assert live.last_heard > opened_at
        assert 0 < live.round_trip <= live.last_heard - opened_at  # type: ignore[operator]


async def test_an_unsolicited_pong_is_only_a_sign_of_life() -> None:
    """It gives no round trip; the PONG to our PING does."""
    async with connection(answers_pings=False) as (live, peer, _):
        ping = await peer.hears()
        heard_at = live.last_heard
        await peer.ws.pong(b"unasked")
        await until(lambda: live.last_heard > heard_at)
        assert live.round_trip is None
        await peer.ws.pong(ping.data)
        await until(lambda: live.round_trip is not None)


async def test_only_the_pong_to_the_last_ping_counts() -> None:
    """An older one gives no round trip."""
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


async def test_the_heartbeat_stops_for_a_server_that_never_answers_pings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After the second lost connection: a single one may as well have vanished."""
    heartbeat = Heartbeat(HEARTBEAT)
    for expected in (HEARTBEAT, None, None):
        mute = connection(heartbeat, answers_pings=False, pinged_every=0.02)
        async with mute as (live, _, watch):
            await until(lambda: watch.lost)
            assert live.round_trip is None
        assert heartbeat.interval == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == ["PINGs unanswered, heartbeat off"]


async def test_the_heartbeat_goes_on_for_a_server_that_has_answered_a_ping() -> None:
    """The connection is lost when the PONGs stop."""
    async with connection(pinged_every=0.02) as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        peer.answers_pings = False
        await until(lambda: watch.lost)
        assert watch.heartbeat.interval == HEARTBEAT


async def test_a_connection_ended_by_its_peer_does_not_count_as_an_unanswered_ping() -> None:
    """The heartbeat goes on."""
    async with connection(answers_pings=False) as (_, peer, watch):
        await peer.hears()
        peer.hangs_up()
        await until(lambda: watch.lost)
        assert watch.heartbeat.interval == HEARTBEAT


async def test_a_pong_restarts_the_heartbeat() -> None:
    """After it was stopped for want of PONGs."""
    async with connection() as (live, _, watch):
        for _ in range(SUSPICIOUS):
            watch.heartbeat.unanswered()
        assert watch.heartbeat.interval is None
        await until(lambda: live.round_trip is not None)
        assert watch.heartbeat.interval == HEARTBEAT


@pytest.mark.parametrize("leased", [True, False])
async def test_pings_of_the_peer_are_answered(leased: bool) -> None:
    """Idle or leased, and the sink does not see them."""
    async with connection() as (live, peer, watch):
        if leased:
            live.attach(watch.take)
        await peer.ws.ping(b"there?")
        answer = await peer.hears()
        assert (answer.type, answer.data) == (WSMsgType.PONG, b"there?")
        assert watch.taken.empty()


# Reading


async def test_the_sink_gets_only_messages_read_while_it_is_attached() -> None:
    """With their type; what comes before and after is not kept for it."""
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


async def test_an_unknown_message_on_an_idle_connection_is_logged_and_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With its type, if that looks like one: it must not contain spoken text."""
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
async def test_audio_errors_and_unreadable_messages_end_an_idle_connection(
    frame: str | bytes,
) -> None:
    """It is lost at once, and once only."""
    async with connection() as (live, peer, watch):
        await (peer.ws.send_str(frame) if isinstance(frame, str) else peer.ws.send_bytes(frame))
        await until(lambda: watch.lost)
        assert (live.state, live.is_reusable, live.sent_stale_audio) == (State.LOST, False, False)
        await until(lambda: live.is_over)
        assert watch.lost == 1


async def test_audio_before_any_text_is_not_heard() -> None:
    """The sink gets the end of the connection instead."""
    async with connection() as (live, peer, watch):
        live.attach(watch.take)
        await peer.ws.send_str(message("audio.delta", delta=""))
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, watch.lost) == (State.LOST, 1)


async def test_an_error_during_an_utterance_goes_to_the_sink() -> None:
    """The connection stays open, and is not reusable."""
    async with connection() as (live, peer, watch):
        live.attach(watch.take)
        await say(live, TEXT)
        await peer.ws.send_str(message("error"))
        assert (await watch.takes())[1] == "error"
        assert (live.state, live.is_reusable, watch.lost) == (State.OPEN, False, 0)


@pytest.mark.parametrize("ends", ["Close", "reset"])
async def test_the_sink_and_the_pool_learn_of_an_end_by_the_peer(ends: str) -> None:
    """By a Close frame or by a reset."""
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


async def test_a_fault_of_the_sink_ends_the_reader_and_is_reported() -> None:
    """It does not count as lost: the pool must not dial a replacement."""
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


async def test_a_cancelled_reader_informs_only_the_sink() -> None:
    """The loop is ending: if the pool learned of a loss, it would dial anew."""
    async with connection() as (live, _, watch):
        await until(lambda: live.round_trip is not None)
        live.attach(watch.take)
        live.reader.cancel()
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, watch.lost, watch.faults) == (State.LOST, 0, [])


# Sending


async def test_each_frame_sent_advances_the_stage_of_the_utterance() -> None:
    """A binary frame is outside the protocol, so it leaves the connection dirty."""
    async with connection() as (live, peer, _):
        await say(live, TEXT)
        assert (await peer.hears()).data == TEXT
        assert live.utterance.stage is Stage.ASKED
        assert not live.is_reusable
        live.sending(b"\1")
        await live.ws.send_bytes(b"\1")
        assert (await peer.hears()).data == b"\1"
        assert live.utterance.stage is Stage.DIRTY


# Clearing


async def test_an_acknowledged_clear_makes_the_connection_reusable() -> None:
    """Audio after that marks the connection as having sent stale audio."""
    async with connection() as (live, peer, watch):
        await cleared(live, peer)
        await peer.ws.send_str(message("audio.delta", delta=""))
        await until(lambda: watch.lost)
        assert live.sent_stale_audio


async def test_old_audio_does_not_end_the_wait_for_the_acknowledgement() -> None:
    """Nor does the `audio.done` of the utterance that was cleared."""
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
async def test_any_other_answer_to_a_clear_ends_the_wait(answer: str) -> None:
    """The connection is not reusable."""
    async with connection() as (live, peer, _):
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        await peer.ws.send_str(answer)
        await asyncio.wait_for(clearing, 5.0)
        assert not live.is_reusable


@pytest.mark.parametrize("answer", ["Close", "reset"])
async def test_the_end_of_the_connection_ends_the_wait_for_an_acknowledgement(answer: str) -> None:
    """By a Close frame or by a reset; the pool learns of it once."""
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


async def test_a_clear_on_a_dead_socket_ends_at_once() -> None:
    """It is no fault of the package."""
    async with connection() as (live, peer, watch):
        peer.hangs_up()
        await until(lambda: watch.lost)
        await asyncio.wait_for(live.clear(), 5.0)
        assert (live.is_reusable, watch.faults) == (False, [])


async def test_a_fault_during_a_clear_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor of the task reports it. The connection has no sink any more."""
    fault = ValueError("of ours")

    async def fails(*_: object) -> None:
        raise fault

    async with connection() as (live, _, _):
        with monkeypatch.context() as patch:
            patch.setattr(live.ws, "send_str", fails)
            with pytest.raises(ValueError, match="of ours"):
                await live.clear()
        assert "idle" in repr(live)


async def test_a_dirty_connection_is_not_cleared() -> None:
    """clear() returns at once."""
    async with connection() as (live, _, _):
        live.sending(b"")
        await asyncio.wait_for(live.clear(), 5.0)
        assert not live.is_reusable


async def test_a_cancelled_clear_releases_the_connection() -> None:
    """Its sink is detached."""
    async with connection() as (live, peer, _):
        clearing = asyncio.create_task(live.clear())
        await peer.hears()
        assert "leased" in repr(live)
        clearing.cancel()
        await asyncio.wait([clearing])
        assert "idle" in repr(live)


# Old audio and new

LONG, SHORT = 5.0, 0.05
OLD, NEW = message("audio.delta", delta="b2xk"), message("audio.delta", delta="bmV3")


@asynccontextmanager
async def asked(
    *, clear: bool = False, timeout: float = LONG
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
        await live.ping_as_fence(timeout)
        await say(live, TEXT)
        ping = await peer.hears()
        assert (await peer.hears()).data == TEXT
        yield live, peer, watch, ping.data


@pytest.mark.parametrize("clear", [False, True])
async def test_audio_ahead_of_the_pong_is_old_and_dropped(
    clear: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It left the server before the text arrived. After a clear it also shows a wrong
    acknowledgement."""
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
async def test_audio_behind_the_pong_is_heard(clear: bool) -> None:
    """The server sent it after the text arrived."""
    async with asked(clear=clear) as (live, peer, watch, ping):
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, watch.stale_audio, watch.lost) == (State.OPEN, 0, 0)


async def test_held_audio_is_heard_in_order_when_no_pong_comes() -> None:
    """And no PONG of that server is waited for from then on."""
    async with asked(timeout=SHORT) as (live, peer, watch, ping):
        await peer.ws.send_str(OLD)
        await peer.ws.send_str(NEW)
        assert [(await watch.takes())[0].data for _ in range(2)] == [OLD, NEW]
        await peer.ws.pong(ping)
        await live.ping_as_fence(LONG)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, watch.stale_audio, watch.lost) == (State.OPEN, 0, 0)


async def test_after_a_late_pong_behind_late_audio_the_next_pong_still_counts() -> None:
    """A stall of the network holds up both."""
    async with asked(timeout=SHORT) as (live, peer, watch, _):
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
    """Only the acknowledgement says that nothing more of the old utterance comes."""
    async with asked(clear=True, timeout=SHORT) as (live, peer, watch, _):
        if when == "late":
            await until(lambda: live._fence is not None and live._fence.is_overdue)
        await peer.ws.send_str(OLD)
        await until(lambda: live.is_over)
        types = [watch.taken.get_nowait()[1] for _ in range(watch.taken.qsize())]
        assert not any(types), "audio was heard"
        assert (live.state, live.sent_stale_audio, watch.lost) == (State.LOST, True, 1)


async def test_held_audio_is_not_heard_when_the_connection_ends() -> None:
    """Nobody knows whether it is old."""
    async with asked() as (live, peer, watch, _):
        await peer.ws.send_str(OLD)
        peer.hangs_up()
        assert (await watch.takes())[0].type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert live.state is State.LOST


@pytest.mark.parametrize("is_spare", [True, False])
async def test_audio_ahead_of_the_pong_is_heard_on_an_unused_connection(
    is_spare: bool,
) -> None:
    """None of it can be old. The PONG was late, so no PONG is waited for again."""
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


async def test_only_the_pong_to_the_ping_of_the_text_separates_old_from_new() -> None:
    """A later PING may be answered after the first new audio."""
    async with asked() as (live, peer, watch, ping):
        await live.ping()
        later = await peer.hears()
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        await peer.ws.pong(later.data)
        assert (await watch.takes())[0].data == NEW


async def test_no_pong_is_waited_for_where_none_has_ever_come() -> None:
    """Audio is heard at once."""
    async with connection(answers_pings=False) as (live, peer, watch):
        await peer.hears()  # the first PING
        await answered(live, peer)
        live.attach(watch.take)
        await live.ping_as_fence(LONG)
        await say(live, TEXT)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW


# Closing


async def test_close_sends_a_close_frame_and_waits_for_the_answer() -> None:
    """A second close() returns the same task, and the sink gets the end."""
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


async def test_a_peer_that_does_not_answer_the_close_is_aborted() -> None:
    """After close_timeout."""
    async with connection(answers_close=False, close_timeout=0.05) as (live, _, _):
        socket = live.ws.get_extra_info("socket")
        began = asyncio.get_running_loop().time()
        closing = live.close()
        assert closing is not None
        await asyncio.wait_for(closing, 5.0)  # aiohttp itself would wait for ten
        assert asyncio.get_running_loop().time() - began >= 0.05
        assert live.is_over
        await until(lambda: socket.fileno() == -1)


async def test_closing_a_connection_that_the_peer_has_closed_does_nothing() -> None:
    """close() returns None."""
    async with connection() as (live, peer, watch):
        await asyncio.gather(peer.ws.close(), until(lambda: watch.lost))
        assert live.close() is None
        assert live.state is State.LOST


@pytest.mark.parametrize("by_the_peer", [False, True])
async def test_an_abort_that_raises_is_no_fault(
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


async def test_a_cancelled_close_aborts_the_socket() -> None:
    """No socket outlives the loop."""
    async with connection(answers_close=False) as (live, peer, _):
        socket = live.ws.get_extra_info("socket")
        closing = live.close()
        assert closing is not None
        assert (await peer.hears()).type is WSMsgType.CLOSE
        closing.cancel()
        await asyncio.wait([closing])
        await until(lambda: live.is_over)
        await until(lambda: socket.fileno() == -1)


async def test_a_close_that_fails_is_logged_and_the_socket_aborted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the type of the error, and where it was raised."""
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
        [failed] = [record for record in caplog.records if record.getMessage() == "close failed"]
        assert vars(failed)["xai_pool_error"].startswith("ConnectionResetError at fails")


async def test_repr_shows_the_states() -> None:
    """Of the connection, of its lease and of its utterance."""
    async with connection() as (live, _, watch):
        assert repr(live) == "<Connection open idle clean>"
        live.attach(watch.take)
        await say(live, TEXT)
        assert repr(live) == "<Connection open leased asked>"
