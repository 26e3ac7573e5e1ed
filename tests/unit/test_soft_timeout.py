"""A timeout that counts only the time in which the event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.clock import block, in_virtual_time
from tests.unit.pool_kit import no_fault
from xai_pool_patch.pool.soft_timeout import TICKS, SoftTimeout
from xai_pool_patch.pool.supervisor import Supervisor

SECONDS = 1.0
TICK = SECONDS / TICKS

Meanwhile = Callable[[SoftTimeout], Coroutine[Any, Any, None]]


async def ends_of(meanwhile: Meanwhile) -> list[float]:
    """After how many seconds a soft timeout called back, while that happened."""
    loop = asyncio.get_running_loop()
    began, ends = loop.time(), list[float]()
    supervisor = Supervisor(no_fault)
    timeout = SoftTimeout(supervisor, SECONDS, lambda: ends.append(loop.time() - began))
    await meanwhile(timeout)
    await asyncio.sleep(10.0)
    assert timeout.is_over == (ends != [])
    return ends


async def nothing(timeout: SoftTimeout) -> None:
    await asyncio.sleep(SECONDS - TICK / 2)
    assert not timeout.is_over


async def a_block(timeout: SoftTimeout) -> None:
    await asyncio.sleep(2.5 * TICK)
    block(5.0)
    await asyncio.sleep(0.0)
    assert not timeout.is_over


async def a_stop(timeout: SoftTimeout) -> None:
    await asyncio.sleep(2.5 * TICK)
    timeout.stop()
    timeout.stop()


@in_virtual_time
async def test_it_calls_back_once_and_on_time() -> None:
    """Nothing else happens on the loop."""
    assert await ends_of(nothing) == [pytest.approx(SECONDS)]


@in_virtual_time
async def test_a_blocked_loop_counts_as_one_tick_at_most() -> None:
    """Five seconds of blocking stand for the rest of one tick."""
    assert await ends_of(a_block) == [pytest.approx(2.5 * TICK + 5.0 + (TICKS - 3) * TICK)]


@in_virtual_time
async def test_a_stopped_one_never_calls_back() -> None:
    """A second stop() changes nothing."""
    assert await ends_of(a_stop) == []
