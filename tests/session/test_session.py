"""A real AgentSession, without a room: what a caller would hear."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from livekit.agents import Agent, AgentSession
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Line, all_closed, line_to, quick
from xai_pool_patch import PoolOptions
from xai_pool_patch.demo.conversation import Loudspeaker, Playback, ignore_reported
from xai_pool_patch.testing import End

pytestmark = pytest.mark.usefixtures("patched")

SLOW = {"pace": 10.0, "speech_per_character": 0.02}
"""Slow enough to be interrupted in mid-sentence."""


class Speaker(Agent):
    """An agent that says when it has taken over."""

    def __init__(self, tts: xai.TTS) -> None:
        super().__init__(instructions="", tts=tts)
        self.entered = asyncio.Event()

    async def on_enter(self) -> None:
        self.entered.set()

    async def take_over(self, session: Any) -> None:
        self.entered.clear()
        session.update_agent(self)
        await self.entered.wait()


@asynccontextmanager
async def session_of(agent: Agent, **kwargs: Any) -> AsyncIterator[tuple[Any, Loudspeaker]]:
    session: AgentSession[None] = AgentSession(
        turn_handling={"interruption": {"resume_false_interruption": False}}, **kwargs
    )
    loudspeaker = Loudspeaker(speed=100.0, keep_samples=True)
    session.output.audio = loudspeaker
    await session.start(agent)
    try:
        yield session, loudspeaker
    finally:
        await session.aclose()


def check(line: Line, playback: Playback, text: str) -> None:
    """All of it was the right utterance's. The framework itself may add silence at the end."""
    assert set(playback.samples) - {0} == {line.server.utterance_for(text).number}


async def heard(session: Any, loudspeaker: Loudspeaker, text: str) -> Playback:
    await session.say(text).wait_for_playout()
    return loudspeaker.playbacks[-1]


async def cut_off(session: Any, loudspeaker: Loudspeaker, text: str, after: float) -> None:
    playback = loudspeaker.next_playback()
    handle = session.say(text)
    await playback
    await asyncio.sleep(after)
    handle.interrupt()
    await handle.wait_for_playout()


async def test_a_conversation_over_one_connection() -> None:
    """session.start() prewarms, and every turn from the first on finds the connection."""
    async with line_to() as line:
        tts = line.tts()
        async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
            await line.server.wait_for(lambda s: s.open_count == 1)
            while not xai_pool_patch.stats()["idle"]:
                await asyncio.sleep(0)
            for number in range(5):
                text = f"This is turn {number}."
                check(line, await heard(session, loudspeaker, text), text)
        assert [metric.connection_reused for metric in line.metrics] == [True] * 5
        assert len(line.server.connections) == 1
        await tts.aclose()
        await all_closed(line.server)


@pytest.mark.parametrize(
    "patched",
    [PoolOptions(interruption="discard"), PoolOptions(interruption="clear")],
    indirect=True,
    ids=lambda options: options.interruption,
)
async def test_after_an_interruption_the_next_sentence_is_heard_whole() -> None:
    """And nothing of the interrupted one."""
    chance = random.Random(3)
    async with line_to(quick(**SLOW)) as line:
        tts = line.tts()
        async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
            for number in range(20):
                await cut_off(session, loudspeaker, f"Interrupted {number}.", chance.random() / 50)
                text = f"And then number {number}."
                check(line, await heard(session, loudspeaker, text), text)
        await tts.aclose()
        await all_closed(line.server)
        assert {c.ended for c in line.server.connections} == {End.CLIENT_CLOSE}
        assert all(not connection.violations for connection in line.server.connections)


async def test_an_interruption_before_the_first_audio_does_not_affect_the_next_turn() -> None:
    """The user speaks while the agent still waits."""
    async with line_to(quick(generation=0.05), round_trip=0.01) as line:
        tts = line.tts()
        async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
            for number in range(10):
                handle = session.say(f"Never heard {number}.")
                await asyncio.sleep(0.005 * number)
                handle.interrupt()
                await handle.wait_for_playout()
                text = f"Heard {number}."
                check(line, await heard(session, loudspeaker, text), text)
        assert line.errors == []
        await tts.aclose()


async def test_an_agent_takes_over_the_connection_at_a_handover() -> None:
    """Each agent has a TTS of its own, with the same key."""
    async with line_to() as line:
        first_tts, second_tts = line.tts(), line.tts()
        first, second = Speaker(first_tts), Speaker(second_tts)
        async with session_of(first) as (session, loudspeaker):
            text = "Let me hand you over."
            check(line, await heard(session, loudspeaker, text), text)
            await second.take_over(session)
            text = "Hello, I take over."
            check(line, await heard(session, loudspeaker, text), text)
        assert line.metrics[-1].connection_reused
        assert len(line.server.connections) == 1
        await first_tts.aclose()
        await second_tts.aclose()
        await all_closed(line.server)


async def test_two_agents_with_two_voices_are_never_mixed_up() -> None:
    """Each speaks over connections of its own voice."""
    async with line_to() as line:
        ttss = {voice: line.tts(voice=voice) for voice in ("ara", "eve")}
        agents = {voice: Speaker(tts) for voice, tts in ttss.items()}
        async with session_of(agents["ara"]) as (session, loudspeaker):
            for number, voice in enumerate(["eve", "ara", "eve", "ara"]):
                await agents[voice].take_over(session)
                text = f"Turn {number}."
                check(line, await heard(session, loudspeaker, text), text)
                spoken = line.server.utterance_for(text)
                connection = line.server.connections[spoken.connection - 1]
                assert connection.query["voice"] == voice
        for tts in ttss.values():
            await tts.aclose()
        await all_closed(line.server)


async def test_synthesize_uses_the_same_pool() -> None:
    """A3: both of its metrics events say so."""
    async with line_to(round_trip=0.01) as line:
        tts = line.tts()
        for text in ("First.", "Second."):
            async with tts.synthesize(text) as stream:
                frame = await stream.collect()
            assert set(frame.data) - {0} == {line.server.utterance_for(text).number}
        assert len(line.server.connections) == 1
        for streamed in (True, False):
            events = [metric for metric in line.metrics if metric.streamed == streamed]
            assert [metric.connection_reused for metric in events] == [False, True]
            assert [metric.acquire_time > 0.0 for metric in events] == [True, False]
        await tts.aclose()
        await all_closed(line.server)


async def test_a_server_that_dies_in_mid_sentence_is_an_error() -> None:
    """Not a hang. The framework handles the error, and the next turn speaks again."""
    asyncio.get_running_loop().set_exception_handler(ignore_reported)
    async with line_to(quick(**SLOW)) as line:
        tts = line.tts()
        async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
            playback = loudspeaker.next_playback()
            handle = session.say("This sentence does not come to its end.")
            await playback
            line.server.reset_all()
            await handle.wait_for_playout()
            assert [event.recoverable for event in line.errors] == [False]
            text = "And on we go."
            check(line, await heard(session, loudspeaker, text), text)
        await tts.aclose()


def test_these_tests_use_the_real_plugin() -> None:
    """With a double they would be worth nothing."""
    assert xai.TTS.__module__ == "livekit.plugins.xai.tts"
