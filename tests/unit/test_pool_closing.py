"""The end of a pool: what it closes, what it finishes, and who gets an error."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pool_kit import HANDSHAKE, Network, Wire, idle, leased, now, with_pool
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.pool import Pool, PoolClosedError, Reason


@with_pool()
async def test_closing_is_never_awaited_by_discard(pool: Pool[Wire]) -> None:
    """P7: discard() is synchronous, and the close happens afterwards."""
    wire = await leased(pool)
    pool.discard(wire, Reason.INTERRUPTED)
    assert wire.closed_at == now()


@with_pool()
async def test_a_closed_pool_hands_out_nothing(pool: Pool[Wire]) -> None:
    """After its end acquire() says so instead of waiting for ever."""
    await pool.aclose()
    with pytest.raises(PoolClosedError):
        await pool.acquire(10.0)


@with_pool()
async def test_closing_lets_waiters_have_their_dials_and_takes_nothing_back(
    network: Network, pool: Pool[Wire]
) -> None:
    """No turn falls silent because its pool ends; what comes back afterwards is closed."""
    pool.resize(1)
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.close()
    wire = await caller
    assert wire.is_open
    pool.release(wire)
    assert not wire.is_open
    await asyncio.sleep(100.0)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_aclose_during_a_dial_that_hangs(network: Network, pool: Pool[Wire]) -> None:
    """aclose() waits close_timeout for it, then nobody waits any more."""
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
async def test_aclose_waits_no_longer_than_for_one_of_them(
    network: Network, pool: Pool[Wire]
) -> None:
    """What the dial has used up of close_timeout, the closing of others does not get."""
    wire = await leased(pool)
    closing = asyncio.ensure_future(asyncio.sleep(100.0))
    wire.close = lambda: closing  # type: ignore[method-assign,assignment,return-value]
    network.hang_next = 1
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.discard(wire, Reason.INTERRUPTED)
    wire.is_open = False
    began = now()
    await pool.aclose()
    assert now() - began == pytest.approx(5.0)
    assert closing.cancelled()
    with pytest.raises(PoolClosedError):
        await caller


@with_pool()
async def test_aclose_during_a_standbys_dial_closes_what_it_brings(
    network: Network, pool: Pool[Wire]
) -> None:
    """A handshake under way is brought to its end, so that the server gets a Close frame."""
    pool.resize(1)
    await asyncio.sleep(0.1)
    await pool.aclose()
    assert len(network.wires) == 1
    assert not network.wires[0].is_open


@with_pool()
async def test_a_session_that_is_gone_ends_the_pool_quietly(
    network: Network, pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: no redial and no warning when what the pool dials with was closed."""
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
async def test_a_standby_that_fails_since_the_session_is_gone_is_no_failure(
    network: Network, pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """P9: nobody is warned of what was to be expected."""
    network.refuse = [FailureKind.TRANSIENT]
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE / 2)
    network.is_gone = True
    await asyncio.sleep(HANDSHAKE)
    assert pool.metrics.counters.totals["standby_failures"] == 0
    await pool.aclose()
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []
