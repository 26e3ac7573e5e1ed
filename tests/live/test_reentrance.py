"""The plugin's turns beside a log handler that runs the event loop again."""

from __future__ import annotations

import asyncio
import random

import pytest
from livekit.plugins import xai

from tests.kit import Line, all_closed, interrupted, line_to, quick, speak
from tests.live.never_worse import check_whole, faults, installed
from tests.reentrant import log_that_runs_the_loop

TURNS = 40


async def converse(line: Line, tts: xai.TTS, name: str, chance: random.Random) -> None:
    """Turns that are heard whole, and interrupted ones between them."""
    for number in range(TURNS):
        text = f"{name} says number {number}."
        check_whole(line, text, await speak(tts, text))
        if chance.random() < 0.3:
            await interrupted(line, tts)
        if chance.random() < 0.1:
            tts.update_options(voice=chance.choice(["ara", "eve"]))
        await asyncio.sleep(chance.choice([0.0, 0.01, 0.5]))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_turn_is_silent_beside_a_handler_that_runs_the_loop(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Four agents with one key, who take each other's connections."""
    with installed(), log_that_runs_the_loop() as handler:
        async with line_to(quick(pace=100.0), 0.02) as line:
            chance = random.Random(seed)
            names = ["Ann", "Bob", "Cem", "Dee"]
            ttss = [line.tts() for _ in names]
            pairs = zip(ttss, names, strict=True)
            await asyncio.gather(*(converse(line, tts, name, chance) for tts, name in pairs))
            for tts in ttss:
                await tts.aclose()
            await all_closed(line.server)
    assert handler.callbacks > 0, "it ran nothing"
    assert faults(caplog) == []
