"""What the probe advises makes a conversation better, or leaves it as it is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

import xai_pool_patch
from tests.kit import all_closed, hear_whole, interrupted, line_to, quick, speak
from tests.probe.kit import HASTY, SHORT, serving
from xai_pool_patch import PoolOptions
from xai_pool_patch.probe import by_name
from xai_pool_patch.probe.question import Finding, Question, advice
from xai_pool_patch.probe.quick import QUICK
from xai_pool_patch.probe.service import Timing

pytestmark = pytest.mark.asyncio

QUESTIONS = {question.name: question for question in QUICK}


async def advised(
    base: PoolOptions, *questions: Question, timing: Timing = SHORT, **behaviour: Any
) -> PoolOptions:
    """The options with what the answers of such a server advise."""
    findings = []
    async with serving(timing, **behaviour) as service:
        for question in questions:
            findings.append(Finding(question, await question.ask(service)))
    return replace(base, **advice(findings))


async def connections_after(options: PoolOptions, pause: float, **behaviour: Any) -> int:
    """How many connections two turns need, with a pause between them."""
    xai_pool_patch.install(options)
    try:
        async with line_to(quick(**behaviour)) as line:
            tts = line.tts()
            await hear_whole(line, tts, "First.")
            await asyncio.sleep(pause)
            await hear_whole(line, tts, "Second.")
            await tts.aclose()
            await all_closed(line.server)
            return len(line.server.connections)
    finally:
        xai_pool_patch.uninstall()


async def connections_after_interruption(options: PoolOptions, **behaviour: Any) -> int:
    """How many connections a turn and an interrupted one before it need."""
    xai_pool_patch.install(options)
    try:
        async with line_to(quick(**behaviour)) as line:
            tts = line.tts()
            await interrupted(line, tts)
            await hear_whole(line, tts, "Second.")
            await tts.aclose()
            await all_closed(line.server)
            return len(line.server.connections)
    finally:
        xai_pool_patch.uninstall()


async def test_a_cancel_that_works() -> None:
    """It saves the connection of an interrupted utterance."""
    base = PoolOptions()
    questions = QUESTIONS["clear, speaking"], QUESTIONS["fence"]
    options = await advised(base, *questions)
    slow = {"pace": 5.0, "speech_per_character": 0.1}
    assert await connections_after_interruption(base, **slow) == 2
    assert await connections_after_interruption(options, **slow) == 1


async def test_pings_without_an_answer() -> None:
    """No connection ends for them, so nothing is advised."""
    base = PoolOptions(heartbeat=0.1)
    assert await advised(base, QUESTIONS["PING"], timing=HASTY, answer_pings=False) == base
    assert await connections_after(base, 0.5, answer_pings=False) == 1


async def test_a_session_that_is_dead_behind_its_edge() -> None:
    """The next turn does not meet it: the idle connection was replaced before."""
    behaviour = {"idle_death": 0.6}
    base = PoolOptions(answer_timeout=1.0)
    options = await advised(base, by_name.idle(0.8), timing=HASTY, **behaviour)
    assert options.max_age == 0.4
    default, replaced = [await failures(each, 0.8, **behaviour) for each in (base, options)]
    assert (default, replaced) == (1, 0)


async def failures(options: PoolOptions, pause: float, **behaviour: Any) -> int:
    """How many utterances have no answer, of two with a pause between them."""
    xai_pool_patch.install(options)
    try:
        async with line_to(quick(**behaviour)) as line:
            tts = line.tts()
            await hear_whole(line, tts, "First.")
            await asyncio.sleep(pause)
            heard = await speak(tts, "Second.")
            await tts.aclose()
            await all_closed(line.server)
            return int(heard.error is not None)
    finally:
        xai_pool_patch.uninstall()
