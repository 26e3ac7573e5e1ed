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

from tests.kit import event_of
from tests.live.peer import HEARTBEAT, Peer, Watch, connection, until
from xai_pool_patch.protocol.connection import (
    CLOSE_COUNTS,
    CLOSE_TIMEOUT,
    CLOSED_MESSAGE,
    TEXT_CLEAR,
    Connection,
    State,
)
from xai_pool_patch.protocol.host import Host
from xai_pool_patch.protocol.utterance import Stage

pytestmark = pytest.mark.usefixtures("no_tasks_left")

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'


def message(type_: str, **fields: str) -> str:
    return json.dumps({"type": type_, **fields})


async def say(live: Connection, frame: str) -> None:
    live.utterance.sent(frame)
    await live.ws.send_str(frame)


def as_a_pool_does(live: Connection, watch: Watch) -> None:
    """Close what is lost."""

    def lost() -> None:
        watch.note_loss()
        live.close()

    live.on_lost = lost


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


async def test_a_server_that_never_answers_pings_keeps_its_connections() -> None:
    """C3: nothing can be concluded from its silence."""
    async with connection(heartbeat=0.05, answers_pings=False) as (live, peer, watch):
        for _ in range(5):
            assert (await peer.hears()).type is WSMsgType.PING
        assert (live.state, watch.lost, watch.host.answers_pings) == (State.OPEN, 0, False)


async def test_silence_ends_a_connection_to_a_server_that_answers_pings() -> None:
    """C3: within one and a half heartbeats, on whichever connection it has answered one."""
    host = Host()
    host.answered(0.01)
    async with connection(host, answers_pings=False) as (live, _, watch):
        socket, began = live.ws.get_extra_info("socket"), live.last_heard
        await asyncio.sleep(1.5 * HEARTBEAT)
        await until(lambda: watch.lost)
        seconds = asyncio.get_running_loop().time() - began
        assert 1.5 * HEARTBEAT <= seconds <= 1.5 * HEARTBEAT + 1.0
        await until(lambda: live.reader.done())
        await until(lambda: socket.fileno() == -1)
        assert (live.state, watch.lost) == (State.LOST, 1)


async def test_whatever_is_heard_puts_the_next_ping_off() -> None:
    """C3: no PING goes out while the server speaks."""
    async with connection(heartbeat=1.0, answers_pings=False) as (_, peer, watch):
        watch.host.answered(0.01)
        await peer.hears()
        for _ in range(4):
            await asyncio.sleep(0.9)
            await peer.ws.send_str(message("note"))
        assert peer.heard.empty()
        assert watch.lost == 0


@pytest.mark.parametrize("leased", [True, False])
async def test_pings_of_the_peer_are_answered(leased: bool) -> None:
    """Idle or leased, and the sink does not see them."""
    async with connection() as (live, peer, watch):
        if leased:
            live.sink = watch.take
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
        live.sink = watch.take
        await peer.ws.send_str(message("note", text="now"))
        taken, type_ = await watch.takes()
        assert (json.loads(taken.data)["text"], type_) == ("now", "note")
        live.detach()
        await peer.ws.send_str(message("note", text="after"))
        await peer.ws.ping()
        await peer.hears()
        assert watch.taken.empty()
        live.sink = watch.take
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
        noted = [record for record in caplog.records if event_of(record) == "ignored while idle"]
        assert [vars(record)["xai_pool_message_type"] for record in noted] == ["session.note", "?"]


@pytest.mark.parametrize(
    "frame", [message("audio.delta", delta=""), message("audio.done"), message("error"), "{", b"\0"]
)
async def test_audio_errors_and_unreadable_messages_end_an_idle_connection(
    frame: str | bytes,
) -> None:
    """It is lost at once, and once only."""
    async with connection() as (live, peer, watch):
        as_a_pool_does(live, watch)
        await (peer.ws.send_str(frame) if isinstance(frame, str) else peer.ws.send_bytes(frame))
        await until(lambda: watch.lost)
        assert (live.state, live.is_reusable, live.sent_stale_audio) == (State.LOST, False, False)
        await until(lambda: live.reader.done())
        assert watch.lost == 1


async def test_audio_before_any_text_is_not_heard() -> None:
    """The sink gets the end of the connection instead."""
    async with connection() as (live, peer, watch):
        as_a_pool_does(live, watch)
        live.sink = watch.take
        await peer.ws.send_str(message("audio.delta", delta=""))
        taken = [await watch.takes() for _ in range(2)]
        assert taken[-1] == (CLOSED_MESSAGE, "")
        assert taken[0][0].type is not WSMsgType.TEXT
        assert (live.state, watch.lost) == (State.LOST, 1)


async def test_an_error_during_an_utterance_goes_to_the_sink() -> None:
    """The connection stays open, and is not reusable."""
    async with connection() as (live, peer, watch):
        live.sink = watch.take
        await say(live, TEXT)
        await peer.ws.send_str(message("error"))
        assert (await watch.takes())[1] == "error"
        assert (live.state, live.is_reusable, watch.lost) == (State.OPEN, False, 0)


@pytest.mark.parametrize("ends", ["Close", "reset"])
async def test_the_sink_and_the_pool_learn_of_an_end_by_the_peer(ends: str) -> None:
    """By a Close frame or by a reset."""
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        live.sink = watch.take
        if ends == "Close":
            await asyncio.gather(peer.ws.close(code=1001), until(lambda: watch.lost))
            assert (await watch.takes())[0].type is WSMsgType.CLOSE
        else:
            peer.hangs_up()
            assert (await watch.takes())[0].type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        assert await watch.takes() == (CLOSED_MESSAGE, "")
        assert (live.state, live.reader.done(), watch.lost) == (State.LOST, True, 1)


async def test_a_fault_of_the_sink_ends_the_reader_and_is_reported() -> None:
    """It does not count as lost: the pool must not dial a replacement."""
    fault = ValueError("of the sink")
    calls = []

    def fails(message: aiohttp.WSMessage, type_: str) -> None:
        calls.append(message)
        raise fault

    async with connection() as (live, peer, watch):
        live.sink = fails
        await peer.ws.send_str(message("note"))
        await until(lambda: live.reader.done())
        assert (watch.faults[0], watch.lost, live.state) == (fault, 0, State.LOST)
        assert calls[1:] == [CLOSED_MESSAGE]


async def test_a_cancelled_reader_informs_only_the_sink() -> None:
    """The loop is ending: if the pool learned of a loss, it would dial anew."""
    async with connection() as (live, _, watch):
        await until(lambda: live.round_trip is not None)
        live.sink = watch.take
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
        live.utterance.sent(b"\1")
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
        await peer.hears()
        clearing = asyncio.create_task(live.clear())
        assert (await peer.hears()).data == TEXT_CLEAR
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


@pytest.mark.parametrize("answer", [message("error"), "{"])
async def test_any_other_answer_to_a_clear_ends_the_wait(answer: str) -> None:
    """The connection is not reusable."""
    async with connection() as (live, peer, _):
        await say(live, TEXT)
        await peer.hears()
        clearing = asyncio.create_task(live.clear())
        assert (await peer.hears()).data == TEXT_CLEAR
        await peer.ws.send_str(answer)
        await asyncio.wait_for(clearing, 5.0)
        assert not live.is_reusable


@pytest.mark.parametrize("answer", ["Close", "reset"])
async def test_the_end_of_the_connection_ends_the_wait_for_an_acknowledgement(answer: str) -> None:
    """By a Close frame or by a reset; the pool learns of it once."""
    async with connection() as (live, peer, watch):
        await say(live, TEXT)
        await peer.hears()
        clearing = asyncio.create_task(live.clear())
        assert (await peer.hears()).data == TEXT_CLEAR
        if answer == "Close":
            await asyncio.gather(peer.ws.close(), clearing)
        else:
            peer.hangs_up()
            await clearing
        await until(lambda: live.reader.done())
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
        live.utterance.sent(b"")
        await asyncio.wait_for(live.clear(), 5.0)
        assert not live.is_reusable


async def test_a_cancelled_clear_releases_the_connection() -> None:
    """Its sink is detached."""
    async with connection() as (live, peer, _):
        await say(live, TEXT)
        await peer.hears()
        clearing = asyncio.create_task(live.clear())
        assert (await peer.hears()).data == TEXT_CLEAR
        assert "leased" in repr(live)
        clearing.cancel()
        await asyncio.wait([clearing])
        assert "idle" in repr(live)


# Old audio and new

OLD, NEW = message("audio.delta", delta="b2xk"), message("audio.delta", delta="bmV3")
AUDIO_DONE = message("audio.done")


@asynccontextmanager
async def asked(
    *, clear: bool = False, used: bool = True, host: Host | None = None
) -> AsyncIterator[tuple[Connection, Peer, Watch, bytes, list[float]]]:
    """An utterance begins on a connection that was idle; its PING is answered by hand."""
    silences: list[float] = []
    async with connection(host) as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        if clear:
            await cleared(live, peer)
        elif used:
            await answered(live, peer)
        peer.answers_pings = False
        live.sink = watch.take
        await live.probe(lambda: silences.append(asyncio.get_running_loop().time()))
        await say(live, TEXT)
        ping = await peer.hears()
        assert (await peer.hears()).data == TEXT
        yield live, peer, watch, ping.data, silences


@pytest.mark.parametrize("clear", [False, True])
async def test_audio_ahead_of_the_pong_is_out_of_step(clear: bool) -> None:
    """L4a: it may be of an older utterance, so whoever hears it gives the connection up. After a
    clear it also shows a wrong acknowledgement."""
    async with asked(clear=clear) as (live, peer, watch, _, _):
        await peer.ws.send_str(OLD)
        assert (await watch.takes())[0].data == OLD
        assert not live.is_in_step
        assert live.sent_stale_audio == clear
        assert not watch.host.pongs_unordered


@pytest.mark.parametrize("clear", [False, True])
async def test_audio_behind_the_pong_is_in_step(clear: bool) -> None:
    """The server sent it after the text arrived."""
    async with asked(clear=clear) as (live, peer, watch, ping, silences):
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert live.is_in_step
        await asyncio.sleep(10.0)
        assert (live.state, live.sent_stale_audio, silences) == (State.OPEN, False, [])


async def test_audio_ahead_of_the_pong_of_an_unused_connection_is_in_step() -> None:
    """L4a: none of it can be old. From then on this server's PONGs prove nothing."""
    async with asked(used=False) as (live, peer, watch, _, _):
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert live.is_in_step
        assert watch.host.pongs_unordered
        assert live.clear_round_trip is None


async def test_where_pongs_prove_nothing_audio_is_in_step() -> None:
    """L4a: the PING asks for a sign of life only, and a cleared connection is not used again."""
    host = Host()
    host.pongs_unordered = True
    async with asked(host=host) as (live, peer, watch, _, _):
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert live.is_in_step
        live.utterance.was_cleared = True
        await peer.ws.send_str(AUDIO_DONE)
        assert not live.is_reusable


async def test_an_end_by_itself_waits_for_the_pong_and_is_the_answer_then() -> None:
    """L4c: nothing overtook it. It may still be old, so the connection is not used again."""
    async with asked() as (live, peer, watch, ping, silences):
        await say(live, DONE)
        await peer.hears()
        await peer.ws.send_str(AUDIO_DONE)
        await peer.ws.pong(ping)
        began = asyncio.get_running_loop().time()
        assert (await watch.takes())[0].data == AUDIO_DONE
        assert asyncio.get_running_loop().time() - began <= 1.0
        assert (live.is_reusable, silences) == (False, [])


async def test_an_end_by_itself_is_the_answer_when_no_pong_comes() -> None:
    """L4c: after the patience for a sign of life, of which it is one. It may still be old."""
    async with asked() as (live, peer, watch, _, silences):
        await say(live, DONE)
        await peer.hears()
        await peer.ws.send_str(AUDIO_DONE)
        assert (await watch.takes())[0].data == AUDIO_DONE
        assert (live.is_reusable, silences) == (False, [])


async def test_an_end_ahead_of_the_pong_is_old_if_audio_follows() -> None:
    """L4c: the new audio shows that the end was of the utterance before."""
    async with asked() as (live, peer, watch, ping, _):
        await peer.ws.send_str(AUDIO_DONE)
        await peer.ws.pong(ping)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.state, live.utterance.stage) == (State.OPEN, Stage.SPEAKING)


@pytest.mark.parametrize("sign", ["PONG", "note", "none"])
async def test_only_complete_silence_is_reported(sign: str) -> None:
    """L3: once, after the patience of that host."""
    async with asked() as (live, peer, watch, ping, silences):
        asked_at = asyncio.get_running_loop().time()
        if sign == "PONG":
            await peer.ws.pong(ping)
        elif sign == "note":
            await peer.ws.send_str(message("note"))
        assert live.round_trip is not None
        patience = watch.host.patience(live.round_trip)
        await asyncio.sleep(10.0)
        if sign == "none":
            assert silences == [pytest.approx(asked_at + patience, abs=0.2)]
        else:
            assert silences == []


async def test_a_server_that_has_answered_no_ping_is_not_asked() -> None:
    """Audio is heard at once, and silence means nothing."""
    async with connection(answers_pings=False) as (live, peer, watch):
        await peer.hears()  # the first PING
        await answered(live, peer)
        live.sink = watch.take
        await live.probe(lambda: watch.faults.append(AssertionError()))
        await asyncio.sleep(10.0)
        await say(live, TEXT)
        await peer.ws.send_str(NEW)
        assert (await watch.takes())[0].data == NEW
        assert (live.is_in_step, watch.faults) == (True, [])


async def test_only_the_pong_to_the_ping_of_the_text_separates_old_from_new() -> None:
    """Another one may have left the server before the text arrived."""
    async with asked() as (live, peer, watch, ping, _):
        await peer.ws.pong(b"another")
        await peer.ws.send_str(message("note"))
        await watch.takes()
        assert not live.is_in_step
        await peer.ws.pong(ping)
        await peer.ws.send_str(message("note"))
        await watch.takes()
        assert live.is_in_step


# Refusals


@pytest.mark.parametrize(
    ("says", "is_refusal"),
    [
        (message("error", message="too many sessions"), True),
        (message("error", message="text too long"), False),
        (1013, True),
        (1000, False),
    ],
)
async def test_a_fresh_connection_may_be_refused(says: str | int, is_refusal: bool) -> None:
    """S3a: by a Close code or an error frame that is its first answer."""
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        if isinstance(says, str):
            await peer.ws.send_str(says)
            await until(lambda: watch.lost)
        else:
            await asyncio.gather(peer.ws.close(code=says), until(lambda: watch.lost))
        assert watch.refused == is_refusal


async def test_only_the_first_answer_refuses() -> None:
    """S3a: later ones are about the utterance, or about what the session did."""
    async with connection() as (live, peer, watch):
        await answered(live, peer)
        await peer.ws.send_str(message("error", message="too many sessions"))
        await until(lambda: watch.lost)
        assert watch.refused == 0


# For one TTS, or for the application


@pytest.mark.parametrize("is_shared", [True, False])
async def test_a_configured_connection_is_for_nobody_else(is_shared: bool) -> None:
    """A `session.update` changed how it speaks."""
    async with connection(is_shared=is_shared) as (live, _, _):
        live.utterance.sent(message("session.update"))
        assert live.is_reusable != is_shared


async def test_whoever_was_given_it_hears_everything() -> None:
    """L1: audio that nobody asked for too, and errors; nothing ends the connection."""
    async with connection() as (live, peer, watch):
        live.sink = watch.take
        live.is_given_away = True
        for frame in (OLD, message("error"), AUDIO_DONE):
            await peer.ws.send_str(frame)
            assert (await watch.takes())[0].data == frame
        assert (live.state, watch.lost) == (State.OPEN, 0)


# Closing


async def test_close_sends_a_close_frame_and_waits_for_the_answer() -> None:
    """A second close() returns the same task, and the sink gets the end."""
    async with connection() as (live, peer, watch):
        await until(lambda: live.round_trip is not None)
        live.sink = watch.take
        closing = live.close()
        assert closing is not None
        assert live.close() is closing
        assert (live.state, live.is_reusable) == (State.CLOSING, False)
        await closing
        heard = await peer.hears()
        assert (heard.type, heard.data) == (WSMsgType.CLOSE, 1000)
        assert (live.state, live.reader.done(), watch.lost) == (State.CLOSING, True, 0)
        taken = [watch.taken.get_nowait() for _ in range(watch.taken.qsize())]
        assert taken[-1] == (CLOSED_MESSAGE, "")


async def test_a_peer_that_does_not_answer_the_close_is_aborted() -> None:
    """After CLOSE_TIMEOUT."""
    async with connection(answers_close=False) as (live, _, _):
        socket = live.ws.get_extra_info("socket")
        began = asyncio.get_running_loop().time()
        closing = live.close()
        assert closing is not None
        await closing  # aiohttp itself would wait for ten
        assert asyncio.get_running_loop().time() - began == pytest.approx(CLOSE_TIMEOUT, abs=0.2)
        assert live.reader.done()
        await until(lambda: socket.fileno() == -1)


@pytest.mark.parametrize("sign", ["PONG", "audio", "none", "end"])
async def test_what_was_silent_is_listened_to_before_it_closes(sign: str) -> None:
    """L3: a late sign of life makes the pool more patient with that host."""
    async with connection(answers_pings=False) as (live, peer, watch):
        ping = await peer.hears()
        began = asyncio.get_running_loop().time()
        closing = live.close(listen=True)
        assert closing is not None
        await asyncio.sleep(3.0)
        assert not live.ws.closed
        if sign == "PONG":
            await peer.ws.pong(ping.data)
        elif sign == "audio":
            await peer.ws.send_str(OLD)
        elif sign == "end":
            peer.hangs_up()
        await closing
        seconds = asyncio.get_running_loop().time() - began
        assert seconds == pytest.approx(CLOSE_TIMEOUT if sign == "none" else 3.0, abs=0.2)
        assert (watch.host.patience(0.1) > 4.0) == (sign in ("PONG", "audio"))


@pytest.mark.parametrize("seconds", [0.5, 1.5])
async def test_only_a_close_that_has_arrived_is_aborted(seconds: float) -> None:
    """S4: a session whose Close was lost may count for ten minutes."""
    async with connection(answers_close=False) as (live, _, _):
        live.abort_if_closing()
        assert live.state is State.OPEN
        closing = live.close()
        assert closing is not None
        await asyncio.sleep(seconds)
        began = asyncio.get_running_loop().time()
        live.abort_if_closing()
        await closing
        took = asyncio.get_running_loop().time() - began
        assert (took < 0.5) == (seconds > CLOSE_COUNTS)


async def test_who_waits_from_the_close_on_waits_long_enough() -> None:
    """S4: a timer that is set with it does not come a moment too early."""
    async with connection(answers_close=False) as (live, _, _):
        loop = asyncio.get_running_loop()
        closing, began = live.close(), loop.time()
        assert closing is not None
        loop.call_later(CLOSE_COUNTS, live.abort_if_closing)
        await closing
        assert loop.time() - began == pytest.approx(CLOSE_COUNTS, abs=0.1)


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
        gone = SimpleNamespace(abort=abort, is_closing=lambda: by_the_peer)
        monkeypatch.setattr(live, "_transport", gone)
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
        await until(lambda: live.reader.done())
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
        [failed] = [record for record in caplog.records if event_of(record) == "close failed"]
        assert vars(failed)["xai_pool_error"].startswith("ConnectionResetError at fails")


async def test_repr_shows_the_states() -> None:
    """Of the connection, of its lease and of its utterance."""
    async with connection() as (live, _, watch):
        assert repr(live) == "<Connection open idle clean>"
        live.sink = watch.take
        await say(live, TEXT)
        assert repr(live) == "<Connection open leased asked>"
