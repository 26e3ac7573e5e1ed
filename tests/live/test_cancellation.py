"""Cancelled at every step of a turn: nothing is left, nothing hangs, nothing is swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Line, all_closed, line_to, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import End


async def cold(line: Line, tts: xai.TTS) -> None:
    """The turn waits for a dial of its own."""
    await tts.aclose()


async def warm(line: Line, tts: xai.TTS) -> None:
    """The turn finds a connection."""
    await speak(tts, "Warming up.")


async def replayed(line: Line, tts: xai.TTS) -> None:
    """The connection that the turn finds has been reset, and nobody knows yet."""
    await speak(tts, "Warming up.")
    line.server.reset_all()


@pytest.mark.parametrize(
    "patched",
    [PoolOptions(interruption="discard"), PoolOptions(interruption="clear")],
    indirect=True,
    ids=lambda options: options.interruption,
)
@pytest.mark.parametrize("prepare", [cold, warm, replayed])
async def test_a_turn_may_be_cancelled_at_any_step(
    prepare: Callable[[Line, xai.TTS], Awaitable[None]],
    patched: None,
    no_tasks_left: None,
) -> None:
    """One step of the event loop later each time, until a turn finishes first."""
    async with line_to(quick(generation=0.0)) as line:
        tts = line.tts()
        steps = finished = 0
        while finished < 3:
            await prepare(line, tts)
            text = f"Turn with {steps} steps."
            turn = asyncio.create_task(speak(tts, text))
            for _ in range(steps):
                await asyncio.sleep(0)
            finished += turn.done()
            turn.cancel()
            await asyncio.wait([turn], timeout=5.0)
            assert turn.done(), f"hangs when cancelled after {steps} steps"
            steps += 1 + steps // 30
        heard = await speak(tts, "Afterwards.")
        assert heard.samples == {line.server.utterance_for("Afterwards.").number}
        assert xai_pool_patch.stats()["leased"] == 0
        await tts.aclose()
        await all_closed(line.server)
        assert all(not connection.violations for connection in line.server.connections)
        ends = {connection.ended for connection in line.server.connections}
        assert ends <= {End.CLIENT_CLOSE, End.SERVER_RESET}
