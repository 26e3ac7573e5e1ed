"""P4, P10, P11: no turn waits for a handshake that could have been made earlier."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from typing import Any

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Line, all_closed, line_to, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.protocol.connection import transport_of
from xai_pool_patch.protocol.request import Request

VOICES = ("ara", "eve")


async def reused(line: Line, tts: xai.TTS, text: str) -> bool:
    """Speak a turn. Returns whether its connection was there when asked for."""
    heard = await speak(tts, text)
    assert heard.error is None
    assert heard.samples == {line.server.utterance_for(text).number}
    flag: bool = line.metrics[-1].connection_reused
    return flag


async def ready(line: Line, count: int) -> None:
    """Until that many connections were made and none is being dialled."""
    await line.server.wait_for(lambda s: len(s.connections) >= count)
    while xai_pool_patch.stats()["connecting"]:
        await asyncio.sleep(0)


async def interrupted(line: Line, tts: xai.TTS) -> None:
    async with tts.stream() as stream:
        stream.push_text("This is a long sentence.")
        stream.end_input()
        await stream.__anext__()


async def test_after_an_interruption_the_next_turn_finds_a_connection(patched: None) -> None:
    """It is dialled while the user speaks. The pool never holds two that nobody needs."""
    async with line_to(quick(pace=5.0, speech_per_character=0.02), round_trip=0.01) as line:
        tts = line.tts()
        tts.prewarm()
        await ready(line, 1)
        for number in range(5):
            await interrupted(line, tts)
            await ready(line, number + 2)
            assert await reused(line, tts, f"Turn {number}.")
        assert line.server.peak_open <= 2, "one closing, one new"
        await tts.aclose()
        await all_closed(line.server)


async def test_switching_voices_costs_no_handshake(patched: None) -> None:
    """P11: the new voice is dialled at once, and the connection of the old one stays for a
    while."""
    async with line_to(round_trip=0.01) as line:
        tts = line.tts(voice=VOICES[0])
        tts.prewarm()
        await ready(line, 1)
        for number in range(6):
            tts.update_options(voice=VOICES[number % 2])
            await ready(line, min(number + 1, 2))
            text = f"Turn {number}."
            assert await reused(line, tts, text)
            spoken = line.server.utterance_for(text)
            query = line.server.connections[spoken.connection - 1].query
            assert query["voice"] == VOICES[number % 2]
        assert len(line.server.connections) == 2
        await tts.aclose()
        await all_closed(line.server)


async def test_a_voice_left_behind_is_closed_after_max_idle_time() -> None:
    """P6: it holds one of the team's sessions for that long, and no longer."""
    xai_pool_patch.install(PoolOptions(max_idle_time=0.1))
    async with line_to() as line:
        tts = line.tts(voice="ara")
        await speak(tts, "Hello.")
        tts.update_options(voice="eve")
        await line.server.wait_for(
            lambda s: [c.query["voice"] for c in s.connections if c.is_open] == ["eve"]
        )
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_a_change_of_voice_leaves_a_running_utterance_alone(patched: None) -> None:
    """P11: it applies to the next one."""
    async with line_to(quick(pace=10.0, speech_per_character=0.05)) as line:
        tts = line.tts(voice="ara")
        async with tts.stream() as stream:
            stream.push_text("A sentence of some length.")
            stream.end_input()
            await stream.__anext__()
            tts.update_options(voice="eve")
            samples = {s async for event in stream for s in event.frame.data if s}
        spoken = line.server.utterances[0]
        assert spoken.finished
        assert samples == {spoken.number}
        await tts.aclose()


async def test_a_dial_for_old_options_never_serves_new_ones(patched: None) -> None:
    """P11: a turn gets the voice of the moment it asked, also when that changes during the dial."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts(voice="ara")
        first = asyncio.create_task(speak(tts, "First."))
        await line.server.wait_for(lambda s: s.network.accepted == 1)
        tts.update_options(voice="eve")
        await asyncio.gather(first, speak(tts, "Second."))
        voices = {
            text: line.server.connections[line.server.utterance_for(text).connection - 1].query
            for text in ("First.", "Second.")
        }
        assert voices["First."]["voice"] == "ara"
        assert voices["Second."]["voice"] == "eve"
        await tts.aclose()


async def test_connections_are_replaced_before_the_servers_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P5: no turn meets the deadline."""
    # Of half a second the usual lead would be 25 ms, as long as a busy machine may stand still.
    monkeypatch.setattr("xai_pool_patch.pool.pool.ROTATION_LEAD", 0.5)
    xai_pool_patch.install(PoolOptions(max_age=0.8))
    async with line_to(quick(deadline=1.2)) as line:
        tts = line.tts()
        tts.prewarm()
        await ready(line, 1)
        while len(line.server.connections) < 5:
            assert await reused(line, tts, "One more turn.")
            await asyncio.sleep(0.01)
        assert line.errors == []
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_connections_left_from_a_burst_are_closed() -> None:
    """P6: ten at once, and a moment later only what the conversation uses."""
    xai_pool_patch.install(PoolOptions(max_idle_time=0.2))
    async with line_to() as line:
        tts = line.tts()
        await asyncio.gather(*(speak(tts, f"Stream {n}.") for n in range(10)))
        assert line.server.peak_open == 10
        await line.server.wait_for(lambda s: s.open_count == 1)
        assert await reused(line, tts, "Afterwards.")
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_agents_that_share_a_key_share_the_connection(patched: None) -> None:
    """P10: the second agent's first word needs no handshake. The pool ends with its last TTS."""
    async with line_to() as line:
        first, second = line.tts(), line.tts()
        await speak(first, "I hand you over.")
        assert await reused(line, second, "I take over.")
        await first.aclose()
        assert await reused(line, second, "Still here.")
        assert len(line.server.connections) == 1
        line.metrics.clear()
        del second
        gc.collect()
        await all_closed(line.server)


async def test_other_options_have_a_pool_of_their_own(patched: None) -> None:
    """P9: two agents with two voices never share."""
    async with line_to() as line:
        ttss = [line.tts(voice="ara"), line.tts(voice="eve"), line.tts(language="fr")]
        for tts in ttss:
            assert not await reused(line, tts, f"Voice {tts._opts.voice} {tts._opts.language}.")
        assert len(line.server.connections) == 3
        for tts in ttss:
            await tts.aclose()


async def test_min_size_zero_dials_no_standby_but_reuses() -> None:
    """P4: for those who count every session."""
    xai_pool_patch.install(PoolOptions(min_size=0, max_idle_time=0.1))
    async with line_to() as line:
        tts = line.tts()
        assert not await reused(line, tts, "First.")
        assert await reused(line, tts, "Second.")
        await all_closed(line.server)
        assert not await reused(line, tts, "Third.")
        await tts.aclose()
    xai_pool_patch.uninstall()


@pytest.mark.parametrize("patched", [PoolOptions(warm="always")], indirect=True)
async def test_a_standby_is_dialled_when_the_server_comes_back(patched: None) -> None:
    """P4: with backoff, before anybody asks."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Before.")
        line.server.behaviour.refuse_next = [503, 503]
        line.server.reset_all()
        await ready(line, 2)
        assert [h.status for h in line.server.handshakes] == [101, 503, 503, 101]
        assert await reused(line, tts, "After.")
        await tts.aclose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought eager tasks")
async def test_a_standby_that_dies_during_its_dial_under_eager_tasks_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P4: its reader saw its end before the pool had set `on_lost`."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with line_to() as line:
        dial = Request.connect

        async def dies_at_first(request: Request, timeout: float) -> Any:
            ws: Any = await dial(request, timeout)
            if len(line.server.connections) == 1:
                line.server.reset_all()
                while not (transport := transport_of(ws)) or not transport.is_closing():
                    await asyncio.sleep(0)
            return ws

        monkeypatch.setattr(Request, "connect", dies_at_first)
        xai_pool_patch.install()
        tts = line.tts()
        tts.prewarm()
        await ready(line, 1)
        stats = xai_pool_patch.stats()
        assert (stats["idle"], stats["closed_lost"]) == (0, 1)
        await ready(line, 2)
        assert await reused(line, tts, "Hello.")
        await tts.aclose()
        xai_pool_patch.uninstall()


def test_threads_never_share_pools(patched: None) -> None:
    """P9: each has its loop, and each loop its pools."""
    made: list[int] = []
    barrier = threading.Barrier(3, timeout=30)

    async def job() -> None:
        async with line_to() as line:
            tts = line.tts()
            await speak(tts, "Hello.")
            await asyncio.get_running_loop().run_in_executor(None, barrier.wait)
            assert await reused(line, tts, "Hello again.")
            made.append(len(line.server.connections))
            await tts.aclose()

    threads = [threading.Thread(target=asyncio.run, args=(job(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1, 1, 1]
    assert xai_pool_patch.stats()["connections_made"] == 3
    assert xai_pool_patch.stats()["connections_reused"] == 3


@pytest.mark.parametrize("when", ["idle", "leased", "connecting"])
async def test_stats_show_the_connections_by_state(patched: None, when: str) -> None:
    """A snapshot."""
    behaviour = quick(pace=5.0, speech_per_character=0.1)
    async with line_to(behaviour, round_trip=0.01) as line:
        tts = line.tts()
        turn = asyncio.create_task(speak(tts, "Hello."))
        if when == "connecting":
            await line.server.wait_for(lambda s: s.network.accepted == 1)
        elif when == "leased":
            await line.server.wait_for(lambda s: len(s.utterances) == 1)
        else:
            await turn
        stats = xai_pool_patch.stats()
        counts = {key: stats[key] for key in ("idle", "leased", "connecting")}  # type: ignore[literal-required]
        assert counts == {"idle": 0, "leased": 0, "connecting": 0, when: 1}
        await turn
        await tts.aclose()
