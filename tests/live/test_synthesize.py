"""A3: `TTS.synthesize()`, which reports metrics on one stream and works on another."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from livekit import rtc
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

from tests.kit import Line, line_to, quick, speak
from xai_pool_patch.testing import Ending

pytestmark = pytest.mark.usefixtures("patched")

RETRYING = APIConnectOptions(max_retry=1, retry_interval=0.01, timeout=2.0)


async def synthesized(tts: xai.TTS, text: str, **kwargs: Any) -> rtc.AudioFrame:
    """All of it, and its metrics event after it."""
    async with tts.synthesize(text, **kwargs) as stream:
        return await stream.collect()


def reported(line: Line) -> list[tuple[bool, bool, bool]]:
    """Of each metrics event: streamed, reused, waited."""
    return [(m.streamed, m.connection_reused, m.acquire_time > 0) for m in line.metrics]


async def test_each_metrics_event_belongs_to_its_own_utterance() -> None:
    """Also when streams run in the same task."""
    async with line_to(round_trip=0.01) as line:
        tts = line.tts()
        await speak(tts, "A connection for one of them.")
        line.metrics.clear()
        await asyncio.gather(synthesized(tts, "One."), synthesized(tts, "Two."))
        assert sorted(reported(line)) == [
            (False, False, True),
            (False, True, False),
            (True, False, True),
            (True, True, False),
        ]
        line.metrics.clear()
        await speak(tts, "A stream of its own afterwards.")
        assert reported(line) == [(True, True, False)]
        await tts.aclose()


async def test_a_stream_made_during_a_synthesis_reports_its_own_connection() -> None:
    """Both are made in the same task."""
    async with line_to(quick(pace=5.0, speech_per_character=0.02), round_trip=0.01) as line:
        tts = line.tts()
        await speak(tts, "A connection for one of them.")
        line.metrics.clear()
        async with tts.synthesize("This one takes much longer than the other.") as stream:
            await line.server.wait_for(lambda s: len(s.utterances) == 2)
            await speak(tts, "Hi.")
            await stream.collect()
        assert sorted(reported(line)) == [
            (False, True, False),
            (True, False, True),
            (True, True, False),
        ]
        await tts.aclose()


async def test_a_replay_reports_the_new_connection() -> None:
    """Its audio came over that one, after a wait."""
    async with line_to(quick(), round_trip=0.01) as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.metrics.clear()
        line.server.behaviour.end_before_audio = Ending.CLOSE
        turn = asyncio.create_task(synthesized(tts, "Second."))
        await line.server.wait_for(lambda s: not s.connections[0].is_open)
        line.server.behaviour.end_before_audio = None
        await turn
        assert sorted(reported(line)) == [(False, False, True), (True, False, True)]
        await tts.aclose()


async def test_a_retry_reports_the_attempt_that_was_heard() -> None:
    """A retry of the framework."""
    async with line_to(quick(refuse_next=[503]), round_trip=0.01) as line:
        tts = line.tts()
        frame = await synthesized(tts, "Hello.", conn_options=RETRYING)
        assert set(frame.data) - {0} == {line.server.utterance_for("Hello.").number}
        assert {metric[1:] for metric in reported(line)} == {(False, True)}
        assert (False, False, True) in reported(line)
        await tts.aclose()


async def test_the_stream_is_collected_when_the_caller_drops_it() -> None:
    """Neither its task nor the pool keeps it alive."""
    async with line_to() as line:
        tts = line.tts()
        stream: Any = tts.synthesize("Hello.")
        await stream.collect()
        await stream.aclose()
        gone = weakref.ref(stream)
        del stream
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        await tts.aclose()
