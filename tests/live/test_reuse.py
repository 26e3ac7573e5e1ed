"""A patched agent speaks every turn over one warm connection."""

from __future__ import annotations

import asyncio

import pytest

import xai_pool_patch
from tests.kit import HAS_NATIVE_POOL, all_closed, line_to, speak

TURNS = 75
"""As many as in livekit/agents issue 6078."""


async def test_unpatched_each_turn_of_issue_6078_dials() -> None:
    """Or all share one connection of the native pool, from 1.6.5 on."""
    async with line_to() as line:
        tts = line.tts()
        for number in range(TURNS):
            assert (await speak(tts, f"This is turn {number}.")).error is None
        await tts.aclose()
        reused = [False] + [HAS_NATIVE_POOL] * (TURNS - 1)
        assert [metric.connection_reused for metric in line.metrics] == reused
        assert len(line.server.connections) == reused.count(False)


async def test_patched_every_turn_of_issue_6078_reuses_one_connection(
    patched: None, no_tasks_left: None
) -> None:
    """Prewarmed: 75 of 75 reused, and nobody waits for it."""
    async with line_to() as line:
        tts = line.tts()
        tts.prewarm()
        await line.server.wait_for(lambda server: server.open_count == 1)
        await _until_idle(1)
        for number in range(TURNS):
            heard = await speak(tts, f"This is turn {number}.")
            assert heard.error is None
            assert heard.samples == {line.server.utterances[number].number}
        assert [metric.connection_reused for metric in line.metrics] == [True] * TURNS
        assert [metric.acquire_time for metric in line.metrics] == [0.0] * TURNS
        assert len(line.server.connections) == 1
        await tts.aclose()
        await all_closed(line.server)


async def test_the_first_turn_without_prewarm_reports_its_handshake(patched: None) -> None:
    """acquire_time is the wait for the connection, and connection_reused is false."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        for number in range(2):
            await speak(tts, f"This is turn {number}.")
        first, second = line.metrics
        assert not first.connection_reused
        assert first.acquire_time >= 3 * 0.02
        assert second.connection_reused
        assert second.acquire_time == 0.0
        await tts.aclose()


async def test_a_second_prewarm_dials_nothing(patched: None) -> None:
    """A session that starts twice, or two agents of one session, hold one connection."""
    async with line_to() as line:
        tts, other = line.tts(), line.tts()
        for each in (tts, tts, other):
            each.prewarm()
        await _until_idle(1)
        await speak(tts, "Hello.")
        await speak(other, "Hello.")
        assert len(line.server.handshakes) == 1
        await tts.aclose()
        assert line.server.open_count == 1, "the other TTS still uses it"
        await other.aclose()
        await all_closed(line.server)


async def test_after_aclose_a_tts_works_again(patched: None) -> None:
    """P10: aclose() ends connections, not the instance."""
    async with line_to() as line:
        tts = line.tts()
        for text in ("One.", "Two."):
            heard = await speak(tts, text)
            assert heard.samples == {line.server.utterance_for(text).number}
            await tts.aclose()
        assert len(line.server.connections) == 2
        await all_closed(line.server)


async def test_a_collected_tts_closes_its_connection(patched: None) -> None:
    """P10: nothing in the framework calls aclose()."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        del tts
        line.metrics.clear()
        import gc

        gc.collect()
        await all_closed(line.server)
        assert line.server.connections[0].close_code == 1000


async def test_api_keys_and_http_sessions_never_share_connections(patched: None) -> None:
    """P9: each has a pool of its own."""
    async with line_to() as line, line.server.client_session() as other_http:
        ttss = [line.tts(), line.tts(http_session=other_http), line.tts(api_key="wrong")]
        heard = [await speak(tts, f"Number {n}.") for n, tts in enumerate(ttss)]
        assert [h.error is None for h in heard] == [True, True, False]
        assert [handshake.status for handshake in line.server.handshakes] == [101, 101, 401]
        for tts in ttss:
            await tts.aclose()


async def test_concurrent_streams_have_a_connection_each(patched: None) -> None:
    """There is one utterance at a time on a connection."""
    async with line_to() as line:
        tts = line.tts()
        texts = [f"This is stream number {n} of ten." for n in range(10)]
        heard = await asyncio.gather(*(speak(tts, text) for text in texts))
        for text, one in zip(texts, heard, strict=True):
            assert one.samples == {line.server.utterance_for(text).number}
        assert all(not connection.violations for connection in line.server.connections)
        await tts.aclose()


async def _until_idle(count: int) -> None:
    """A handshake that the server has accepted still has to arrive."""
    while xai_pool_patch.stats()["idle"] < count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("silence", [0.0, 0.05])
async def test_text_is_sent_word_by_word(patched: None, silence: float) -> None:
    """While an LLM still writes it, over the warm connection."""
    async with line_to() as line:
        tts = line.tts()
        for number in range(3):
            stream = tts.stream()
            async with stream:
                for word in f"This is turn {number} of a slow speaker. ".split(" "):
                    stream.push_text(word + " ")
                    await asyncio.sleep(silence)
                stream.end_input()
                samples = {s async for event in stream for s in event.frame.data if s}
            assert samples == {line.server.utterances[number].number}
        assert len(line.server.connections) == 1
        await tts.aclose()
