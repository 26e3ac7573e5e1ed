"""L4b: a slow server is not a dead one. A live answer is waited for up to `answer_timeout`."""

from __future__ import annotations

import asyncio

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Heard, Line, all_closed, round_trips_are_known
from tests.live.never_worse import (
    ANSWER_TIMEOUT,
    COLD,
    GENERATION,
    LIVEKITS_OWN,
    as_far_as_xai,
    check_whole,
    timed,
)
from tests.live.peer import until
from xai_pool_patch import PoolOptions

STREAMS = 10
RETRY = ANSWER_TIMEOUT + 0.1 + COLD
"""Seconds to the first audio of a retry: LiveKit waits 0.1 s before it."""

pytestmark = pytest.mark.usefixtures("patched")


async def warm_up(line: Line, tts: xai.TTS) -> None:
    """As many connections are idle from here on as there are streams."""
    await speak_at_once(tts, "Before")
    await until(lambda: xai_pool_patch.stats()["idle"] == STREAMS)
    await until(round_trips_are_known)


async def speak_at_once(tts: xai.TTS, word: str) -> dict[str, Heard]:
    texts = [f"{word} {number}." for number in range(STREAMS)]
    turns = await asyncio.gather(*(timed(tts, text, LIVEKITS_OWN) for text in texts))
    return {text: heard for text, (heard, _) in zip(texts, turns, strict=True)}


def times_sent(line: Line, text: str) -> int:
    return [utterance.text for utterance in line.server.utterances].count(text.replace(" ", ""))


@pytest.mark.parametrize("generation", [7.0, ANSWER_TIMEOUT - 1.0])
async def test_no_slow_turn_is_sent_twice(generation: float) -> None:
    """Replays would add to an overload."""
    async with as_far_as_xai() as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.behaviour.generation = generation
        for text, heard in (await speak_at_once(tts, "Slow")).items():
            check_whole(line, text, heard)
            assert times_sent(line, text) == 1
        assert line.errors == []
        assert len(line.server.handshakes) == STREAMS
        await tts.aclose()
        await all_closed(line.server)


async def test_an_answer_that_comes_too_late_is_not_heard_twice() -> None:
    """Its turn has failed by then, and LiveKit's retry is on a new connection, without a limit."""
    async with as_far_as_xai() as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.behaviour.generation = 1.2 * ANSWER_TIMEOUT
        for text, heard in (await speak_at_once(tts, "Late")).items():
            check_whole(line, text, heard)
            assert times_sent(line, text) == 2
            assert heard.first_audio is not None
            assert heard.first_audio < RETRY - GENERATION + 1.2 * ANSWER_TIMEOUT
        assert len(line.errors) == STREAMS
        await tts.aclose()
        await all_closed(line.server)


async def test_dead_sessions_are_replaced_together() -> None:
    """Each turn has one error, and none of the retries meets another dead session."""
    async with as_far_as_xai() as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.mute_all()
        for text, heard in (await speak_at_once(tts, "Dead")).items():
            check_whole(line, text, heard)
            assert times_sent(line, text) == 2
            assert heard.first_audio is not None
            assert ANSWER_TIMEOUT < heard.first_audio < RETRY
        assert len(line.errors) == STREAMS
        assert xai_pool_patch.stats()["replays"] == 0
        await tts.aclose()
        await all_closed(line.server)


@pytest.mark.parametrize("patched", [PoolOptions(min_size=STREAMS)], indirect=True)
async def test_one_dead_session_takes_those_of_its_age_along() -> None:
    """They are most likely as dead: the next turn does not wait for one of them."""
    async with as_far_as_xai() as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.mute_all()
        heard, _ = await timed(tts, "The first to notice.", LIVEKITS_OWN)
        check_whole(line, "The first to notice.", heard)
        assert not any(connection.is_open for connection in line.server.connections[:STREAMS])
        heard, _ = await timed(tts, "The next.", LIVEKITS_OWN)
        check_whole(line, "The next.", heard)
        assert heard.first_audio is not None
        assert heard.first_audio < COLD
        assert len(line.errors) == 1
        await tts.aclose()
