"""A time that passes only while the event loop runs, on a loop whose time is injected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.unit.pool_kit import no_fault
from tests.virtual import block, run
from xai_pool_patch.pool.soft_timeout import TICKS, SoftTimeout
from xai_pool_patch.pool.supervisor import Supervisor

SECONDS = 1.0
TICK = SECONDS / TICKS

Meanwhile = Callable[[SoftTimeout], Coroutine[Any, Any, None]]


def ends_of(meanwhile: Meanwhile, seconds: float = SECONDS) -> list[float]:
    """When it ended, by the clock, while that happened."""

    async def scenario() -> list[float]:
        loop = asyncio.get_running_loop()
        began, ends = loop.time(), list[float]()
        supervisor = Supervisor(no_fault, close_timeout=1.0)
        patience = SoftTimeout(supervisor, seconds, lambda: ends.append(loop.time() - began))
        await meanwhile(patience)
        await asyncio.sleep(10.0)
        assert patience.is_over == (seconds == 0.0 or ends != [])
        return ends

    return run(scenario())


async def nothing(patience: SoftTimeout) -> None:
    await asyncio.sleep(SECONDS - TICK / 2)
    assert not patience.is_over


async def a_block(patience: SoftTimeout) -> None:
    await asyncio.sleep(2.5 * TICK)
    block(5.0)
    await asyncio.sleep(0.0)
    assert not patience.is_over


async def a_stop(patience: SoftTimeout) -> None:
    await asyncio.sleep(2.5 * TICK)
    patience.stop()
    patience.stop()


def test_it_ends_once_and_on_time() -> None:
    assert ends_of(nothing) == [pytest.approx(SECONDS)]


def test_a_block_costs_one_tick_at_most() -> None:
    assert ends_of(a_block) == [pytest.approx(2.5 * TICK + 5.0 + (TICKS - 3) * TICK)]


def test_one_that_is_stopped_never_ends() -> None:
    assert ends_of(a_stop) == []


def test_none_at_all_is_over_from_the_start() -> None:
    """Nobody waited, so nobody is told; and stopping it is no fault."""
    assert ends_of(a_stop, seconds=0.0) == []
