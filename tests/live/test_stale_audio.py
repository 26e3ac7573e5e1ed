"""Audio that comes after the server's `audio.done` is not heard in any other turn.

The fake server's pieces of audio are odd in length: one that got into a turn would not only be
heard there, but turn all that follows it into noise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import xai_pool_patch
from tests.kit import (
    connections,
    hear_whole,
    interrupted,
    line_to,
    quick,
    round_trips_are_known,
    speak,
)
from tests.live.peer import until
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import End

ROUND_TRIP = 0.1
TURNS = 6
AT_ONCE = 0.4
"""Seconds: ten times what it takes, and a good part of what a PONG is waited for here."""


@pytest.fixture(params=["discard", "clear"])
def interruption(request: pytest.FixtureRequest) -> Iterator[str]:
    xai_pool_patch.install(PoolOptions(interruption=request.param))
    yield request.param
    xai_pool_patch.uninstall()


@pytest.mark.parametrize("delay", [0.03, 0.07])
async def test_audio_in_flight_when_the_next_turn_begins_is_not_heard(
    interruption: str, delay: float
) -> None:
    """L4a: the turn is replayed over another connection. Nothing of it is lost."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await interrupted(line, tts)
        await speak(tts, "Before.")
        await until(round_trips_are_known)
        connections = len(line.server.connections)
        line.server.behaviour.late_audio = delay
        for number in range(TURNS):
            await hear_whole(line, tts, f"Turn {number}.")
        assert len(line.server.connections) == connections + TURNS - 1
        assert [metric.connection_reused for metric in line.metrics][1 - TURNS :] == [False] * (
            TURNS - 1
        )
        assert xai_pool_patch.stats()["replays"] == TURNS - 1  # the first has no turn before it
        assert line.errors == []
        await tts.aclose()


async def test_audio_on_an_idle_connection_ends_it(interruption: str) -> None:
    """It is replaced before the next turn."""
    async with line_to(quick(late_audio=0.02)) as line:
        tts = line.tts()
        for number in range(TURNS):
            await hear_whole(line, tts, f"Turn {number}.")
            await line.server.wait_for(lambda s, n=number: len(s.connections) == n + 2)
            while xai_pool_patch.stats()["idle"] != 1:
                await asyncio.sleep(0)
        assert [c.ended for c in line.server.connections[:-1]] == [End.CLIENT_CLOSE] * TURNS
        assert len(line.server.utterances) == TURNS
        assert line.errors == []
        await tts.aclose()


async def test_late_pongs_delay_one_turn_only(interruption: str) -> None:
    """It is replayed, and the replay shows that the PONGs say nothing. No turn waits again."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await hear_whole(line, tts, "First.")
        await until(round_trips_are_known)
        line.server.behaviour.pong_delay = 3.0
        held = await hear_whole(line, tts, "Second.")
        for text in ("Third.", "Fourth."):
            heard = await hear_whole(line, tts, text)
            assert heard.first_audio is not None
            assert held.first_audio is not None
            assert heard.first_audio < held.first_audio / 2
        assert (len(line.server.connections), len(line.server.utterances)) == (2, 5)
        assert line.errors == []
        await tts.aclose()


@pytest.mark.parametrize("is_prewarmed", [False, True], ids=["cold", "prewarmed"])
@pytest.mark.parametrize("pong_delay", [0.1, 0.5])
async def test_pongs_that_always_come_after_the_audio_delay_no_turn(
    interruption: str, pong_delay: float, is_prewarmed: bool
) -> None:
    """They do not separate old audio from new, so the pool does not wait for them."""
    async with line_to(quick(pong_delay=pong_delay), 0.02) as line:
        tts = line.tts()
        if is_prewarmed:
            tts.prewarm()
            await until(lambda: connections() and round_trips_are_known())
        waits = []
        for number in range(TURNS):
            heard = await hear_whole(line, tts, f"Turn {number}.")
            waits.append(heard.first_audio or 0.0)
            await until(round_trips_are_known)
        assert sorted(waits)[TURNS // 2] < AT_ONCE
        assert (len(line.server.connections), len(line.server.utterances)) == (1, TURNS)
        assert line.errors == []
        await tts.aclose()


async def test_a_server_without_pongs_delays_no_turn(interruption: str) -> None:
    """The pool does not wait for what never comes."""
    async with line_to(quick(answer_pings=False), 0.02) as line:
        tts = line.tts()
        first, *others = [await hear_whole(line, tts, f"Turn {n}.") for n in range(TURNS)]
        for heard in others:
            assert heard.first_audio is not None
            assert first.first_audio is not None
            assert heard.first_audio < first.first_audio
        assert (len(line.server.connections), len(line.server.utterances)) == (1, TURNS)
        assert line.errors == []
        await tts.aclose()
