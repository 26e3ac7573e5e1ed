"""A patched agent speaks every turn over one warm connection."""

from __future__ import annotations

import asyncio

import pytest

import xai_pool_patch
from tests.kit import HAS_NATIVE_POOL, all_closed, line_to, speak

TURNS = 75
"""As many as in livekit/agents issue 6078."""


async def test_the_reports_own_case_unpatched() -> None:
    """The plugin as it is: a connection for every turn, or one of its native pool for all."""
    async with line_to() as line:
        tts = line.tts()
        for number in range(TURNS):
            assert (await speak(tts, f"This is turn {number}.")).error is None
        await tts.aclose()
        reused = [False] + [HAS_NATIVE_POOL] * (TURNS - 1)
        assert [metric.connection_reused for metric in line.metrics] == reused
        assert len(line.server.connections) == reused.count(False)


async def test_the_reports_own_case_patched(patched: None, no_tasks_left: None) -> None:
    """Prewarmed: 75 of 75 reused, one connection, and nobody waits for it."""
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
    """acquire_time is the wait for the connection, connection_reused is false."""
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


async def test_prewarm_twice_is_once(patched: None) -> None:
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
    """P10: closing is an end of what was, not of the instance."""
    async with line_to() as line:
        tts = line.tts()
        for text in ("One.", "Two."):
            heard = await speak(tts, text)
            assert heard.samples == {line.server.utterance_for(text).number}
            await tts.aclose()
        assert len(line.server.connections) == 2
        await all_closed(line.server)


async def test_a_collected_tts_closes_its_connection(patched: None) -> None:
    """P10: nobody has to call aclose(), and nothing in the framework does."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        del tts
        line.metrics.clear()
        import gc

        gc.collect()
        await all_closed(line.server)
        assert line.server.connections[0].close_code == 1000


async def test_keys_are_never_mixed(patched: None) -> None:
    """P9: neither API keys nor HTTP sessions share connections."""
    async with line_to() as line, line.server.client_session() as other_http:
        ttss = [line.tts(), line.tts(http_session=other_http), line.tts(api_key="wrong")]
        heard = [await speak(tts, f"Number {n}.") for n, tts in enumerate(ttss)]
        assert [h.error is None for h in heard] == [True, True, False]
        assert [handshake.status for handshake in line.server.handshakes] == [101, 101, 401]
        for tts in ttss:
            await tts.aclose()


async def test_concurrent_streams_have_a_connection_each(patched: None) -> None:
    """Strictly one utterance at a time on a connection."""
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
async def test_words_that_come_slowly(patched: None, silence: float) -> None:
    """Text that an LLM still writes goes out word by word over the warm connection."""
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
