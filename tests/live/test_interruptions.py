"""The one rule nobody may break: no sample of one utterance is ever heard in another."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import ONCE, Heard, Line, all_closed, interrupted, line_to, quick, speak
from xai_pool_patch.pool.pool import CLOSE_TIMEOUT
from xai_pool_patch.testing import End

TURNS = 300
"""Where the soak is whole; elsewhere fewer."""
SEED = 6078


async def test_no_wrong_sample_after_interruptions_at_random_moments(
    pytestconfig: pytest.Config, no_tasks_left: None
) -> None:
    """In 300 turns, two of three cut off between the first word and the last sample. Each
    connection that was cut off gets a Close frame, and none stays open."""
    turns = min(TURNS, pytestconfig.getoption("--soak-turns") // 4)
    xai_pool_patch.install(xai_pool_patch.PoolOptions())
    chance = random.Random(SEED)
    behaviour = quick(generation=0.01, pace=20.0, speech_per_character=0.02)
    async with line_to(behaviour, round_trip=0.01) as line:
        tts = line.tts()
        tts.prewarm()
        cut_off = 0
        for number in range(turns):
            heard = await _turn(tts, f"This is turn number {number}.", _timeout(chance))
            await _check(line, number, heard)
            cut_off += heard.error is not None
        assert turns / 3 < cut_off < turns, "the moments are badly chosen"
        await tts.aclose()
        await all_closed(line.server)
        _check_endings(line)
    xai_pool_patch.uninstall()


def _timeout(chance: random.Random) -> float | None:
    """Seconds until the interruption; none at all, before the first text, and to the end too.

    A turn takes about 0.05 s here.
    """
    return chance.choice([None, 0.0, chance.uniform(0, 0.02), chance.uniform(0.02, 0.08)])


async def _turn(tts: xai.TTS, text: str, timeout: float | None) -> Heard:
    heard = Heard()
    turn = asyncio.create_task(speak(tts, text, heard=heard))
    _, unfinished = await asyncio.wait([turn], timeout=timeout)
    if unfinished:
        heard.error = InterruptedError()
        turn.cancel()
        await asyncio.wait([turn])
    return heard


async def _check(line: Line, number: int, heard: Heard) -> None:
    spoken = [u.number for u in line.server.utterances if f"number{number}." in u.text]
    assert heard.samples <= set(spoken), f"turn {number} heard {heard.samples}, not {spoken}"
    assert len(spoken) <= 1
    if heard.error is None:
        assert heard.samples


def _check_endings(line: Line) -> None:
    for connection in line.server.connections:
        assert connection.ended is End.CLIENT_CLOSE, connection
        assert connection.violations == []
    for connection in line.server.connections:
        *before, _ = connection.utterances or [None]
        assert all(utterance.finished for utterance in before if utterance), connection


async def test_an_interrupted_connection_gets_its_close_frame_at_once(patched: None) -> None:
    """The server stops speaking, and its session is free, long before the next turn."""
    async with line_to(quick(pace=1.0, speech_per_character=1.0)) as line:
        tts = line.tts()
        await interrupted(line, tts)
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE, 1.0)
        assert line.server.utterances[0].cut_off
        await tts.aclose()


async def test_a_stream_closes_at_once_though_the_server_never_answers_close() -> None:
    """P7: nobody waits for the answer. After the timeout the socket is aborted."""
    xai_pool_patch.install(xai_pool_patch.PoolOptions())
    async with line_to(quick(pace=1.0, speech_per_character=1.0, answer_close=False)) as line:
        tts = line.tts()
        connection = await interrupted(line, tts)
        assert connection.is_open, "the interruption waited for the close"
        closed_at = asyncio.get_running_loop().time()
        await line.server.wait_for(lambda s: not connection.is_open)
        assert connection.ended_at is not None
        assert connection.ended_at - closed_at >= 0.2, "aborted without a chance to answer"
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_aclose_of_a_tts_takes_one_close_timeout() -> None:
    """P7: all connections close side by side, also those whose server does not answer."""
    xai_pool_patch.install(xai_pool_patch.PoolOptions())
    async with line_to(quick(answer_close=False)) as line:
        tts = line.tts()
        await asyncio.gather(*(speak(tts, f"Stream {n}.") for n in range(5)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await tts.aclose()
        assert loop.time() - began < 2 * CLOSE_TIMEOUT, "closed one after the other"
        await all_closed(line.server)
    xai_pool_patch.uninstall()


async def test_late_audio_after_an_interruption_is_never_heard(patched: None) -> None:
    """It ends with the connection of the old utterance."""
    async with line_to(quick(pace=1.0, speech_per_character=1.0), round_trip=0.05) as line:
        tts = line.tts()
        for number in range(5):
            await interrupted(line, tts)
            line.server.behaviour.pace = 1000.0
            heard = await speak(tts, f"And now {number}.")
            assert heard.samples == {line.server.utterance_for(f"And now {number}.").number}
            line.server.behaviour.pace = 1.0
        await tts.aclose()


async def test_a_turn_interrupted_before_its_first_text_discards_its_connection(
    patched: None,
) -> None:
    """L2: the utterance was not finished."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        async with tts.stream() as stream:
            stream.push_text("Sec")
            await _until_leased()
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE)
        assert len(line.server.utterances) == 1
        assert xai_pool_patch.stats()["closed_interrupted"] == 1
        await tts.aclose()


async def test_audio_before_the_first_text_is_not_heard(patched: None) -> None:
    """It belongs to an earlier utterance, so another connection speaks."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        async with tts.stream(conn_options=ONCE) as stream:
            stream.push_text("Sec")
            await _until_leased()
            await line.server.broadcast('{"type":"audio.delta","delta":"CQAJAAkACQAJAAkA"}')
            await line.server.wait_for(lambda s: not s.connections[0].is_open)
            stream.push_text("ond.")
            stream.end_input()
            samples = {s async for event in stream for s in event.frame.data if s}
        assert samples == {line.server.utterance_for("Second.").number} != {9}
        assert line.errors == []
        await tts.aclose()


async def _until_leased() -> None:
    while not xai_pool_patch.stats()["leased"]:
        await asyncio.sleep(0)


async def test_the_dial_of_an_interrupted_turn_serves_the_next(
    patched: None, no_tasks_left: None
) -> None:
    """P3: the interruption does not stop it."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        turn = asyncio.create_task(speak(tts, "Too late."))
        await line.server.wait_for(lambda s: s.network.accepted == 1)
        turn.cancel()
        await asyncio.wait([turn])
        heard = await speak(tts, "In time.")
        assert heard.error is None
        assert len(line.server.handshakes) == 1
        await tts.aclose()
        await all_closed(line.server)


@pytest.mark.parametrize("stray", [{"stray_done": True}, {"late_audio": 0.01}], ids=str)
async def test_audio_between_two_turns_ends_the_connection(
    patched: None, stray: dict[str, Any]
) -> None:
    """C1: neither that audio nor anything after it is heard."""
    async with line_to(quick(**stray)) as line:
        tts = line.tts()
        first = asyncio.create_task(speak(tts, "First."))
        await line.server.wait_for(lambda s: len(s.utterances) == 1)
        line.server.behaviour.stray_done = False
        await first
        await line.server.wait_for(lambda s: not s.connections[0].is_open)
        line.server.behaviour.late_audio = None
        heard = await speak(tts, "Second.")
        assert heard.error is None
        assert heard.samples == {line.server.utterance_for("Second.").number}
        await tts.aclose()


async def test_closing_a_tts_that_speaks_dials_nothing(patched: None) -> None:
    """P10: the interruption that aclose() causes needs no standby."""
    async with line_to(quick(pace=1.0, speech_per_character=1.0)) as line:
        tts = line.tts()
        stream = tts.stream()
        stream.push_text("This is a long sentence.")
        stream.end_input()
        await stream.__anext__()
        await tts.aclose()
        await all_closed(line.server)
        assert len(line.server.handshakes) == 1
