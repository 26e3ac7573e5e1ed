"""A slow server is not a dead one: the pool waits for it, and replays hardly anything.

A third of a second stands for the five of `first_audio_timeout`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Heard, Line, line_to, quick, round_trips_are_known, speak
from tests.live.peer import until
from xai_pool_patch import PoolOptions
from xai_pool_patch.pool.round_trips import RoundTrips
from xai_pool_patch.protocol import exchange

TIMEOUT = 0.3
LIMIT = 3 * TIMEOUT
FIVE_SECONDS = APIConnectOptions(max_retry=0, timeout=5.0)
STREAMS = 10


@pytest.fixture(autouse=True)
def patched(request: pytest.FixtureRequest) -> Iterator[None]:
    timeout = getattr(request, "param", TIMEOUT)
    xai_pool_patch.install(PoolOptions(first_audio_timeout=timeout, close_timeout=0.5))
    yield
    xai_pool_patch.uninstall()


async def warm_up(line: Line, tts: xai.TTS, connections: int = 1) -> None:
    """So many are idle from here on, and have received their first PONG."""
    await asyncio.gather(*(speak(tts, f"Before {n}.") for n in range(connections)))
    await until(lambda: xai_pool_patch.stats()["idle"] == connections)
    await until(round_trips_are_known)


def check_heard(line: Line, text: str, heard: Heard) -> None:
    """Of an utterance that was sent twice, one is heard."""
    assert heard.error is None
    spoken = {u.number for u in line.server.utterances if u.text == "".join(text.split())}
    assert len(heard.samples) == 1
    assert heard.samples <= spoken
    wanted = len("".join(text.split())) * line.server.behaviour.speech_per_character
    # The framework may end a sentence with a hundredth of a second of silence.
    assert heard.seconds == pytest.approx(wanted, abs=0.011)


async def test_the_old_connection_speaks_when_no_session_is_left_for_a_replay() -> None:
    """In its own time, as it would unpatched."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.behaviour.max_sessions = 1
        line.server.behaviour.generation = 1.2 * TIMEOUT
        heard = await speak(tts, "Slow.", FIVE_SECONDS)
        check_heard(line, "Slow.", heard)
        assert [handshake.status for handshake in line.server.handshakes] == [101, 429]
        assert len(line.server.utterances) == 2
        assert line.errors == []
        await tts.aclose()


@pytest.mark.parametrize("times", [1.2, 4.0])
async def test_only_the_first_slow_turn_is_replayed(times: float) -> None:
    """From then on the pool knows how long to wait, even if that is very long."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts)
        line.server.behaviour.generation = times * TIMEOUT
        for number in range(3):
            check_heard(line, f"Slow {number}.", await speak(tts, f"Slow {number}.", FIVE_SECONDS))
        sent = [utterance.text for utterance in line.server.utterances]
        assert sent.count("Slow0.") <= 2
        assert [sent.count(text) for text in ("Slow1.", "Slow2.")] == [1, 1]
        assert line.errors == []
        await tts.aclose()


async def test_of_many_slow_turns_few_are_replayed() -> None:
    """Replays would add to an overload."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts, STREAMS)
        line.server.behaviour.generation = 1.7 * TIMEOUT
        texts = [f"Slow {number}." for number in range(STREAMS)]
        heard = await asyncio.gather(*(speak(tts, text, FIVE_SECONDS) for text in texts))
        for text, each in zip(texts, heard, strict=True):
            check_heard(line, text, each)
        assert len(line.server.utterances) <= 2 * STREAMS + 2
        assert len(line.server.handshakes) <= STREAMS + 2
        assert line.errors == []
        await tts.aclose()


async def test_a_turn_is_replayed_before_it_fails() -> None:
    """It was not its turn until then. The framework would retry too, after an error."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts, STREAMS)
        line.server.behaviour.generation = 1.3 * LIMIT
        texts = [f"Slow {number}." for number in range(STREAMS)]
        heard = await asyncio.gather(*(speak(tts, text, FIVE_SECONDS) for text in texts))
        for text, each in zip(texts, heard, strict=True):
            check_heard(line, text, each)
        assert line.errors == []
        await tts.aclose()


async def test_dead_sessions_are_replaced_together() -> None:
    """Once a replay helped the first turn, the others are replayed at once."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts, STREAMS)
        line.server.mute_all()
        line.server.behaviour.handshake_delay = 0.15
        texts = [f"Dead {number}." for number in range(STREAMS)]
        began = asyncio.get_running_loop().time()
        heard = await asyncio.gather(*(speak(tts, text, FIVE_SECONDS) for text in texts))
        took = asyncio.get_running_loop().time() - began
        for text, each in zip(texts, heard, strict=True):
            check_heard(line, text, each)
        assert took < TIMEOUT + STREAMS * 0.15, "one after the other"
        assert len(line.server.utterances) == 3 * STREAMS
        assert line.errors == []
        await tts.aclose()


async def fail(line: Line, tts: xai.TTS, **faults: Any) -> tuple[Heard, float]:
    """A turn on a session that gives nothing; and how long it took to say so."""
    line.server.mute_all()
    for name, value in faults.items():
        setattr(line.server.behaviour, name, value)
    began = asyncio.get_running_loop().time()
    heard = await asyncio.wait_for(speak(tts, "Never heard.", FIVE_SECONDS), 5.0)
    assert heard.samples == set()
    assert len(line.errors) == 1
    return heard, asyncio.get_running_loop().time() - began


async def test_a_session_that_never_answers_is_given_up() -> None:
    """After three times first_audio_timeout, if there is no replacement."""
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts)
        heard, took = await fail(line, tts, max_sessions=1)
        assert getattr(heard.error, "status_code", None) == 429
        assert 2 * TIMEOUT < took < 3 * LIMIT
        assert [handshake.status for handshake in line.server.handshakes[:2]] == [101, 429]
        assert len(line.server.utterances) == 2
        await tts.aclose()


@pytest.mark.parametrize("patched", [2 * TIMEOUT], indirect=True)
async def test_a_session_that_stops_answering_pings_is_given_up_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It answered the PING ahead of the text, and none after first_audio_timeout."""
    monkeypatch.setattr(exchange, "PROBE", RoundTrips(4, at_least=0.1, at_most=0.1))
    async with line_to(quick(), 0.02) as line:
        tts = line.tts()
        await warm_up(line, tts)
        turn = asyncio.create_task(fail(line, tts, max_sessions=1))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        line.server.behaviour.answer_pings = False
        heard, took = await turn
        assert getattr(heard.error, "status_code", None) == 429
        assert 2 * TIMEOUT < took < 2 * LIMIT
        assert line.server.connections[0].pings_received == 3
        await tts.aclose()
