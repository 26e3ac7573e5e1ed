"""S3 to S5a: nobody is silent for what the patch keeps, or dials ahead.

Where the plugin by itself would be heard, the same is tried without the patch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, web
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import API_KEY, ONCE, Heard, Line, line_to, quick, speak
from tests.live.never_worse import (
    COLD,
    EITHER,
    LIVEKITS_OWN,
    ROUND_TRIP,
    WARM,
    ByHost,
    as_far_as_xai,
    far,
    installed,
    needs_own_connect,
)
from tests.session.fakes import FakeLLM, FakeSTT, HoldingTurnDetector
from xai_pool_patch.demo.conversation import Loudspeaker
from xai_pool_patch.pool.pool import DIAL_SOFT_TIMEOUT
from xai_pool_patch.protocol.connection import CLOSE_COUNTS
from xai_pool_patch.testing import FakeServer, Refusal
from xai_pool_patch.testing.server import End, ServedConnection, _Session

EITHER_THAT_LETS_GO = pytest.mark.parametrize(
    "is_patched",
    [
        pytest.param(False, id="unpatched", marks=needs_own_connect),
        pytest.param(True, id="patched"),
    ],
)
"""A pool of the plugin's own keeps its connection for five minutes, whoever else is refused."""
PAUSE = 1.0
"""Seconds between two turns: what was dialled ahead is there, if it may be."""


class Team(FakeServer):
    """Its sessions are those of the team, whatever keys the team has.

    Attributes:
        status: of a handshake above the limit.
        close_code: the answer to a session above the limit; None for an error frame.
    """

    status = 429
    close_code: int | None = None

    def _judge(self, request: web.Request) -> int:
        self.behaviour.api_key = request.headers["Authorization"].removeprefix("Bearer ")
        judged = super()._judge(request)
        return self.status if judged == 429 else judged

    async def _serve(self, session: _Session, connection: ServedConnection) -> None:
        if connection.over_limit and self.close_code is not None:
            session.end(End.SERVER_CLOSE, self.close_code)
        await super()._serve(session, connection)


@contextlib.asynccontextmanager
async def team(limit_per_host: int = 0, **behaviour: Any) -> AsyncIterator[tuple[Team, Line]]:
    """A server, and an HTTP session with so many connections to it; 0 for any number."""
    async with (
        Team(round_trip=ROUND_TRIP, behaviour=far(**behaviour)) as server,
        session_to(server, limit_per_host) as http,
    ):
        yield server, Line(server, http)


def session_to(server: FakeServer, limit_per_host: int = 0) -> aiohttp.ClientSession:
    """Also for another event loop than the server's."""
    resolver = ByHost({"api.x.ai": server})
    connector = aiohttp.TCPConnector(
        resolver=resolver, ssl=server.ssl_context, limit_per_host=limit_per_host
    )
    return aiohttp.ClientSession(connector=connector)


async def turn(
    line: Line, tts: xai.TTS, text: str, options: APIConnectOptions = ONCE, longest: float = COLD
) -> Heard:
    """One that is heard, and soon enough; and a pause."""
    heard = await speak(tts, text, options)
    assert heard.error is None
    assert heard.samples == {line.server.utterance_for(text).number}
    assert heard.first_audio is not None
    assert heard.first_audio <= longest
    await asyncio.sleep(PAUSE)
    return heard


async def take_turns(
    line: Line, *ttss: xai.TTS, longest: float, options: APIConnectOptions = ONCE
) -> None:
    for number in range(3):
        for tts in ttss:
            await turn(line, tts, f"Number {number} by {id(tts)}.", options, longest)


REFUSED = COLD + 2 * ROUND_TRIP
"""Seconds: a handshake that is refused takes three round trips, and meanwhile a Close one."""
RETRIED = COLD + 3 * ROUND_TRIP + 0.1
"""Seconds with the first retry of LiveKit's."""


@EITHER_THAT_LETS_GO
@pytest.mark.parametrize("status", [429, 403, 503])
async def test_two_keys_of_a_team_with_one_session(status: int, is_patched: bool) -> None:
    """S3, S4: without a retry, each of them is heard in turn."""
    with installed(is_patched):
        async with team(max_sessions=1) as (server, line):
            server.status = status
            ttss = line.tts(api_key="one"), line.tts(api_key="other")
            await take_turns(line, *ttss, longest=REFUSED)
            assert server.peak_sessions == 1
            refused = [shake for shake in server.handshakes if shake.status == status]
            assert len(refused) == is_patched, "only until the process knows"
            for tts in ttss:
                await tts.aclose()


@EITHER_THAT_LETS_GO
@pytest.mark.parametrize(
    "close_code", [None, WSCloseCode.TRY_AGAIN_LATER, WSCloseCode.POLICY_VIOLATION]
)
async def test_a_session_that_is_refused_after_the_handshake(
    close_code: int | None, is_patched: bool
) -> None:
    """S3a: by an error frame or a Close; LiveKit's retry is heard."""
    with installed(is_patched):
        async with team(max_sessions=1, refusal=Refusal.ERROR_FRAME) as (server, line):
            server.close_code = close_code
            ttss = line.tts(api_key="one"), line.tts(api_key="other")
            await take_turns(line, *ttss, longest=RETRIED, options=LIVEKITS_OWN)
            refused = [each for each in server.connections if each.over_limit]
            assert len(refused) == is_patched, "only until the process knows"
            for tts in ttss:
                await tts.aclose()


@EITHER
async def test_a_key_that_is_rotated_in_mid_call(is_patched: bool) -> None:
    """S3: the old key's connection has the session that the new one needs."""
    with installed(is_patched):
        async with team(max_sessions=1) as (_, line):
            tts = line.tts(api_key="old")
            for number in range(6):
                if number == 2:
                    tts._api_key = "new"
                await turn(line, tts, f"Turn {number}.", longest=REFUSED)
            await tts.aclose()


@pytest.mark.real_time
@EITHER_THAT_LETS_GO
async def test_jobs_as_threads_of_a_process(is_patched: bool) -> None:
    """S4: what is idle in another event loop makes room, without a retry."""
    others: list[Heard] = []
    first_is_over, may_end = threading.Event(), threading.Event()

    async def other_job(server: FakeServer) -> None:
        async with session_to(server) as http:
            tts = xai.TTS(api_key=API_KEY, http_session=http)
            for text in ("First.", "Third."):
                others.append(await speak(tts, text, ONCE))
                first_is_over.set()
                await asyncio.to_thread(may_end.wait)
            await tts.aclose()

    with installed(is_patched):
        async with line_to(quick(max_sessions=1)) as line:
            thread = threading.Thread(target=lambda: asyncio.run(other_job(line.server)))
            thread.start()
            await asyncio.to_thread(first_is_over.wait)
            await asyncio.sleep(0.1)
            tts = line.tts()
            heard = await speak(tts, "Second.", ONCE)
            may_end.set()
            await asyncio.to_thread(thread.join)
            assert [each.error for each in (*others, heard)] == [None] * 3
            assert all(each.samples for each in (*others, heard))
            statuses = [shake.status for shake in line.server.handshakes]
            assert (429 in statuses) == is_patched
            await tts.aclose()


# The connector of aiohttp is full.


@EITHER
@pytest.mark.parametrize("answer_close", [True, False])
async def test_a_change_of_voice_on_a_connector_of_one(
    answer_close: bool, is_patched: bool
) -> None:
    """S4: the old voice's connection makes room; a Close without an answer, after a second."""
    longest = COLD + ROUND_TRIP + (0.0 if answer_close else CLOSE_COUNTS)
    with installed(is_patched):
        async with team(limit_per_host=1, answer_close=answer_close) as (server, line):
            tts = line.tts()
            for number in range(6):
                tts.update_options(voice=f"voice {number // 2}")
                if not is_patched:
                    longest = COLD + 10.0  # of aiohttp, for the answer to a Close
                heard = await turn(line, tts, f"Turn {number}.", LIVEKITS_OWN, longest)
                if is_patched and number % 2:
                    assert heard.first_audio is not None
                    assert heard.first_audio <= WARM
            assert server.peak_open == 1
            server.behaviour.answer_close = True
            await tts.aclose()


@EITHER
async def test_a_change_of_voice_beside_a_socket_of_the_application(is_patched: bool) -> None:
    """S4: the pool does not know of it, and makes room when its own dial takes too long."""
    with installed(is_patched):
        async with team(limit_per_host=2) as (server, line):
            headers = {"Authorization": f"Bearer {API_KEY}"}
            async with line.http.ws_connect("wss://api.x.ai/v1/tts", headers=headers):
                tts = line.tts()
                for number in range(8):
                    tts.update_options(voice=f"voice {number // 2}")
                    longest = COLD + ROUND_TRIP + is_patched * DIAL_SOFT_TIMEOUT
                    await turn(line, tts, f"Turn {number}.", ONCE, longest)
                assert server.peak_open == 2
                await tts.aclose()


@EITHER_THAT_LETS_GO
async def test_two_voices_in_turn_on_a_connector_of_one(is_patched: bool) -> None:
    """S4: neither starves."""
    with installed(is_patched):
        async with team(limit_per_host=1) as (_, line):
            ttss = line.tts(voice="ara"), line.tts(voice="eve")
            await take_turns(line, *ttss, longest=COLD + ROUND_TRIP)
            for tts in ttss:
                await tts.aclose()


# What is not for want of a session.


@pytest.mark.parametrize(
    "message",
    [
        "character limit exceeded",
        "text exceeds the limit of 15000 characters per session",
        "too many people",
        'cannot say "too many open connections"',
    ],
)
async def test_a_text_that_is_refused(message: str, patched: None) -> None:
    """S3a: the machine stays warm, and the next text is as quick as ever."""
    async with as_far_as_xai() as line:
        tts = line.tts()
        for _ in range(3):
            line.server.behaviour.error_on_text = message
            assert (await speak(tts, "Too many people.", ONCE)).error is not None
            line.server.behaviour.error_on_text = None
            await asyncio.sleep(PAUSE)
            await turn(line, tts, "Fine.", longest=WARM)
        assert xai_pool_patch.stats()["lean"] == 0
        assert xai_pool_patch.stats()["rate_limited"] == 0
        await tts.aclose()


# A reply is spoken before it is known whether it is wanted.


@contextlib.asynccontextmanager
async def preemptive_session(
    tts: xai.TTS, model: FakeLLM, ears: FakeSTT
) -> AsyncIterator[Loudspeaker]:
    turns: Any = {
        "turn_detection": HoldingTurnDetector(),
        "endpointing": {"min_delay": 0.05, "max_delay": 1.5},
        "interruption": {"resume_false_interruption": False},
        "preemptive_generation": {"enabled": True, "preemptive_tts": True},
    }
    session: Any = AgentSession(tts=tts, llm=model, stt=ears, vad=None, turn_handling=turns)
    session.output.audio = loudspeaker = Loudspeaker(speed=100.0, keep_samples=True)
    await session.start(Agent(instructions=""))
    try:
        yield loudspeaker
    finally:
        await session.aclose()


@EITHER
async def test_preemptive_tts_on_one_session(is_patched: bool) -> None:
    """Two of three replies are given up. The last is heard, and the patch is never refused."""
    replies = [f"Reply {number}." for number in range(12)]
    model, ears = FakeLLM(*replies), FakeSTT()
    for _ in replies:
        model.release()
    with installed(is_patched):
        async with team(max_sessions=1) as (server, line):
            tts = line.tts()
            async with preemptive_session(tts, model, ears) as loudspeaker:
                await asyncio.sleep(2 * PAUSE)
                for _ in range(4):
                    for words in ("What", "is", "the time?"):
                        ears.hear(words)
                        await asyncio.sleep(0.4)
                    await asyncio.sleep(6.0)
                heard = [set(each.samples) - {0} for each in loudspeaker.playbacks]
                assert len(heard) == 4
                assert all(len(samples) == 1 for samples in heard)
                assert model.asked == len(replies)
                if is_patched:
                    assert {shake.status for shake in server.handshakes} == {101}
            await tts.aclose()
