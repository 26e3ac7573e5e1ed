"""Standbys: connections that the pool dials in the background, and when it pauses."""

from __future__ import annotations

import asyncio

import pytest

from tests.clock import in_virtual_time
from tests.kit import event_of
from tests.unit.pool_kit import (
    HANDSHAKE,
    Network,
    Wire,
    about,
    idle,
    leased,
    make_pool,
    now,
    with_pool,
)
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import FailureKind, RateLimit
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import DialFailedError, Pool


@with_pool()
async def test_a_standby_is_dialled_at_once_after_a_discard(pool: Pool[Wire]) -> None:
    """P4: half a second after an interruption the next turn finds a connection."""
    pool.resize(1)
    wire = await leased(pool)
    pool.give_back(wire, Outcome.INTERRUPTED)
    assert pool.connecting == 1
    await asyncio.sleep(HANDSHAKE + 0.01)
    assert (await pool.acquire(10.0)).reused


@with_pool()
async def test_a_standby_is_dialled_at_once_after_a_loss(pool: Pool[Wire]) -> None:
    """C3, P4: an idle connection leaves the pool at the moment its peer ends it."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    wire.break_off()
    assert (pool.idle, pool.connecting) == (0, 1)


@with_pool()
async def test_leased_connections_count_towards_min_size(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: a conversation never holds more sessions than it uses."""
    pool.resize(1)
    await leased(pool)
    await asyncio.sleep(3600.0)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_with_a_min_size_of_zero_nothing_is_dialled_in_the_background(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: a pool that no TTS uses at present dials no standby."""
    wire = await leased(pool)
    pool.give_back(wire, Outcome.INTERRUPTED)
    await asyncio.sleep(3600.0)
    assert len(network.dialled_at) == 1


@with_pool(PoolOptions(min_size=0))
async def test_prewarm_dials_one_connection_though_min_size_is_zero(
    network: Network, pool: Pool[Wire]
) -> None:
    """However often it is called: one connection is enough."""
    pool.prewarm()
    pool.prewarm()
    await asyncio.sleep(1.0)
    pool.prewarm()
    assert (pool.idle, len(network.dialled_at)) == (1, 1)


@with_pool()
async def test_failed_standbys_back_off(network: Network, pool: Pool[Wire]) -> None:
    """P4: 0.5 s, doubling to 30 s, each shortened by up to a fifth."""
    network.handshake = 0.0
    network.refuse = [FailureKind.TRANSIENT] * 12
    pool.resize(1)
    await asyncio.sleep(300.0)
    gaps = [b - a for a, b in zip(network.dialled_at, network.dialled_at[1:], strict=False)]
    expected = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30]
    assert len(gaps) == len(expected)
    assert all(0.8 * e <= gap <= e + 1e-6 for gap, e in zip(gaps, expected, strict=True))
    assert pool.idle == 1


@with_pool()
async def test_backoff_never_delays_a_caller(network: Network, pool: Pool[Wire]) -> None:
    """P4: in the middle of a backoff, acquire() dials immediately."""
    network.refuse = [FailureKind.TRANSIENT] * 6
    pool.resize(1)
    while network.refuse:
        await asyncio.sleep(1.0)
    assert (await pool.acquire(10.0)).waited == pytest.approx(HANDSHAKE)


@pytest.mark.parametrize("calls_first", [True, False])
@with_pool()
async def test_after_a_permanent_failure_only_a_callers_success_resumes_standbys(
    network: Network, pool: Pool[Wire], calls_first: bool
) -> None:
    """P4, A6: a wrong key costs one dial, not one every thirty seconds."""
    network.refuse = [FailureKind.PERMANENT]
    if calls_first:
        with pytest.raises(DialFailedError):
            await pool.acquire(10.0)
    pool.resize(1)
    await asyncio.sleep(3600.0)
    assert len(network.dialled_at) == 1
    pool.give_back(await leased(pool), Outcome.INTERRUPTED)
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@with_pool()
async def test_using_a_standby_from_before_a_permanent_failure_does_not_resume_dials(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: only a dial made after the failure shows that dials succeed again."""
    pool.resize(1)
    await asyncio.sleep(1.0)
    network.refuse = [FailureKind.PERMANENT]
    with pytest.raises(DialFailedError):
        await pool.acquire(10.0, fresh=True)
    assert pool.idle == 1
    pool.give_back(await leased(pool), Outcome.INTERRUPTED)
    await asyncio.sleep(60.0)
    assert len(network.dialled_at) == 2


@pytest.mark.parametrize(
    ("failure_kind", "dials"), [(FailureKind.PERMANENT, 3), (FailureKind.TRANSIENT, 7)]
)
@with_pool()
async def test_using_an_old_connection_does_not_end_the_backoff(
    network: Network, pool: Pool[Wire], failure_kind: FailureKind, dials: int
) -> None:
    """P4: a turn on another connection does not make the pool dial a failed standby again."""
    pool.resize(2)
    await asyncio.sleep(1.0)
    network.refuse = [failure_kind] * 100
    network.open[0].break_off()
    for _ in range(10):
        wire = await leased(pool)
        await asyncio.sleep(1.0)
        pool.give_back(wire, Outcome.FINISHED)
    assert len(network.dialled_at) == dials


@in_virtual_time
async def test_a_429_pauses_the_standbys_of_every_pool_of_the_api_key() -> None:
    """P4: the pools of other voices must not add to too many sessions."""
    rate_limit = RateLimit()
    full, other, foreign = Network(), Network(), Network()
    pools = [make_pool(full, rate_limit=rate_limit), make_pool(other, rate_limit=rate_limit)]
    pools.append(make_pool(foreign))
    full.refuse = [FailureKind.REFUSED]
    full.handshake = 0.01
    pools[0].resize(1)
    await asyncio.sleep(0.1)
    pools[1].resize(1)
    pools[2].resize(1)
    await asyncio.sleep(0.2)
    assert len(other.dialled_at) == 0
    assert len(foreign.dialled_at) == 1
    await asyncio.sleep(1.0)
    assert (pools[0].idle, pools[1].idle) == (1, 1)
    for pool in pools:
        await pool.aclose()


@with_pool()
async def test_a_server_that_ends_fresh_connections_is_dialled_with_backoff(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: without backoff the pool would dial such a server without a pause."""
    pool.resize(1)
    for _ in range(200):
        await asyncio.sleep(0.5)
        for wire in network.open:
            wire.break_off()
    assert len(network.dialled_at) <= 10


@with_pool()
async def test_what_a_server_ends_after_seconds_is_replaced_at_once(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: the backoff is the time from dial to dial, so a first turn that comes late finds one."""
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE + 6.0)
    network.open[0].break_off()
    await asyncio.sleep(1.1 * HANDSHAKE)
    assert pool.idle == 1


class DeadOnArrival(Network):
    """Each connection ends during its dial, before `on_lost` is set."""

    async def connect(self, pool: Pool[Wire], timeout: float) -> Wire | DialFailedError:
        wire = await super().connect(pool, timeout)
        assert isinstance(wire, Wire)
        wire.is_reusable = False
        return wire


@in_virtual_time
async def test_a_standby_that_is_dead_when_its_dial_returns_is_lost() -> None:
    """P4: with an eager task factory the reader sees the end before the pool has the connection."""
    network = DeadOnArrival()
    pool = make_pool(network)
    pool.resize(1)
    await asyncio.sleep(2 * HANDSHAKE)
    totals = pool.metrics.counters.totals
    assert (pool.idle, totals["closed_lost"], len(network.dialled_at)) == (0, 1, 1)
    await asyncio.sleep(60.0)
    assert 2 <= len(network.dialled_at) <= 10, "backoff"
    pool.close()
    await pool.aclose()
    assert network.open == []


@in_virtual_time
async def test_a_caller_gets_its_connection_though_it_died_during_the_dial() -> None:
    """P8: as without the pool; more dials would not help the caller."""
    network = DeadOnArrival()
    pool = make_pool(network)
    wire = await leased(pool)
    assert not wire.is_open
    assert (pool.leased, len(network.dialled_at)) == (0, 1)
    pool.give_back(wire, Outcome.FAILED)
    await pool.aclose()


@with_pool()
async def test_using_a_new_standby_ends_the_backoff(network: Network, pool: Pool[Wire]) -> None:
    """P4: it was of use. A successful handshake alone would not end the backoff."""
    network.handshake = 0.0
    network.refuse = [FailureKind.TRANSIENT] * 5
    pool.resize(1)
    await asyncio.sleep(60.0)
    assert pool.idle == 1
    network.refuse = [FailureKind.TRANSIENT]
    lent = await leased(pool)
    lost_at = now()
    pool.give_back(lent, Outcome.INTERRUPTED)
    await asyncio.sleep(60.0)
    dialled_again = [at - lost_at for at in network.dialled_at if at >= lost_at]
    assert dialled_again == [about(0.0), pytest.approx(0.45, abs=0.06)]


@pytest.mark.parametrize("is_kept", [False, True])
@with_pool()
async def test_a_hanging_standby_is_given_up_after_standby_timeout(
    network: Network, pool: Pool[Wire], is_kept: bool
) -> None:
    """After ten seconds, whether prewarm() or min_size asked for it."""
    network.hang_next = 1
    pool.resize(1) if is_kept else pool.prewarm()
    await asyncio.sleep(9.9)
    assert pool.connecting == 1
    await asyncio.sleep(0.2)
    assert (pool.connecting, len(network.dialled_at)) == (0, 1)


@pytest.mark.parametrize("is_leased", [False, True])
@with_pool()
async def test_a_connection_that_the_peer_ends_counts_as_lost_or_failed(
    pool: Pool[Wire], is_leased: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost while it was idle, which costs no turn; failed during an utterance."""
    caplog.set_level("INFO")
    [wire] = await idle(pool, 1)
    if is_leased:
        await leased(pool)
    wire.break_off()
    totals = pool.metrics.counters.totals
    assert (totals["closed_lost"], totals["closed_failed"]) == (not is_leased, is_leased)
    [closed] = [r for r in caplog.records if event_of(r) == "closed"]
    assert vars(closed)["xai_pool_reason"] == ("failed" if is_leased else "lost")
