"""The fake server and its network, seen by a plain aiohttp client over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from xai_pool_patch.testing import (
    Behaviour,
    Clearing,
    End,
    Ending,
    FakeServer,
    Outcome,
    Refusal,
    SlowNetwork,
    Wordless,
)

pytestmark = [pytest.mark.asyncio]
if sys.version_info < (3, 11):  # it warns of every TLS connection that the peer has ended
    pytestmark.append(
        pytest.mark.filterwarnings("ignore:unclosed transport <asyncio.sslproto:ResourceWarning")
    )

KEY = Behaviour.api_key
SILENCE = 0.05
"""Seconds for which nothing must come where nothing may come."""


class Client:
    """What the tests do as a client."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self._session = server.client_session()
        self._open: list[aiohttp.ClientWebSocketResponse] = []

    async def connect(
        self, voice: str = "ara", key: str = KEY, **kwargs: Any
    ) -> aiohttp.ClientWebSocketResponse:
        ws: aiohttp.ClientWebSocketResponse = await self._session.ws_connect(
            self.server.url,
            params={"voice": voice, "language": "en", "codec": "pcm", "sample_rate": "24000"},
            headers={"Authorization": f"Bearer {key}"},
            **kwargs,
        )
        self._open.append(ws)
        return ws

    async def drop(self) -> None:
        """Closes the sockets without a Close frame."""
        await self._session.close()
        for ws in self._open:  # of what is closed: aiohttp warns of any other
            await ws.close()

    async def refused(self, **kwargs: Any) -> int:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            await self.connect(**kwargs)
        return refusal.value.status


@contextlib.asynccontextmanager
async def serving(round_trip: float = 0.0, **behaviour: Any) -> AsyncIterator[Client]:
    """A fake server that loses no time unless it is set to, and a client's session with it."""
    quick = {"generation": 0.0, "pace": 1000.0, "speech_per_character": 0.01, **behaviour}
    async with contextlib.AsyncExitStack() as stack:
        server = FakeServer(round_trip=round_trip, behaviour=Behaviour(**quick))
        async with server:
            client = Client(server)
            stack.push_async_callback(client.drop)  # when the server has gone
            yield client


async def send(ws: aiohttp.ClientWebSocketResponse, kind: str, **fields: str) -> None:
    await ws.send_json({"type": kind, **fields})


async def say(ws: aiohttp.ClientWebSocketResponse, text: str) -> None:
    await send(ws, "text.delta", delta=text)
    await send(ws, "text.done")


async def hear(ws: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    message = await ws.receive(timeout=5)
    assert message.type is WSMsgType.TEXT, message
    answer: dict[str, Any] = json.loads(message.data)
    return answer


async def hear_out(ws: aiohttp.ClientWebSocketResponse) -> list[bytes]:
    """The pieces of audio up to audio.done."""
    pieces = []
    while (message := await hear(ws))["type"] == "audio.delta":
        pieces.append(base64.b64decode(message["delta"]))
    assert message["type"] == "audio.done"
    assert message["trace_id"]
    return pieces


async def assert_silent(ws: aiohttp.ClientWebSocketResponse) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await ws.receive(timeout=SILENCE)


async def assert_ended(ws: aiohttp.ClientWebSocketResponse, ending: Ending) -> None:
    """The client sees just this ending, next."""
    if ending is Ending.SILENT:
        await assert_silent(ws)
        return
    message = await ws.receive(timeout=5)
    if ending is Ending.CLOSE:
        assert message.type is WSMsgType.CLOSE
        assert message.data == 1000
    else:
        assert message.type in (WSMsgType.CLOSED, WSMsgType.ERROR)


def pcm(value: int, size: int) -> bytes:
    return value.to_bytes(2, "little") * (size // 2)


def now() -> float:
    return asyncio.get_running_loop().time()


ENDS = [
    (Ending.CLOSE, End.SERVER_CLOSE),
    (Ending.RESET, End.SERVER_RESET),
    (Ending.SILENT, End.SERVER_SILENT),
]
each_ending = pytest.mark.parametrize(("ending", "end"), ENDS, ids=lambda v: v.name)


class TestRound:
    """Text up, audio down."""

    async def test_the_audio_of_a_text(self) -> None:
        """It is as long as its text, of one value, cut at odd bytes, and on the record."""
        async with serving(chunk=0.05) as client:
            ws = await client.connect()
            await say(ws, "twenty characters...")
            pieces = await hear_out(ws)
            assert b"".join(pieces) == pcm(1, 9600)
            assert [len(piece) for piece in pieces] == [2401, 2401, 2401, 2397]
            utterance = client.server.utterance_for("twenty characters")
            assert utterance.finished
            assert utterance.first_audio_at is not None
            (connection,) = client.server.connections
            assert connection.utterances == [utterance]
            assert connection.query["voice"] == "ara"

    async def test_every_utterance_has_a_value_of_its_own(self) -> None:
        """Over several connections."""
        async with serving() as client:
            for value in (1, 2, 3, 4):
                ws = await client.connect()
                await say(ws, "ab")
                assert b"".join(await hear_out(ws)) == pcm(value, 960)

    async def test_audio_comes_while_text_still_arrives(self) -> None:
        """But audio.done only after text.done."""
        async with serving() as client:
            ws = await client.connect()
            for _ in range(3):
                await send(ws, "text.delta", delta="word ")
                assert (await hear(ws))["type"] == "audio.delta"
            await assert_silent(ws)
            await send(ws, "text.done")
            assert await hear_out(ws) == []

    async def test_no_text_no_audio(self) -> None:
        """audio.done comes after the time of generation."""
        async with serving(generation=0.05) as client:
            ws = await client.connect()
            started = now()
            await send(ws, "text.done")
            assert await hear_out(ws) == []
            assert now() - started >= 0.05

    @pytest.mark.parametrize("text", [None, "\u2026", "?! ..."])
    @pytest.mark.parametrize("wordless", Wordless)
    async def test_no_word(self, wordless: Wordless, text: str | None) -> None:
        """One answer, and the connection is idle again; a text with a word is spoken as ever."""
        async with serving(wordless=wordless, chunk=0.02) as client:
            ws = await client.connect()
            if text is not None:
                await send(ws, "text.delta", delta=text)
            await send(ws, "text.done")
            if wordless is Wordless.REFUSED:
                assert (await hear(ws))["type"] == "error"
            else:
                spoken = pcm(1, 480 * len(text or "")) if wordless is Wordless.SPOKEN else b""
                silence = pcm(0, 960) if wordless is Wordless.SILENCE else b""
                assert b"".join(await hear_out(ws)) == spoken + silence
            await send(ws, "text.delta", delta="...")
            await say(ws, "7!")
            assert b"".join(await hear_out(ws)) == pcm(2, 5 * 480)
            assert client.server.connections[0].violations == []

    async def test_generation_and_pace(self) -> None:
        """Both take their time: 0.05 s, then 0.2 s of audio at ten times real time."""
        async with serving(generation=0.05, pace=10.0, chunk=0.1) as client:
            ws = await client.connect()
            started = now()
            await say(ws, "twenty characters...")
            await hear(ws)
            assert now() - started >= 0.05
            await hear_out(ws)
            assert now() - started >= 0.05 + 0.02

    async def test_clear_cancels_the_utterance(self) -> None:
        """What follows audio.clear belongs to the next utterance alone."""
        async with serving(pace=1.0, chunk=SILENCE / 5) as client:
            ws = await client.connect()
            await say(ws, "a long text " * 10)
            assert (await hear(ws))["type"] == "audio.delta"
            await send(ws, "text.clear")
            while (message := await hear(ws))["type"] == "audio.delta":
                pass
            assert message == {"type": "audio.clear"}
            client.server.behaviour.pace = 1000.0
            await say(ws, "next")
            assert b"".join(await hear_out(ws)) == pcm(2, 1920)
            await assert_silent(ws)
            outcomes = [utterance.outcome for utterance in client.server.utterances]
            assert outcomes == [Outcome.CLEARED, Outcome.FINISHED]

    async def test_clear_on_an_idle_connection(self) -> None:
        """Is answered at once."""
        async with serving() as client:
            ws = await client.connect()
            await send(ws, "text.clear")
            assert await hear(ws) == {"type": "audio.clear"}

    @pytest.mark.parametrize(
        ("clearing", "answers"),
        [
            (Clearing.ACKNOWLEDGED, ["audio.clear"]),
            (Clearing.IGNORED, ["audio.delta", "audio.delta", "audio.delta", "audio.done"]),
            (Clearing.REFUSED, ["error", "audio.delta", "audio.delta", "audio.delta"]),
            (Clearing.LATE, ["audio.delta", "audio.clear"]),
            (Clearing.CROSSED, ["audio.done", "audio.clear"]),
            (Clearing.LEAKING, ["audio.clear", "audio.delta"]),
        ],
    )
    async def test_what_a_clear_is_answered_with(
        self, clearing: Clearing, answers: list[str]
    ) -> None:
        """One audio.delta of four has come by then; the others would follow, 0.1 s apart."""
        async with serving(pace=1.0, chunk=0.1, clearing=clearing, clear_delay=0.15) as client:
            ws = await client.connect()
            await say(ws, "a text of 39 characters is 0.39 s long.")
            await hear(ws)
            await send(ws, "text.clear")
            assert [(await hear(ws))["type"] for _ in answers] == answers
            await assert_silent(ws)
            (connection,) = client.server.connections
            assert connection.clears == 1
            assert connection.leaks == (clearing is Clearing.LEAKING)

    async def test_nothing_leaks_once_the_client_was_heard(self) -> None:
        """From then on the audio could be the answer to what it said."""
        async with serving(pace=1.0, clearing=Clearing.LEAKING, clear_delay=SILENCE / 2) as client:
            ws = await client.connect(autoping=False)
            await say(ws, "a long text " * 10)
            await hear(ws)
            await send(ws, "text.clear")
            assert (await hear(ws))["type"] == "audio.clear"
            await ws.ping()
            assert (await ws.receive()).type is WSMsgType.PONG
            await assert_silent(ws)
            assert client.server.connections[0].leaks == 0

    @pytest.mark.parametrize(
        "frame", ['{"type": "text.delta", "delta": "more"}', "no JSON", '{"type": "new"}', b"\0"]
    )
    async def test_a_violation_is_recorded_and_answered(self, frame: str | bytes) -> None:
        """Text between text.done and audio.done, and frames that no client sends."""
        async with serving(generation=60.0) as client:
            ws = await client.connect()
            await say(ws, "hello")
            await (ws.send_str(frame) if isinstance(frame, str) else ws.send_bytes(frame))
            assert (await hear(ws))["type"] == "error"
            (connection,) = client.server.connections
            assert len(connection.violations) == 1
            assert client.server.utterance_for("hello").text == "hello"


class TestHandshake:
    @pytest.mark.parametrize(
        ("behaviour", "connect", "status"),
        [
            ({}, {"key": "wrong"}, 401),
            ({"voices": {"ara"}}, {"voice": "nobody"}, 400),
            ({"max_sessions": 0}, {}, 429),
            ({"max_sessions": 0, "refusal": Refusal.UNAVAILABLE}, {}, 503),
            ({"refuse": 503}, {}, 503),
        ],
    )
    async def test_is_refused(
        self, behaviour: dict[str, Any], connect: dict[str, Any], status: int
    ) -> None:
        """Before the upgrade, with the status for its reason."""
        async with serving(**behaviour) as client:
            assert await client.refused(**connect) == status
            (handshake,) = client.server.handshakes
            assert handshake.status == status
            assert client.server.connections == []

    async def test_a_refusal_above_the_limit_may_say_when_to_try_again(self) -> None:
        """In a Retry-After header."""
        async with serving(max_sessions=0, retry_after=7) as client:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await client.connect()
            assert refusal.value.headers is not None
            assert refusal.value.headers["Retry-After"] == "7"

    async def test_a_session_may_be_freed_late(self) -> None:
        """A connection that has been closed counts for a while."""
        async with serving(max_sessions=1, close_frees_after=60.0) as client:
            await (await client.connect()).close()
            assert await client.refused() == 429
            client.server.behaviour.close_frees_after = 0.0
            await client.connect()

    async def test_the_next_ones_are_refused(self) -> None:
        """Just as many as were asked for."""
        async with serving(refuse_next=[503, 429]) as client:
            assert [await client.refused(), await client.refused()] == [503, 429]
            await client.connect()
            assert [h.status for h in client.server.handshakes] == [503, 429, 101]

    async def test_sessions_are_counted_while_open(self) -> None:
        """A closed one makes room."""
        async with serving(max_sessions=2) as client:
            first, _ = await client.connect(), await client.connect()
            assert await client.refused() == 429
            await first.close()
            await client.server.wait_for(lambda server: server.open_count == 1)
            await client.connect()
            assert client.server.peak_open == 2
            assert len(client.server.connections) == 3

    @pytest.mark.parametrize("ending", [Ending.RESET, Ending.SILENT])
    async def test_a_session_without_a_close_counts_for_longer(self, ending: Ending) -> None:
        """For `permit_ttl` seconds; a session that ended with a Close frame does not."""
        async with serving(max_sessions=2, permit_ttl=60.0) as client:
            server = client.server
            closed, _ = await client.connect(), await client.connect()
            await closed.close()
            await server.wait_for(lambda server: server.session_count == 1)
            server.behaviour.ending, server.behaviour.idle_limit = ending, 0.0
            await server.wait_for(lambda server: server.open_count == 0)
            server.behaviour.idle_limit = None
            assert server.session_count == 1
            await client.connect()
            assert await client.refused() == 429
            server.behaviour.permit_ttl = 0.0
            assert server.session_count == 1
            await client.connect()
            assert (server.peak_open, server.peak_sessions) == (2, 2)

    async def test_a_permit_expires(self) -> None:
        """By itself, so the next handshake succeeds."""
        async with serving(max_sessions=1, permit_ttl=0.05) as client:
            await client.connect()
            client.server.reset_all()
            assert client.server.session_count == 1
            while client.server.session_count:
                await asyncio.sleep(0.01)
            await client.connect()

    async def test_refused_by_an_error_frame(self) -> None:
        """After the upgrade, and a Close frame follows; it takes nobody's session."""
        async with serving(max_sessions=1, refusal=Refusal.ERROR_FRAME) as client:
            first, second = await client.connect(), await client.connect()
            assert (await hear(second))["type"] == "error"
            message = await second.receive(timeout=5)
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1013)
            connections = client.server.connections
            assert [connection.over_limit for connection in connections] == [False, True]
            assert client.server.session_count == client.server.peak_sessions == 1
            await first.close()
            await client.server.wait_for(lambda server: server.open_count == 0)
            third = await client.connect()
            await say(third, "hello")
            assert await hear_out(third)

    async def test_delay(self) -> None:
        """A handshake takes as long as it is set to."""
        async with serving(handshake_delay=0.05) as client:
            started = now()
            await client.connect()
            assert now() - started >= 0.05

    async def test_costs_three_round_trips(self) -> None:
        """TCP, TLS 1.3 and the upgrade; and a message and its answer cost one."""
        async with serving(round_trip=0.05) as client:
            started = now()
            ws = await client.connect()
            assert now() - started >= 3 * 0.05
            assert ws.get_extra_info("ssl_object").version() == "TLSv1.3"
            started = now()
            await send(ws, "text.clear")
            await hear(ws)
            assert now() - started >= 0.05


class TestPings:
    @pytest.mark.parametrize("answer", [True, False])
    async def test_of_the_client(self, answer: bool) -> None:
        """Are counted, and answered if so wished."""
        async with serving(answer_pings=answer) as client:
            ws = await client.connect(autoping=False)
            await ws.ping(b"there?")
            if answer:
                message = await ws.receive(timeout=5)
                assert (message.type, message.data) == (WSMsgType.PONG, b"there?")
            else:
                await assert_silent(ws)
            assert client.server.connections[0].pings_received == 1

    async def test_late_answers(self) -> None:
        """What comes meanwhile is answered first."""
        async with serving(pong_delay=SILENCE) as client:
            ws = await client.connect(autoping=False)
            await ws.ping(b"1")
            await say(ws, "hello")
            await hear_out(ws)
            message = await ws.receive(timeout=5)
            assert (message.type, message.data) == (WSMsgType.PONG, b"1")
            assert client.server.connections[0].pings_received == 1

    async def test_of_the_server(self) -> None:
        """A client that answers stays; one that does not is dropped without a Close."""
        async with serving(ping_interval=0.1) as client:
            listening, deaf = await client.connect(), await client.connect(autoping=False)
            reader = asyncio.create_task(listening.receive())
            connections = client.server.connections
            await client.server.wait_for(lambda _: connections[0].pongs_received >= 3)
            await client.server.wait_for(lambda _: not connections[1].is_open)
            assert connections[0].is_open
            assert connections[1].ended is End.PING_TIMEOUT
            assert (await deaf.receive(timeout=5)).type is WSMsgType.PING
            await assert_ended(deaf, Ending.RESET)
            reader.cancel()

    async def test_an_edge_answers_first(self) -> None:
        """A PING overtakes the message that was sent before it."""
        async with serving(edge_distance=0.1) as client:
            ws = await client.connect(autoping=False)
            started = now()
            await send(ws, "text.clear")
            await ws.ping(b"?")
            assert (await ws.receive(timeout=5)).type is WSMsgType.PONG
            assert (await hear(ws))["type"] == "audio.clear"
            assert now() - started >= 0.1

    async def test_an_edge_outlives_the_session(self) -> None:
        """PINGs are answered on a connection that has been idle for too long, and texts are not."""
        async with serving(idle_death=0.1) as client:
            ws = await client.connect(autoping=False)
            await say(ws, "Hello")
            await hear_out(ws)
            await asyncio.sleep(0.2)
            await say(ws, "Hello")
            await ws.ping(b"?")
            assert (await ws.receive(timeout=5)).type is WSMsgType.PONG
            await assert_silent(ws)


class TestEndings:
    async def test_by_the_client(self) -> None:
        """With its Close frame, which is answered."""
        async with serving() as client:
            ws = await client.connect()
            await ws.close(code=1001)
            assert ws.close_code == 1001
            (connection,) = client.server.connections
            assert (connection.ended, connection.close_code) == (End.CLIENT_CLOSE, 1001)

    async def test_by_the_client_without_an_answer(self) -> None:
        """The connection stays open until the client drops it."""
        async with serving(answer_close=False) as client:
            ws = await client.connect()
            (connection,) = client.server.connections
            closing = asyncio.create_task(ws.close())
            await client.server.wait_for(lambda _: connection.close_code == 1000)
            await asyncio.wait([closing], timeout=SILENCE)
            assert not closing.done()
            assert connection.is_open
            await client.drop()
            await closing
            await client.server.wait_for(lambda _: not connection.is_open)
            assert connection.ended is End.CLIENT_CLOSE

    async def test_by_the_client_without_a_close(self) -> None:
        """In the middle of an utterance, which is cut off."""
        async with serving(generation=60.0) as client:
            ws = await client.connect()
            await send(ws, "text.delta", delta="hello")
            await client.server.wait_for(lambda server: server.utterances)
            await client.drop()
            await client.server.wait_for(lambda server: server.open_count == 0)
            assert client.server.connections[0].ended is End.CLIENT_DROPPED
            assert client.server.utterance_for("hello").cut_off

    async def test_close_all(self) -> None:
        """Every client gets a Close frame with the code."""
        async with serving() as client:
            clients = [await client.connect() for _ in range(3)]
            await client.server.close_all(1012)
            for ws in clients:
                message = await ws.receive(timeout=5)
                assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
            ends = [connection.ended for connection in client.server.connections]
            assert ends == [End.SERVER_CLOSE] * 3

    async def test_close_waits_for_the_answer(self) -> None:
        """The TCP connection stays until the client has answered; what it says is not heard."""
        async with serving() as client:
            ws = await client.connect(autoclose=False)
            (route,) = client.server.network.routes
            closed = asyncio.create_task(route.wait_closed())
            await client.server.close_all()
            assert (await ws.receive(timeout=5)).type is WSMsgType.CLOSE
            await say(ws, "unheard")
            await asyncio.wait([closed], timeout=SILENCE)
            assert not closed.done()
            await ws.close()
            await closed
            assert client.server.utterances == []

    async def test_reset_all(self) -> None:
        """Every client loses its connection without a word."""
        async with serving() as client:
            clients = [await client.connect() for _ in range(3)]
            client.server.reset_all()
            for ws in clients:
                await assert_ended(ws, Ending.RESET)
            ends = [connection.ended for connection in client.server.connections]
            assert ends == [End.SERVER_RESET] * 3

    async def test_broadcast(self) -> None:
        """A frame for everybody who is there."""
        async with serving() as client:
            clients = [await client.connect() for _ in range(3)]
            await clients.pop().close()
            await client.server.broadcast('{"type": "news"}')
            assert [await hear(ws) for ws in clients] == [{"type": "news"}] * 2

    @each_ending
    async def test_idle_limit(self, ending: Ending, end: End) -> None:
        """Counts from the last utterance, and may be set while the connection is idle."""
        async with serving(generation=0.1) as client:
            ws = await client.connect()
            await say(ws, "hello")
            await hear_out(ws)
            finished = now()
            client.server.behaviour.ending = ending
            client.server.behaviour.idle_limit = 0.1
            await client.server.wait_for(lambda server: server.open_count == 0)
            (connection,) = client.server.connections
            assert connection.ended is end
            assert connection.ended_at is not None
            assert connection.ended_at - finished >= 0.1 - 0.02  # the way of audio.done
            await assert_ended(ws, ending)

    async def test_idle_limit_spares_the_busy(self) -> None:
        """An utterance may take longer than the limit."""
        async with serving(idle_limit=0.1, generation=0.2) as client:
            ws = await client.connect()
            await say(ws, "hello")
            assert b"".join(await hear_out(ws)) == pcm(1, 2400)

    @pytest.mark.parametrize("text", [None, "a long text " * 10])
    async def test_deadline(self, text: str | None) -> None:
        """An error frame comes, idle or in mid-utterance, and nothing is spoken any more."""
        async with serving(deadline=0.1, pace=1.0) as client:
            ws = await client.connect(autoping=False)
            if text is not None:
                await say(ws, text)
            while (message := await hear(ws))["type"] == "audio.delta":
                pass
            assert message["type"] == "error"
            assert "Deadline expired" in message["message"]
            await say(ws, "next")
            await send(ws, "text.clear")
            await ws.ping()
            assert (await ws.receive(timeout=5)).type is WSMsgType.PONG
            await assert_silent(ws)
            assert not any(utterance.finished for utterance in client.server.utterances)


class TestFaultsInAnUtterance:
    async def test_error_on_text(self) -> None:
        """One error frame for the utterance; after its text.done the connection is idle again."""
        async with serving(error_on_text="no capacity") as client:
            ws = await client.connect()
            await send(ws, "text.delta", delta="one ")
            assert await hear(ws) == {"type": "error", "message": "no capacity"}
            await say(ws, "utterance")
            client.server.behaviour.error_on_text = None
            await say(ws, "hello")
            assert b"".join(await hear_out(ws)) == pcm(2, 2400)
            assert client.server.utterance_for("one utterance").outcome is Outcome.FAILED

    @each_ending
    async def test_end_before_audio(self, ending: Ending, end: End) -> None:
        """The text was read, and not a sample comes."""
        async with serving(end_before_audio=ending) as client:
            ws = await client.connect()
            await send(ws, "text.delta", delta="hello")
            await assert_ended(ws, ending)
            assert client.server.connections[0].ended is end
            assert client.server.utterance_for("hello").cut_off

    @each_ending
    @pytest.mark.parametrize("round_trip", [0.0, 0.02])
    async def test_end_after_audio(self, ending: Ending, end: End, round_trip: float) -> None:
        """The first audio.delta still arrives, and nothing more."""
        async with serving(round_trip, end_after_audio=ending) as client:
            ws = await client.connect()
            await say(ws, "a long text " * 10)
            assert (await hear(ws))["type"] == "audio.delta"
            await assert_ended(ws, ending)
            assert client.server.connections[0].ended is end
            assert client.server.utterance_for("a long text").cut_off

    async def test_mute(self) -> None:
        """A dead session behind an open socket: PINGs are answered, nothing else is."""
        async with serving(mute=True) as client:
            ws = await client.connect(autoping=False)
            await say(ws, "hello")
            await send(ws, "text.clear")
            await ws.ping()
            assert (await ws.receive(timeout=5)).type is WSMsgType.PONG
            await assert_silent(ws)
            assert client.server.utterance_for("hello").text_done

    async def test_mute_all(self) -> None:
        """Of the sessions that were open then; who connects later is answered."""
        async with serving() as client:
            dead = await client.connect(autoping=False)
            client.server.mute_all()
            await say(dead, "hello")
            await dead.ping()
            assert (await dead.receive(timeout=5)).type is WSMsgType.PONG
            await assert_silent(dead)
            alive = await client.connect()
            await say(alive, "hello")
            assert b"".join(await hear_out(alive)) == pcm(2, 2400)

    async def test_late_audio(self) -> None:
        """After audio.done, audio of the old value."""
        async with serving(late_audio=0.05) as client:
            ws = await client.connect()
            await say(ws, "ab")
            await hear_out(ws)
            finished = now()
            late = base64.b64decode((await hear(ws))["delta"])
            assert now() - finished >= 0.05 - 0.02  # the way of audio.done
            assert late == pcm(1, len(late) + 1)[: len(late)]

    async def test_stray_done(self) -> None:
        """audio.done comes unasked; utterances are as ever."""
        async with serving(stray_done=True) as client:
            ws = await client.connect()
            assert (await hear(ws))["type"] == "audio.done"
            await say(ws, "hello")
            assert b"".join(await hear_out(ws)) == pcm(1, 2400)

    async def test_raw_frames(self) -> None:
        """Come as they are, before the audio; 4 MiB is more than aiohttp takes."""
        async with serving(raw_before_audio=["{no json", b"\1\2", '{"type": "new"}']) as client:
            ws = await client.connect()
            await say(ws, "hello")
            frames = [(await ws.receive(timeout=5)).data for _ in range(3)]
            assert frames == client.server.behaviour.raw_before_audio
            assert b"".join(await hear_out(ws)) == pcm(1, 2400)
            client.server.behaviour.raw_before_audio = ["x" * 2**22]
            await say(ws, "hello")
            assert (await ws.receive(timeout=5)).type is WSMsgType.ERROR
            assert ws.close_code == 1009

    async def test_too_many_at_once(self) -> None:
        """The utterance above the limit is answered by an error, the others are spoken."""
        async with serving(max_utterances=1, generation=0.1) as client:
            first, second = await client.connect(), await client.connect()
            await say(first, "Hello")
            await client.server.wait_for(lambda server: len(server.utterances) == 1)
            await say(second, "Hello")
            assert (await hear(second))["type"] == "error"
            assert await hear_out(first)
            await say(second, "Hello")
            assert await hear_out(second)


class TestLinkFaults:
    async def test_freeze_all(self) -> None:
        """Nothing passes and nobody hears of it; what was held back comes after unfreeze()."""
        async with serving() as client:
            ws = await client.connect()
            client.server.freeze_all()
            await say(ws, "hello")
            await client.server.broadcast("{}")
            await assert_silent(ws)
            assert client.server.utterances == []
            client.server.network.unfreeze()
            assert await hear(ws) == {}
            assert b"".join(await hear_out(ws)) == pcm(1, 2400)

    async def test_freeze_hides_the_clients_end(self) -> None:
        """The server still believes in the connection, and a new one works."""
        async with serving() as client:
            await client.connect()
            client.server.connections[0].route.freeze()
            await client.drop()
            another = Client(client.server)
            ws = await another.connect()
            await say(ws, "hello")
            await hear_out(ws)
            assert client.server.open_count == 2
            await another.drop()

    async def test_freeze_hides_the_servers_end(self) -> None:
        """The client still believes in the connection."""
        async with serving() as client:
            ws = await client.connect()
            client.server.connections[0].route.freeze()
            client.server.reset_all()
            await assert_silent(ws)
            assert not ws.closed

    async def test_reset_of_one_line(self) -> None:
        """Both sides see it; the other connection does not."""
        async with serving() as client:
            broken, whole = await client.connect(), await client.connect()
            client.server.connections[0].route.reset()
            await assert_ended(broken, Ending.RESET)
            await client.server.wait_for(lambda server: server.open_count == 1)
            assert client.server.connections[0].ended is End.CLIENT_DROPPED
            await say(whole, "hello")
            await hear_out(whole)

    async def test_refuse(self) -> None:
        """A dial is reset at once; connections that exist are untouched."""
        async with serving() as client:
            ws = await client.connect()
            client.server.network.refuse = True
            with pytest.raises(aiohttp.ClientConnectionError):
                await client.connect()
            assert client.server.network.accepted == 2
            assert len(client.server.network.routes) == len(client.server.handshakes) == 1
            await say(ws, "hello")
            await hear_out(ws)

    async def test_stall_new(self) -> None:
        """A dial hangs, until it is let go on; connections that exist are untouched."""
        async with serving() as client:
            ws = await client.connect()
            client.server.network.stall_new = True
            dial = asyncio.create_task(client.connect())
            await client.server.wait_for(lambda server: server.network.accepted == 2)
            await say(ws, "hello")
            await hear_out(ws)
            await asyncio.wait([dial], timeout=SILENCE)
            assert not dial.done()
            client.server.network.unfreeze()
            await say(await dial, "hello")


class TestLink:
    """The network alone, in front of a server that echoes until EOF."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def echoing(
        round_trip: float,
    ) -> AsyncIterator[tuple[SlowNetwork, asyncio.StreamReader, asyncio.StreamWriter]]:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(2**16):
                    writer.write(data)
                writer.write(b"bye")
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        network = SlowNetwork(server.sockets[0].getsockname()[1], round_trip=round_trip)
        await network.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", network.port)
        try:
            yield network, reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await network.close()
            server.close()
            await server.wait_closed()

    async def test_the_first_bytes_pay_for_the_handshake(self) -> None:
        """Two round trips for the first answer, one for the next."""
        started = now()
        async with self.echoing(0.05) as (_, reader, writer):
            for round_trips in (2, 1):
                writer.write(b"x")
                await reader.readexactly(1)
                assert now() - started >= round_trips * 0.05
                started = now()

    async def test_many_chunks_are_in_flight_at_once(self) -> None:
        """Fifty chunks with 20 ms between them take 1 s and one round trip, not 50."""
        async with self.echoing(0.2) as (_, reader, writer):
            started = now()
            for _ in range(50):
                writer.write(b"x")
                await asyncio.sleep(0.02)
            await reader.readexactly(50)
            assert now() - started < 50 * 0.2 / 2

    async def test_order_is_kept_when_the_way_gets_shorter(self) -> None:
        """What sets off later does not overtake."""
        async with self.echoing(0.2) as (network, reader, writer):
            writer.write(b"first")
            await asyncio.sleep(0.02)
            (route,) = network.routes
            assert route.is_flowing
            network.round_trip = 0.0
            writer.write(b"second")
            assert await reader.readexactly(11) == b"firstsecond"

    async def test_eof_goes_through_after_the_bytes(self) -> None:
        """Each direction has its own."""
        async with self.echoing(0.02) as (network, reader, writer):
            writer.write(b"hello")
            writer.write_eof()
            assert await reader.read() == b"hellobye"
            await asyncio.gather(*(route.wait_closed() for route in network.routes))
            assert network.routes == []

    async def test_reset_goes_through(self) -> None:
        """After the bytes before it, and as a reset."""
        async with self.echoing(0.02) as (network, reader, writer):
            writer.write(b"hello")
            await reader.readexactly(5)
            network.reset()
            with pytest.raises(ConnectionResetError):
                await reader.read()

    async def test_reset_while_the_server_is_dialled(self) -> None:
        """The connection to the server is not left behind."""
        async with self.echoing(0.0) as (network, _, writer):
            writer.close()
            await asyncio.gather(*(route.wait_closed() for route in network.routes))
            network._on_change = network.reset
            reader, writer = await asyncio.open_connection("127.0.0.1", network.port)
            with pytest.raises(ConnectionResetError):
                await reader.read()
            (route,) = network.routes
            await asyncio.wait_for(route.wait_closed(), timeout=5)
            writer.close()

    async def test_no_delay_of_nagle(self) -> None:
        """TCP_NODELAY is set on both of the network's sockets."""
        async with self.echoing(0.0) as (network, reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            (route,) = network.routes
            for end in (route._client, route._server):
                assert end.transport is not None
                sock = end.transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class TestWaiting:
    async def test_wakes_at_the_change(self) -> None:
        """And not before."""
        async with serving() as client:
            waiting = asyncio.create_task(client.server.wait_for(lambda server: server.open_count))
            ws = await client.connect()
            await waiting
            waiting = asyncio.create_task(
                client.server.wait_for(lambda server: not server.open_count)
            )
            await ws.close()
            await waiting

    async def test_gives_up_with_the_records(self) -> None:
        """So that a failing test can be understood."""
        async with serving(generation=60.0) as client:
            ws = await client.connect()
            await say(ws, "hello")
            with pytest.raises(TimeoutError, match=r"(?s)ServedConnection\(number=1.*text='hello'"):
                await client.server.wait_for(lambda server: server.open_count == 2, timeout=0.05)


class TestLoop:
    """A server whose loop does not run answers nobody; who uses it hears so at once."""

    @pytest.fixture
    def elsewhere(self) -> Iterator[tuple[FakeServer, asyncio.AbstractEventLoop]]:
        """A server that a fixture of another scope has started, and its loop."""
        loop, server = asyncio.new_event_loop(), FakeServer()
        starting = threading.Thread(target=loop.run_until_complete, args=(server.__aenter__(),))
        starting.start()
        starting.join()
        yield server, loop
        stopping = server.__aexit__(None, None, None)
        ending = threading.Thread(target=loop.run_until_complete, args=(stopping,))
        ending.start()
        ending.join()
        loop.close()

    async def test_a_session_of_another_loop(self, elsewhere: Any) -> None:
        """Is not made. The error says what to do."""
        server, _ = elsewhere
        with pytest.raises(RuntimeError, match=r"started in another event loop.*loop_scope"):
            server.client_session()
        with pytest.raises(RuntimeError, match="started in another event loop"):
            await server.wait_for(lambda server: server.handshakes)

    async def test_a_dial_in_another_loop(self, elsewhere: Any) -> None:
        """A session that was made while the loop ran, as in the same fixture, dials in vain."""
        server, loop = elsewhere
        loop.is_running = lambda: True
        async with server.client_session() as http:
            del loop.is_running
            with pytest.raises(RuntimeError, match="started in another event loop"):
                await asyncio.wait_for(http.ws_connect(server.url), timeout=5.0)

    async def test_before_its_start(self) -> None:
        """It has no port yet."""
        with pytest.raises(RuntimeError, match="does not run: async with FakeServer"):
            FakeServer().client_session()


class TestExit:
    @pytest.mark.parametrize("steps", range(8))
    @pytest.mark.parametrize("round_trip", [0.0, 0.02])
    async def test_a_moment_after_the_client(self, round_trip: float, steps: int) -> None:
        """The client's session has closed, as at the end of a test that fails."""
        async with FakeServer(round_trip=round_trip) as server:
            async with server.client_session() as http:
                await http.ws_connect(server.url, headers={"Authorization": f"Bearer {KEY}"})
            for _ in range(steps):
                await asyncio.sleep(0)
        assert server.open_count == 0

    @pytest.mark.parametrize("round_trip", [0.0, 0.02])
    async def test_leaves_nothing(self, round_trip: float) -> None:
        """No task and no socket, whatever the clients were doing, and without delay."""
        before = asyncio.all_tasks()
        async with serving(round_trip, pace=1.0) as client:
            server = client.server
            _, speaking, closed, _, _, silent = [await client.connect() for _ in range(6)]
            await say(speaking, "a long text " * 10)
            await hear(speaking)
            server.connections[3].route.freeze()
            server.connections[4].route.reset()
            server.behaviour.end_before_audio = Ending.SILENT
            await say(silent, "hello")
            await server.wait_for(lambda server: not server.connections[5].is_open)
            server.behaviour.answer_close = False
            closing = asyncio.create_task(closed.close())
            await server.wait_for(lambda server: server.connections[2].close_code is not None)
            server.behaviour.handshake_delay = 60.0
            delayed = asyncio.create_task(client.connect())
            await server.wait_for(lambda server: len(server.handshakes) == 7)
            server.network.stall_new = True
            stalled = asyncio.create_task(client.connect())
            await server.wait_for(lambda server: server.network.accepted == 8)
            started = now()
        assert now() - started < 1
        results = await asyncio.gather(delayed, stalled, return_exceptions=True)
        assert all(isinstance(result, aiohttp.ClientError) for result in results)
        await closing
        assert server.open_count == 0
        assert server.connections[0].ended is End.SHUTDOWN
        assert asyncio.all_tasks() == before
        gc.collect()  # warns of what was left open
