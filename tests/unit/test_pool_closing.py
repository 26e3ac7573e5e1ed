"""The end of a pool: what it closes, what it finishes, and who gets an error."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pool_kit import HANDSHAKE, Network, Wire, about, idle, leased, now, with_pool
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import Pool, PoolClosedError


@with_pool()
async def test_discard_does_not_wait_for_the_close(pool: Pool[Wire]) -> None:
    """P7: discard() is synchronous; the connection closes in the background."""
    wire = await leased(pool)
    pool.give_back(wire, Outcome.INTERRUPTED)
    assert wire.closed_at == about(now())


@with_pool()
async def test_acquire_raises_on_a_closed_pool(pool: Pool[Wire]) -> None:
    """The caller must not wait for ever."""
    await pool.aclose()
    with pytest.raises(PoolClosedError):
        await pool.acquire(10.0)


@with_pool()
async def test_close_serves_waiting_callers_and_keeps_nothing(
    network: Network, pool: Pool[Wire]
) -> None:
    """No turn falls silent because its pool ends. The pool closes what is released later."""
    pool.resize(1)
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.close()
    wire = await caller
    assert wire.is_open
    pool.give_back(wire, Outcome.FINISHED)
    assert not wire.is_open
    await asyncio.sleep(100.0)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_aclose_cancels_a_hanging_dial_after_close_timeout(
    network: Network, pool: Pool[Wire]
) -> None:
    """Its caller gets a PoolClosedError, and nothing is dialled again."""
    network.hang_next = 1
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    began = now()
    await pool.aclose()
    assert now() - began <= 5.1
    assert len(network.dialled_at) == 1, "dialled again for a pool that has ended"
    with pytest.raises(PoolClosedError):
        await caller


@with_pool()
async def test_aclose_waits_close_timeout_for_dials_and_closes_together(
    network: Network, pool: Pool[Wire]
) -> None:
    """Closes get only what the dials have left of close_timeout."""
    wire = await leased(pool)
    closing = asyncio.ensure_future(asyncio.sleep(100.0))
    wire.close = lambda listen: closing  # type: ignore[method-assign,assignment,return-value]
    network.hang_next = 1
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.give_back(wire, Outcome.INTERRUPTED)
    wire.is_open = False
    began = now()
    await pool.aclose()
    assert now() - began == pytest.approx(5.0)
    assert closing.cancelled()
    with pytest.raises(PoolClosedError):
        await caller


@with_pool()
async def test_aclose_finishes_a_standbys_dial_and_closes_the_connection(
    network: Network, pool: Pool[Wire]
) -> None:
    """So the server gets a Close frame."""
    pool.resize(1)
    await asyncio.sleep(0.1)
    await pool.aclose()
    assert len(network.wires) == 1
    assert not network.wires[0].is_open


@with_pool()
async def test_a_pool_whose_http_session_is_closed_ends_quietly(
    network: Network, pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: no new dial and no warning."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    network.is_gone = True
    wire.break_off()
    await asyncio.sleep(3600.0)
    assert pool.is_closed
    assert len(network.dialled_at) == 1
    await pool.aclose()
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


@with_pool()
async def test_a_standby_that_fails_with_a_closed_http_session_is_not_counted(
    network: Network, pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: that failure was to be expected, so there is no warning either."""
    network.refuse = [FailureKind.TRANSIENT]
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE / 2)
    network.is_gone = True
    await asyncio.sleep(HANDSHAKE)
    assert pool.metrics.counters.totals["standby_failures"] == 0
    await pool.aclose()
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []
