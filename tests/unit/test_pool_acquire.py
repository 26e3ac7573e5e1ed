"""Which connection a caller gets, and how it gives it back."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from tests.unit.pool_kit import HANDSHAKE, Network, Wire, about, idle, leased, now, with_pool
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import Pool


@with_pool()
async def test_an_idle_connection_is_handed_out_without_waiting(pool: Pool[Wire]) -> None:
    """P1: with an idle connection, acquire() does not even yield to the event loop."""
    [wire] = await idle(pool, 1)
    with pytest.raises(StopIteration) as finished:
        pool.acquire(10.0).send(None)
    acquired = finished.value.value
    assert (acquired.connection, acquired.waited, acquired.reused) == (wire, 0.0, True)
    pool.give_back(wire, Outcome.FINISHED)


@with_pool()
async def test_the_connection_used_last_is_used_next(pool: Pool[Wire]) -> None:
    """P1: so the others can grow old and be trimmed."""
    wires = await idle(pool, 3)
    assert [await leased(pool) for _ in wires] == wires[::-1]


@with_pool()
async def test_a_first_caller_waits_for_a_handshake(pool: Pool[Wire]) -> None:
    """P2: the connection counts as fresh and not as reused; the wait is the handshake."""
    acquired = await pool.acquire(10.0)
    assert acquired.waited == pytest.approx(HANDSHAKE)
    assert (acquired.reused, acquired.fresh) == (False, True)


@with_pool()
async def test_a_connection_waited_for_and_used_before_is_neither_reused_nor_fresh(
    pool: Pool[Wire],
) -> None:
    """Reused means that nobody waited for it, fresh that nobody has used it."""
    wire = await leased(pool)
    waiting = asyncio.create_task(pool.acquire(10.0))
    await asyncio.sleep(0.1)
    pool.give_back(wire, Outcome.FINISHED)
    acquired = await waiting
    assert (acquired.connection, acquired.reused, acquired.fresh) == (wire, False, False)


async def dials_before(pool: Pool[Wire], network: Network) -> list[int]:
    """How many dials have begun when the first, second and third of three callers ask."""
    dials = []

    async def ask() -> None:
        dials.append(len(network.dialled_at))
        await leased(pool)

    await asyncio.gather(ask(), ask(), ask())
    return dials


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought eager tasks")
@with_pool()
async def test_a_dial_does_not_wait_for_other_callers(pool: Pool[Wire], network: Network) -> None:
    """P2: it begins before the loop runs whatever else is ready."""
    assert await dials_before(pool, network) == [0, 1, 2]


@with_pool()
async def test_a_task_factory_of_the_application_starts_the_dials(
    pool: Pool[Wire], network: Network
) -> None:
    """Eager or not is for the application to say."""
    started = []

    def start(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        started.append(coroutine.__name__)
        return task

    asyncio.get_running_loop().set_task_factory(start)
    assert await dials_before(pool, network) == [0, 0, 0]
    asyncio.get_running_loop().set_task_factory(None)
    assert started.count("_run_dial") == 3


@with_pool()
async def test_ten_callers_wait_as_long_as_one_handshake(pool: Pool[Wire]) -> None:
    """P2: dials run side by side."""
    began = now()
    wires = await asyncio.gather(*(leased(pool) for _ in range(10)))
    assert now() - began == about(HANDSHAKE)
    assert len(set(wires)) == 10


@with_pool()
async def test_a_released_connection_goes_to_the_first_waiter(pool: Pool[Wire]) -> None:
    """P2: first come, first served, and a hand-off is faster than a dial."""
    first, second = await asyncio.gather(leased(pool), leased(pool))
    earlier = asyncio.create_task(leased(pool))
    later = asyncio.create_task(leased(pool))
    await asyncio.sleep(HANDSHAKE / 2)
    pool.give_back(first, Outcome.FINISHED)
    assert await earlier is first
    assert not later.done()
    pool.give_back(second, Outcome.FINISHED)
    assert await later is second


@with_pool()
async def test_waiters_are_served_in_order_whichever_dial_ends_first(
    network: Network, pool: Pool[Wire]
) -> None:
    """P2: a quick dial serves the first waiter, and a slow one the caller of the quick dial."""
    network.handshake = 0.9
    slow = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    network.handshake = 0.2
    quick = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.25)
    assert slow.done()
    assert not quick.done()
    await quick
    assert now() - network.dialled_at[0] == pytest.approx(0.9)


@with_pool()
async def test_a_fresh_connection_is_one_that_nobody_has_used(pool: Pool[Wire]) -> None:
    """L3: a replay takes neither an idle connection nor one that is released meanwhile."""
    [used] = await idle(pool, 1)
    wanting = asyncio.create_task(pool.acquire(10.0, fresh=True))
    await asyncio.sleep(0.1)
    pool.give_back(await leased(pool), Outcome.FINISHED)
    assert (await wanting).connection is not used
    assert pool.idle == 1


@with_pool()
async def test_evicting_a_connection_closes_those_as_old_or_older(
    network: Network, pool: Pool[Wire]
) -> None:
    """L3: of the idle ones only; younger connections stay."""
    older = await asyncio.gather(*(leased(pool) for _ in range(3)))
    await asyncio.sleep(1.0)
    younger = await leased(pool)
    for wire in [*older[:2], younger]:
        pool.give_back(wire, Outcome.FINISHED)
    pool.evict(older[2], listen=False, with_others=True)
    assert network.open == [younger]


@with_pool()
async def test_evicting_one_alone_closes_no_other(network: Network, pool: Pool[Wire]) -> None:
    """L3: what failed was the answer, or the server with this one connection."""
    other, failed = await asyncio.gather(leased(pool), leased(pool))
    pool.give_back(other, Outcome.FINISHED)
    pool.evict(failed, listen=False, with_others=False)
    assert network.open == [other]
    assert pool.metrics.counters.totals["closed_lost"] == 1


@pytest.mark.parametrize("listen", [True, False])
@with_pool()
async def test_only_what_was_silent_is_listened_to_before_it_closes(
    pool: Pool[Wire], listen: bool
) -> None:
    """L3: the others were idle, and nobody asked them for a sign of life."""
    other, failed = await asyncio.gather(leased(pool), leased(pool))
    pool.give_back(other, Outcome.FINISHED)
    pool.evict(failed, listen=listen, with_others=True)
    assert (failed.listened, other.listened) == (listen, False)
    assert pool.closing == 2


@with_pool()
async def test_what_is_evicted_is_replaced_for_the_pool_too(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: by one dial, which the caller that lost it takes."""
    pool.resize(1)
    wire = await leased(pool)
    pool.evict(wire, listen=True, with_others=True)
    pool.evict(wire, listen=True, with_others=True)
    assert (await pool.acquire(10.0, fresh=True)).fresh
    await asyncio.sleep(10.0)
    assert len(network.dialled_at) == 2


@with_pool()
async def test_what_is_given_away_is_none_of_the_pools_any_more(
    network: Network, pool: Pool[Wire]
) -> None:
    """L1: the pool neither closes nor counts it, hears nothing of its end, and replaces it."""
    pool.resize(1)
    wire = await leased(pool)
    pool.give_away(wire)
    assert (wire.on_lost, wire.is_open, pool.connections) == (None, True, ())
    assert (pool.leased, pool.connecting) == (0, 1)
    pool.give_away(wire)
    for outcome in Outcome:
        pool.give_back(wire, outcome)
    pool.evict(wire, listen=False, with_others=True)
    await asyncio.sleep(10.0)
    await pool.aclose()
    assert wire.is_open
    assert len(network.dialled_at) == 2
    await wire.close()


@with_pool()
async def test_releasing_a_connection_that_is_not_reusable_discards_it(pool: Pool[Wire]) -> None:
    """A connection that broke while it was leased never becomes idle."""
    wire = await leased(pool)
    wire.is_reusable = False
    pool.give_back(wire, Outcome.FINISHED)
    assert (pool.idle, pool.leased) == (0, 0)


@with_pool()
async def test_only_the_first_release_or_discard_of_a_lease_counts(pool: Pool[Wire]) -> None:
    """Another discard or release of the same lease changes nothing."""
    wire = await leased(pool)
    pool.give_back(wire, Outcome.FAILED)
    pool.give_back(wire, Outcome.FAILED)
    pool.give_back(wire, Outcome.FINISHED)
    assert (pool.idle, pool.leased) == (0, 0)


@with_pool()
async def test_a_fault_as_a_caller_begins_to_wait_leaves_no_waiter(pool: Pool[Wire]) -> None:
    """A4: nobody would ever retrieve what the end of the pool tells such a waiter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_dial_for_waiters", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await pool.acquire(10.0)
    assert "waiting=0" in repr(pool)
