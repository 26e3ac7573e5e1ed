"""Connections that grow old, or that nobody needs any more."""

from __future__ import annotations

import asyncio

from tests.clock import block
from tests.unit.pool_kit import Network, Wire, idle, leased, now, with_pool
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import SPARE_IDLE_TIME, Pool

MAX_AGE = PoolOptions().max_age


@with_pool()
async def test_no_connection_is_handed_out_beyond_max_age(pool: Pool[Wire]) -> None:
    """P5: acquire() checks the age again, since a blocked loop delays the timers."""
    [wire] = await idle(pool, 1)
    block(MAX_AGE)
    acquired = await pool.acquire(10.0)
    assert acquired.connection is not wire
    assert not acquired.reused
    assert pool.metrics.counters.totals["closed_expired"] == 1


@with_pool()
async def test_a_dead_idle_connection_is_not_handed_out(pool: Pool[Wire]) -> None:
    """C1: acquire() asks the connection itself whether it is reusable."""
    [wire] = await idle(pool, 1)
    wire.is_reusable = False
    assert await leased(pool) is not wire
    assert pool.metrics.counters.totals["closed_lost"] == 1


@with_pool()
async def test_an_old_idle_connection_is_replaced_first_and_closed_then(
    network: Network, pool: Pool[Wire]
) -> None:
    """P5: at every moment of six hours there is a connection young enough to be handed out."""
    pool.resize(1)
    await asyncio.sleep(1.0)
    for _ in range(6 * 3600):
        await asyncio.sleep(1.0)
        assert pool.idle >= 1
        assert len(network.open) <= 2
        assert all(now() - wire.made_at <= MAX_AGE for wire in network.open)
    lifetimes = [w.closed_at - w.made_at for w in network.wires if w.closed_at is not None]
    assert len(lifetimes) >= 40
    assert min(lifetimes) >= MAX_AGE * 0.85
    assert len({round(lifetime) for lifetime in lifetimes}) > 3, "no jitter"


@with_pool()
async def test_an_old_connection_serves_until_its_replacement_is_there(
    network: Network, pool: Pool[Wire]
) -> None:
    """P5: if no replacement can be dialled, the old connection serves until it expires."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    network.refuse = [FailureKind.TRANSIENT] * 1000
    while len(network.dialled_at) < 2:
        await asyncio.sleep(1.0)
    assert await leased(pool) is wire
    pool.give_back(wire, Outcome.FINISHED)
    await asyncio.sleep(0.11 * MAX_AGE)
    assert not wire.is_open


@with_pool()
async def test_a_connection_that_expired_while_leased_is_closed_on_release(
    pool: Pool[Wire],
) -> None:
    """P5: and replaced."""
    pool.resize(1)
    wire = await leased(pool)
    await asyncio.sleep(MAX_AGE + 1.0)
    assert wire.is_open
    pool.give_back(wire, Outcome.FINISHED)
    assert not wire.is_open
    assert pool.connecting == 1


@with_pool()
async def test_an_expired_connection_is_not_handed_to_a_waiter(pool: Pool[Wire]) -> None:
    """P5: the waiter gets a young one, even if that takes longer."""
    wire = await leased(pool)
    await asyncio.sleep(MAX_AGE + 1.0)
    waiting = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.give_back(wire, Outcome.FINISHED)
    assert await waiting is not wire


@with_pool()
async def test_connections_above_min_size_close_within_seconds(pool: Pool[Wire]) -> None:
    """S5: and never those that min_size asks for."""
    pool.resize(1)
    await idle(pool, 5)
    await asyncio.sleep(SPARE_IDLE_TIME - 0.5)
    assert pool.idle == 5
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@with_pool()
async def test_a_dial_under_way_counts_when_the_pool_trims(pool: Pool[Wire]) -> None:
    """P6: the connection it brings takes the place of the one that was idle longest."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    await asyncio.sleep(61.0)
    assert wire.is_open
    wanting = asyncio.create_task(pool.acquire(10.0, fresh=True))
    await asyncio.sleep(0.1)
    assert not wire.is_open
    pool.give_back((await wanting).connection, Outcome.FINISHED)


@with_pool()
async def test_idle_time_begins_with_the_last_use(network: Network, pool: Pool[Wire]) -> None:
    """P6: a surplus connection in steady use stays."""
    pool.resize(1)
    await idle(pool, 2)
    for _ in range(10):
        await asyncio.sleep(SPARE_IDLE_TIME - 0.5)
        await idle(pool, 2)
    assert len(network.dialled_at) == 2


@with_pool()
async def test_a_pool_resized_to_zero_empties_after_max_idle_time(pool: Pool[Wire]) -> None:
    """P11, P6: the voice left behind holds a session that long, and no longer."""
    pool.resize(1)
    await idle(pool, 1)
    pool.resize(0)
    assert pool.idle == 1
    await asyncio.sleep(61.0)
    assert pool.is_empty
