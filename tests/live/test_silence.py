"""How long an agent is silent: until the answer comes, or until it is certain that none will."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from livekit.plugins import xai

from tests.kit import API_KEY, ONCE, Heard, Line, hear_whole, round_trips_are_known
from tests.live.never_worse import (
    ANSWER_TIMEOUT,
    COLD,
    EITHER,
    FOR_EVER,
    LIVEKITS_OWN,
    ROUND_TRIP,
    as_far_as_xai,
    check_whole,
    dials_unpatched,
    installed,
    needs_own_connect,
    timed,
)
from tests.live.peer import until
from tests.live.test_like_the_real_websocket import Pronounces

WRITING = 1.0
"""Seconds that the LLM still writes after the frame has come."""
FRAMES: dict[str, str | bytes] = {
    "binary": b"\x00\x01",
    "unknown": json.dumps({"type": "session.created"}),
    "session.updated": json.dumps({"type": "session.updated"}),
    "audio.clear": json.dumps({"type": "audio.clear"}),
}


async def write(
    tts: xai.TTS, options: Any, meanwhile: Callable[[], Any], finished_at: list[float]
) -> Heard:
    """A turn whose text comes in two pieces."""
    heard = Heard()
    loop = asyncio.get_running_loop()
    async with tts.stream(conn_options=options) as stream:
        stream.push_text("The first half, ")
        await asyncio.sleep(ROUND_TRIP)
        await meanwhile()
        await asyncio.sleep(WRITING)
        stream.push_text("and the second.")
        stream.end_input()
        finished_at.append(loop.time())
        try:
            async for event in stream:
                if heard.first_audio is None:
                    heard.first_audio = loop.time() - finished_at[0]
                heard.samples.update(sample for sample in event.frame.data if sample)
                heard.seconds += event.frame.duration
        except Exception as error:
            heard.error = error
    return heard


async def warmed_up(line: Line, tts: xai.TTS) -> None:
    await hear_whole(line, tts, "Before.")
    await until(round_trips_are_known)


@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize("retries", [False, True], ids=["once", "retrying"])
async def test_a_dead_session_that_said_something_else_is_given_up(
    retries: bool, frame: str
) -> None:
    """It answers PINGs, sends one such frame while the LLM still writes, and then nothing. The
    error comes in time, and the framework's retry is heard."""
    with installed():
        async with as_far_as_xai() as line:
            tts = line.tts()
            await warmed_up(line, tts)
            line.server.mute_all()
            finished_at: list[float] = []
            options = LIVEKITS_OWN if retries else ONCE
            turn = write(tts, options, lambda: line.server.broadcast(FRAMES[frame]), finished_at)
            heard = await asyncio.wait_for(turn, FOR_EVER)
            took = asyncio.get_running_loop().time() - finished_at[0]
            if retries:
                check_whole(line, "The first half, and the second.", heard)
                assert heard.first_audio is not None
                assert heard.first_audio < ANSWER_TIMEOUT + 0.1 + COLD + 1.0
            else:
                assert took < ANSWER_TIMEOUT + 1.0
                assert heard.error is not None or heard.seconds > 0.0
            await hear_whole(line, tts, "After.")
            await tts.aclose()


@needs_own_connect
@pytest.mark.parametrize("retries", [False, True], ids=["once", "retrying"])
async def test_a_dead_session_that_got_a_session_update_is_given_up(retries: bool) -> None:
    """What the application sends besides texts does not switch the watch off."""
    with installed():
        async with as_far_as_xai() as line:
            tts = Pronounces(api_key=API_KEY, http_session=line.http)
            await warmed_up(line, tts)
            await asyncio.sleep(1.0)
            line.server.mute_all()
            heard, took = await timed(tts, "Is anybody there?", LIVEKITS_OWN if retries else ONCE)
            assert took < ANSWER_TIMEOUT + 0.1 + 2 * COLD + 1.0
            if retries:
                check_whole(line, "Is anybody there?", heard)
            await hear_whole(line, tts, "After.")
            await tts.aclose()


@EITHER
@pytest.mark.parametrize("max_sessions", [None, 1])
async def test_one_slow_sentence_is_waited_for(max_sessions: int | None, is_patched: bool) -> None:
    """17 s on a healthy connection, as was reported of xAI: it is spoken once, and heard."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = line.tts()
            for number in range(2):
                await hear_whole(line, tts, f"Before {number}.")
            if is_patched:
                await until(round_trips_are_known)
            line.server.behaviour.generation = 17.0
            line.server.behaviour.max_sessions = max_sessions
            heard, _ = await timed(tts, "Slow.", ONCE)
            check_whole(line, "Slow.", heard)
            assert heard.first_audio is not None
            assert heard.first_audio < 17.0 + COLD
            line.server.behaviour.generation = 0.31
            await hear_whole(line, tts, "After.")
            assert len(line.server.utterances) == 4
            assert len(line.server.connections) <= dials_unpatched(4)
            await tts.aclose()
