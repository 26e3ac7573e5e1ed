"""Callers that vanish, run out of time, or whose dial fails."""

from __future__ import annotations

import asyncio

import pytest

from tests.clock import block, in_virtual_time
from tests.unit.pool_kit import (
    HANDSHAKE,
    Network,
    RefusedError,
    Wire,
    about,
    close_all,
    leased,
    make_pool,
    now,
    with_pool,
)
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import (
    DIAL_SOFT_TIMEOUT,
    OVERLAP,
    AcquireTimeoutError,
    DialFailedError,
    Pool,
)


@with_pool()
async def test_an_abandoned_dial_becomes_an_idle_connection(
    network: Network, pool: Pool[Wire]
) -> None:
    """P3: a caller that gives up does not stop its dial."""
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    caller.cancel()
    await asyncio.sleep(HANDSHAKE)
    acquired = await pool.acquire(10.0)
    assert acquired.reused
    assert len(network.dialled_at) == 1


@with_pool()
async def test_the_next_caller_takes_over_an_abandoned_dial(
    network: Network, pool: Pool[Wire]
) -> None:
    """P3: the turn after an interruption waits only for the rest of the handshake."""
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.3)
    caller.cancel()
    acquired = await pool.acquire(10.0)
    assert acquired.waited == about(HANDSHAKE - 0.3)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_a_caller_begins_anew_before_it_gives_up(network: Network, pool: Pool[Wire]) -> None:
    """P3: as livekit-agents 1.5 does. The abandoned dial serves it, and no other is made."""
    caller = object()
    given_up = asyncio.create_task(pool.acquire(10.0, caller=caller))
    await asyncio.sleep(0.3)
    anew = asyncio.create_task(pool.acquire(10.0, caller=caller))
    await asyncio.sleep(0.0)
    given_up.cancel()
    assert (await anew).waited == about(HANDSHAKE - 0.3)
    await asyncio.sleep(HANDSHAKE)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_a_caller_that_needs_two_connections(network: Network, pool: Pool[Wire]) -> None:
    """P3: it gets both as soon as two callers would, but for the hundredth part of a second."""
    caller = object()
    both = await asyncio.gather(*(pool.acquire(10.0, caller=caller) for _ in range(2)))
    assert [each.waited for each in both] == [about(HANDSHAKE), about(HANDSHAKE + OVERLAP)]
    assert len(network.dialled_at) == 2


@with_pool()
async def test_a_caller_that_asks_anew_of_a_pool_that_then_ends(pool: Pool[Wire]) -> None:
    """P8: it waits like any other, so it gets a connection."""
    caller = object()
    asked = [asyncio.create_task(pool.acquire(10.0, caller=caller)) for _ in range(2)]
    await asyncio.sleep(OVERLAP / 2)
    pool.close()
    assert [each.reused for each in await asyncio.gather(*asked)] == [False, False]


@with_pool()
async def test_a_caller_that_asks_anew_and_is_expected_then(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: for the reply after that, so what it has by then may serve it."""
    caller = object()
    asked = [asyncio.create_task(pool.acquire(10.0, caller=caller)) for _ in range(2)]
    await asyncio.sleep(OVERLAP / 2)
    pool.expect(caller, now() + 60.0)
    asked[0].cancel()
    await asyncio.sleep(1.0)
    pool.give_back((await asked[1]).connection, Outcome.FAILED)
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@with_pool()
async def test_a_waiter_cancelled_at_the_hand_off_passes_the_connection_on(
    pool: Pool[Wire],
) -> None:
    """The next waiter gets the connection; without this it would stay leased to nobody."""
    wire = await leased(pool)
    vanishing = asyncio.create_task(leased(pool))
    next_in_line = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    pool.give_back(wire, Outcome.FINISHED)
    vanishing.cancel()
    assert await next_in_line is wire
    assert vanishing.cancelled()


@with_pool()
async def test_the_timeout_covers_the_whole_wait(network: Network, pool: Pool[Wire]) -> None:
    """P8: a caller waits as long as its timeout, and not longer."""
    network.handshake = 3.0
    began = now()
    with pytest.raises((AcquireTimeoutError, DialFailedError)):
        await pool.acquire(2.0)
    assert now() - began == pytest.approx(2.0)


@with_pool()
async def test_the_timeout_covers_the_wait_for_a_standby(
    network: Network, pool: Pool[Wire]
) -> None:
    """P8: the caller fails at its own timeout, not when the standby's dial ends."""
    network.hang_next = 1
    pool.resize(1)
    await asyncio.sleep(0.1)
    began = now()
    with pytest.raises(AcquireTimeoutError):
        await pool.acquire(0.2)
    assert now() - began == pytest.approx(0.2)


@with_pool()
async def test_four_callers_of_a_dead_endpoint_fail_together(
    network: Network, pool: Pool[Wire]
) -> None:
    """P8: no caller waits for the timeout of another."""
    network.hang_next = 4
    began = now()
    outcomes = await asyncio.gather(*(pool.acquire(2.0) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(o, (AcquireTimeoutError, DialFailedError)) for o in outcomes)
    assert now() - began == pytest.approx(2.0)


@with_pool()
async def test_the_error_of_a_callers_own_dial_reaches_it(
    network: Network, pool: Pool[Wire]
) -> None:
    """P8: the caller gets the exception that its dial failed with, and what it means."""
    network.refuse = [FailureKind.PERMANENT]
    with pytest.raises(DialFailedError) as failure:
        await pool.acquire(10.0)
    assert isinstance(failure.value.error, RefusedError)
    assert failure.value.kind is FailureKind.PERMANENT


@in_virtual_time
async def test_a_caller_that_is_cancelled_just_after_its_dial_failed() -> None:
    """P3: before its task runs again. It is cancelled all the same, and the error is nobody's."""
    network = Network(refuse=[FailureKind.REFUSED])
    pool = make_pool(network)
    network.on_dial_failed = lambda _: caller.cancel()
    caller = asyncio.create_task(leased(pool))
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert caller.cancelled()
    await close_all(network, pool)


@with_pool()
async def test_a_caller_that_relied_on_a_failed_standby_gets_a_dial(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: the standby's failure is not the caller's."""
    network.refuse = [FailureKind.TRANSIENT]
    pool.resize(1)
    await asyncio.sleep(0.1)
    wire = await leased(pool)
    assert wire.number == 1
    assert len(network.dialled_at) == 2


@with_pool()
async def test_a_caller_does_not_rely_on_a_hanging_standby_for_long(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: after DIAL_SOFT_TIMEOUT the pool dials for the caller."""
    network.hang_next = 1
    pool.resize(1)
    await asyncio.sleep(0.1)
    acquired = await pool.acquire(10.0)
    assert acquired.waited == pytest.approx(DIAL_SOFT_TIMEOUT - 0.1 + HANDSHAKE)


@with_pool()
async def test_time_in_which_the_loop_is_blocked_does_not_count_against_a_dial(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: the first AgentSession of a process blocks the loop behind the dial of its prewarm()."""
    network.handshake = 0.1 + 2.0 + HANDSHAKE
    pool.prewarm()
    await asyncio.sleep(0.1)
    block(2.0)
    acquired = await pool.acquire(10.0)
    assert acquired.waited == pytest.approx(HANDSHAKE)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_a_caller_whose_dial_served_another_gets_a_new_one(
    network: Network, pool: Pool[Wire]
) -> None:
    """P2: it does not inherit the failure of the other caller's dial."""
    network.handshake = 0.9
    network.refuse = [FailureKind.TRANSIENT]
    first = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.1)
    network.handshake = 0.2
    second = asyncio.create_task(leased(pool))
    assert (await first).number == 1
    assert (await second).number == 2


@with_pool()
async def test_a_dial_of_a_caller_that_takes_long_asks_for_room(
    network: Network, pool: Pool[Wire]
) -> None:
    """S4: once, after a second: it may wait for a place. A standby asks for none."""
    network.handshake = 3.0
    pool.resize(1)
    await asyncio.sleep(5.0)
    assert network.asked_for_room_at == []
    taken = await leased(pool)
    began = now()
    wire = await leased(pool)
    assert network.asked_for_room_at == [pytest.approx(began + DIAL_SOFT_TIMEOUT)]
    assert now() == pytest.approx(began + 3.0)
    assert taken is not wire
