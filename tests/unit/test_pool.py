"""The policy of the pool, with plain objects and in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pool_kit import (
    HANDSHAKE,
    Network,
    RefusedError,
    Wire,
    idle,
    leased,
    make_pool,
    now,
    play,
)
from tests.virtual import block, run
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import FailureKind, RateLimit
from xai_pool_patch.pool.pool import (
    DIAL_SOFT_TIMEOUT,
    SPARE_IDLE_TIME,
    AcquireTimeoutError,
    DialFailedError,
    Pool,
    PoolClosedError,
    Reason,
)

# Acquire and release


def test_an_idle_connection_is_handed_out_without_waiting() -> None:
    """P1: with an idle connection, acquire() does not even yield to the event loop."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [wire] = await idle(pool, 1)
        with pytest.raises(StopIteration) as finished:
            pool.acquire(10.0).send(None)
        acquired = finished.value.value
        assert (acquired.connection, acquired.waited, acquired.reused) == (wire, 0.0, True)
        pool.release(wire)

    play(scenario)


def test_last_in_first_out() -> None:
    """P1: the connection used last is used next, so that the others can grow old and go."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wires = await idle(pool, 3)
        assert [await leased(pool) for _ in wires] == wires[::-1]

    play(scenario)


def test_a_cold_caller_waits_for_its_dial_and_is_told_so() -> None:
    """P2: the first connection is not reused, and the wait is the handshake."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        acquired = await pool.acquire(10.0)
        assert acquired.waited == pytest.approx(HANDSHAKE)
        assert (acquired.reused, acquired.fresh) == (False, True)

    play(scenario)


def test_one_given_back_meanwhile_is_neither_reused_nor_fresh() -> None:
    """It was waited for, and somebody has used it."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        waiting = asyncio.create_task(pool.acquire(10.0))
        await asyncio.sleep(0.1)
        pool.release(wire)
        acquired = await waiting
        assert (acquired.connection, acquired.reused, acquired.fresh) == (wire, False, False)

    play(scenario)


def test_ten_cold_callers_wait_for_one_handshake() -> None:
    """P2: dials run side by side."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        began = now()
        wires = await asyncio.gather(*(leased(pool) for _ in range(10)))
        assert now() - began == pytest.approx(HANDSHAKE)
        assert len(set(wires)) == 10

    play(scenario)


def test_a_connection_given_back_serves_whoever_asked_first() -> None:
    """P2: hand-off is faster than a dial, and first come is first served."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        first, second = await asyncio.gather(leased(pool), leased(pool))
        earlier = asyncio.create_task(leased(pool))
        later = asyncio.create_task(leased(pool))
        await asyncio.sleep(HANDSHAKE / 2)
        pool.release(first)
        assert await earlier is first
        assert not later.done()
        pool.release(second)
        assert await later is second

    play(scenario)


def test_a_dial_serves_the_first_in_line_and_its_caller_the_next() -> None:
    """P2: callers are served in the order of asking, whosever dial comes first."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
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

    play(scenario)


def test_a_fresh_connection_is_one_that_nobody_has_used() -> None:
    """L3: a replacement is neither taken from the idle ones nor from those given back."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [used] = await idle(pool, 1)
        wanting = asyncio.create_task(pool.acquire(10.0, fresh=True))
        await asyncio.sleep(0.1)
        pool.release(await leased(pool))
        assert (await wanting).connection is not used
        assert pool.idle == 1

    play(scenario)


def test_condemning_one_takes_its_elders_along() -> None:
    """L3: the idle connections of the same age or older go, the younger ones stay."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        elders = await asyncio.gather(*(leased(pool) for _ in range(3)))
        await asyncio.sleep(1.0)
        younger = await leased(pool)
        for wire in [*elders[:2], younger]:
            pool.release(wire)
        pool.evict(elders[2])
        assert network.open == [younger]

    play(scenario)


def test_release_of_a_connection_that_is_not_reusable_discards_it() -> None:
    """A connection that broke while it was leased never becomes idle."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        wire.is_reusable = False
        pool.release(wire)
        assert (pool.idle, pool.leased) == (0, 0)

    play(scenario)


def test_a_connection_is_given_back_once() -> None:
    """A second release or a discard after a release of the same loan changes nothing."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        pool.discard(wire, Reason.FAILED)
        pool.discard(wire, Reason.FAILED)
        pool.release(wire)
        assert (pool.idle, pool.leased) == (0, 0)

    play(scenario)


# Callers that vanish, fail or run out of time


def test_an_abandoned_dial_is_there_for_the_next_turn() -> None:
    """P3: a caller that gives up does not stop its dial."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        caller = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.1)
        caller.cancel()
        await asyncio.sleep(HANDSHAKE)
        acquired = await pool.acquire(10.0)
        assert acquired.reused
        assert len(network.dialled_at) == 1

    play(scenario)


def test_the_next_caller_takes_over_an_abandoned_dial() -> None:
    """P3: the turn after an interruption waits for what is left of the handshake only."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        caller = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.3)
        caller.cancel()
        acquired = await pool.acquire(10.0)
        assert acquired.waited == pytest.approx(HANDSHAKE - 0.3)
        assert len(network.dialled_at) == 1

    play(scenario)


def test_cancelled_in_the_moment_of_the_hand_off() -> None:
    """A caller that vanishes with a connection in its hand passes it to the next in line."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        vanishing = asyncio.create_task(leased(pool))
        next_in_line = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.1)
        pool.release(wire)
        vanishing.cancel()
        assert await next_in_line is wire
        assert vanishing.cancelled()

    play(scenario)


def test_the_timeout_covers_the_whole_wait() -> None:
    """P8: a caller waits as long as it said, not longer, and its dial goes on."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.handshake = 3.0
        began = now()
        with pytest.raises((AcquireTimeoutError, DialFailedError)):
            await pool.acquire(2.0)
        assert now() - began == pytest.approx(2.0)

    play(scenario)


def test_the_timeout_covers_the_wait_for_somebody_elses_dial() -> None:
    """P8: also while the caller relies on a standby."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.hang_next = 1
        pool.resize(1)
        await asyncio.sleep(0.1)
        began = now()
        with pytest.raises(AcquireTimeoutError):
            await pool.acquire(0.2)
        assert now() - began == pytest.approx(0.2)

    play(scenario)


def test_four_callers_of_a_dead_endpoint_fail_together() -> None:
    """P8: nobody waits for the time-out of somebody else."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.hang_next = 4
        began = now()
        outcomes = await asyncio.gather(
            *(pool.acquire(2.0) for _ in range(4)), return_exceptions=True
        )
        assert all(isinstance(o, (AcquireTimeoutError, DialFailedError)) for o in outcomes)
        assert now() - began == pytest.approx(2.0)

    play(scenario)


def test_the_error_of_a_callers_own_dial_reaches_it() -> None:
    """P8: what the dial failed with is what the caller gets."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.refuse = [FailureKind.PERMANENT]
        with pytest.raises(DialFailedError) as failure:
            await pool.acquire(10.0)
        assert isinstance(failure.value.error, RefusedError)

    play(scenario)


def test_a_failed_standby_is_not_the_callers_failure() -> None:
    """P4: a caller who relied on a standby's dial gets one of its own when that fails."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.refuse = [FailureKind.TRANSIENT]
        pool.resize(1)
        await asyncio.sleep(0.1)
        wire = await leased(pool)
        assert wire.number == 1
        assert len(network.dialled_at) == 2

    play(scenario)


def test_a_hanging_standby_holds_a_caller_up_for_a_moment_only() -> None:
    """P4: a dial that takes longer than a handshake should is no longer relied on."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.hang_next = 1
        pool.resize(1)
        await asyncio.sleep(0.1)
        acquired = await pool.acquire(10.0)
        assert acquired.waited == pytest.approx(DIAL_SOFT_TIMEOUT - 0.1 + HANDSHAKE)

    play(scenario)


def test_a_dial_that_could_not_get_on_is_relied_on() -> None:
    """P4: the first AgentSession of a process blocks the loop behind the dial of its prewarm()."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.handshake = 0.1 + 2.0 + HANDSHAKE
        pool.prewarm()
        await asyncio.sleep(0.1)
        block(2.0)
        acquired = await pool.acquire(10.0)
        assert acquired.waited == pytest.approx(HANDSHAKE)
        assert len(network.dialled_at) == 1

    play(scenario)


def test_whoever_lost_its_dial_to_another_gets_a_new_one() -> None:
    """P2: a caller whose dial served somebody else does not inherit that one's failure."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.handshake = 0.9
        network.refuse = [FailureKind.TRANSIENT]
        first = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.1)
        network.handshake = 0.2
        second = asyncio.create_task(leased(pool))
        assert (await first).number == 1
        assert (await second).number == 2

    play(scenario)


# Standby


def test_a_replacement_is_dialled_at_once_after_a_discard() -> None:
    """P4: half a second after an interruption the next turn finds a connection."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        wire = await leased(pool)
        pool.discard(wire, Reason.INTERRUPTED)
        assert pool.connecting == 1
        await asyncio.sleep(HANDSHAKE + 0.01)
        assert (await pool.acquire(10.0)).reused

    play(scenario)


def test_a_replacement_is_dialled_at_once_after_a_loss() -> None:
    """C3, P4: a peer that ends an idle connection takes it out of the pool at that moment."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        [wire] = await idle(pool, 1)
        wire.break_off()
        assert (pool.idle, pool.connecting) == (0, 1)

    play(scenario)


def test_leased_connections_count_as_kept() -> None:
    """P4: a conversation never holds more sessions than it uses."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await leased(pool)
        await asyncio.sleep(3600.0)
        assert len(network.dialled_at) == 1

    play(scenario)


def test_nothing_is_dialled_in_the_background_when_nothing_is_kept() -> None:
    """P4: a pool that no TTS uses at present is left alone."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        pool.discard(wire, Reason.INTERRUPTED)
        await asyncio.sleep(3600.0)
        assert len(network.dialled_at) == 1

    play(scenario)


def test_prewarm_dials_one_where_none_is_kept() -> None:
    """prewarm() is a wish of its own, and one connection is enough for it."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.prewarm()
        pool.prewarm()
        await asyncio.sleep(1.0)
        pool.prewarm()
        assert (pool.idle, len(network.dialled_at)) == (1, 1)

    play(scenario, PoolOptions(min_size=0))


def test_background_failures_back_off() -> None:
    """P4: 0.5 s, doubling to 30 s, each shortened by up to a fifth."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.handshake = 0.0
        network.refuse = [FailureKind.TRANSIENT] * 12
        pool.resize(1)
        await asyncio.sleep(300.0)
        gaps = [b - a for a, b in zip(network.dialled_at, network.dialled_at[1:], strict=False)]
        expected = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30]
        assert len(gaps) == len(expected)
        assert all(0.8 * e <= gap <= e + 1e-6 for gap, e in zip(gaps, expected, strict=True))
        assert pool.idle == 1

    play(scenario)


def test_backoff_never_delays_a_caller() -> None:
    """P4: in the middle of a backoff, acquire() dials immediately."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.refuse = [FailureKind.TRANSIENT] * 6
        pool.resize(1)
        while network.refuse:
            await asyncio.sleep(1.0)
        assert (await pool.acquire(10.0)).waited == pytest.approx(HANDSHAKE)

    play(scenario)


@pytest.mark.parametrize("calls_first", [True, False])
def test_a_refusal_stops_the_background_until_a_callers_dial_succeeds(calls_first: bool) -> None:
    """P4, A6: a bad key costs one dial, not one every thirty seconds."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.refuse = [FailureKind.PERMANENT]
        if calls_first:
            with pytest.raises(DialFailedError):
                await pool.acquire(10.0)
        pool.resize(1)
        await asyncio.sleep(3600.0)
        assert len(network.dialled_at) == 1
        pool.discard(await leased(pool), Reason.INTERRUPTED)
        await asyncio.sleep(1.0)
        assert pool.idle == 1

    play(scenario)


def test_a_standby_from_before_a_refusal_does_not_end_it() -> None:
    """P4: only a dial that was made since then tells anything new."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await asyncio.sleep(1.0)
        network.refuse = [FailureKind.PERMANENT]
        with pytest.raises(DialFailedError):
            await pool.acquire(10.0, fresh=True)
        assert pool.idle == 1
        pool.discard(await leased(pool), Reason.INTERRUPTED)
        await asyncio.sleep(60.0)
        assert len(network.dialled_at) == 2

    play(scenario)


@pytest.mark.parametrize(
    ("failure_kind", "dials"), [(FailureKind.PERMANENT, 3), (FailureKind.TRANSIENT, 7)]
)
def test_lending_an_old_connection_proves_nothing(failure_kind: FailureKind, dials: int) -> None:
    """P4: a failed standby is not dialled again with every turn on another connection."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(2)
        await asyncio.sleep(1.0)
        network.refuse = [failure_kind] * 100
        network.open[0].break_off()
        for _ in range(10):
            wire = await leased(pool)
            await asyncio.sleep(1.0)
            pool.release(wire)
        assert len(network.dialled_at) == dials

    play(scenario)


def test_too_many_sessions_pause_every_pool_of_the_api_key() -> None:
    """P4: a 429 for one voice keeps the others of the same API key from adding to it."""

    async def whole() -> None:
        rate_limit = RateLimit()
        full, other, foreign = Network(), Network(), Network()
        pools = [make_pool(full, rate_limit=rate_limit), make_pool(other, rate_limit=rate_limit)]
        pools.append(make_pool(foreign))
        full.refuse = [FailureKind.RATE_LIMITED]
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

    run(whole())


def test_a_server_that_ends_fresh_connections_is_dialled_with_backoff() -> None:
    """P4: accept and drop is a failure too, else the pool would dial without a pause."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        for _ in range(200):
            await asyncio.sleep(0.5)
            for wire in network.open:
                wire.break_off()
        assert len(network.dialled_at) <= 10

    play(scenario)


class DeadOnArrival(Network):
    """What it dials has ended by the time the pool gets it, and nobody can be told of that."""

    async def connect(self, timeout: float) -> Wire:
        wire = await super().connect(timeout)
        wire.is_reusable = False
        return wire


def test_a_standby_that_died_behind_its_handshake_is_lost() -> None:
    """P4: an eager task factory has the reader see the end before the pool has the connection."""

    async def scenario() -> None:
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

    run(scenario())


def test_a_caller_gets_a_connection_that_died_behind_its_handshake() -> None:
    """P8: as it would without the pool; to dial again and again would not help it."""

    async def scenario() -> None:
        network = DeadOnArrival()
        pool = make_pool(network)
        wire = await leased(pool)
        assert not wire.is_open
        assert (pool.leased, len(network.dialled_at)) == (0, 1)
        pool.discard(wire, Reason.FAILED)
        await pool.aclose()

    run(scenario())


def test_a_standby_that_served_ends_the_backoff() -> None:
    """P4: it was of use, so the trouble is over; having been made would prove nothing."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.handshake = 0.0
        network.refuse = [FailureKind.TRANSIENT] * 5
        pool.resize(1)
        await asyncio.sleep(60.0)
        assert pool.idle == 1
        network.refuse = [FailureKind.TRANSIENT]
        lent = await leased(pool)
        lost_at = now()
        pool.discard(lent, Reason.INTERRUPTED)
        await asyncio.sleep(60.0)
        dialled_again = [at - lost_at for at in network.dialled_at if at >= lost_at]
        assert dialled_again == [0.0, pytest.approx(0.45, abs=0.06)]

    play(scenario)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_standby_has_the_time_of_a_standby(is_kept: bool) -> None:
    """One that hangs is given up after ten seconds, prewarmed or kept."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.hang_next = 1
        pool.resize(1) if is_kept else pool.prewarm()
        await asyncio.sleep(9.9)
        assert pool.connecting == 1
        await asyncio.sleep(0.2)
        assert (pool.connecting, len(network.dialled_at)) == (0, 1)

    play(scenario)


@pytest.mark.parametrize("is_leased", [False, True])
def test_what_the_peer_ends_is_told_by_its_use(
    is_leased: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost while idle is stale, and costs no turn; during an utterance it is an error."""
    caplog.set_level("INFO")

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [wire] = await idle(pool, 1)
        if is_leased:
            await leased(pool)
        wire.break_off()
        totals = pool.metrics.counters.totals
        assert (totals["closed_lost"], totals["closed_failed"]) == (not is_leased, is_leased)

    play(scenario)
    [closed] = [r for r in caplog.records if r.getMessage() == "closed"]
    assert vars(closed)["xai_pool_reason"] == ("failed" if is_leased else "lost")


# Growing old


def test_no_connection_is_handed_out_beyond_max_age() -> None:
    """P5: at checkout age is judged again, whatever the timers did."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [wire] = await idle(pool, 1)
        loop = asyncio.get_running_loop()
        loop._virtual.now += 1800.0  # type: ignore[attr-defined]
        acquired = await pool.acquire(10.0)
        assert acquired.connection is not wire
        assert not acquired.reused
        assert pool.metrics.counters.totals["closed_expired"] == 1

    play(scenario)


def test_one_that_died_unnoticed_is_not_handed_out() -> None:
    """C1: what it says of itself is asked at checkout, too."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [wire] = await idle(pool, 1)
        wire.is_reusable = False
        assert await leased(pool) is not wire
        assert pool.metrics.counters.totals["closed_lost"] == 1

    play(scenario)


def test_an_old_idle_connection_is_replaced_first_and_closed_then() -> None:
    """P5: at every moment of many hours there is a connection young enough to be handed out."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await asyncio.sleep(1.0)
        for _ in range(6 * 3600):
            await asyncio.sleep(1.0)
            assert pool.idle >= 1
            assert len(network.open) <= 2
            assert all(now() - wire.made_at <= 1800.0 for wire in network.open)
        lifetimes = [w.closed_at - w.made_at for w in network.wires if w.closed_at is not None]
        assert len(lifetimes) >= 12
        assert min(lifetimes) >= 1800.0 * 0.85
        assert len({round(lifetime) for lifetime in lifetimes}) > 3, "no jitter"

    play(scenario)


def test_an_old_connection_serves_until_its_replacement_is_there() -> None:
    """P5: while the replacement cannot be dialled the old one is handed out up to its end."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        [wire] = await idle(pool, 1)
        network.refuse = [FailureKind.TRANSIENT] * 1000
        while len(network.dialled_at) < 2:
            await asyncio.sleep(1.0)
        assert await leased(pool) is wire
        pool.release(wire)
        await asyncio.sleep(200.0)
        assert not wire.is_open

    play(scenario)


def test_a_connection_that_grew_old_during_its_loan_is_not_kept() -> None:
    """P5: what comes back beyond max_age is closed and replaced."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        wire = await leased(pool)
        await asyncio.sleep(1900.0)
        assert wire.is_open
        pool.release(wire)
        assert not wire.is_open
        assert pool.connecting == 1

    play(scenario)


def test_an_old_connection_given_back_is_not_handed_on() -> None:
    """P5: whoever waits gets a young one, even if it takes longer."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        await asyncio.sleep(1900.0)
        waiting = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.1)
        pool.release(wire)
        assert await waiting is not wire

    play(scenario)


def test_what_a_burst_left_behind_is_trimmed() -> None:
    """S5: what nobody is going to need closes after seconds, not before."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await idle(pool, 5)
        await asyncio.sleep(SPARE_IDLE_TIME - 0.5)
        assert pool.idle == 5
        await asyncio.sleep(1.0)
        assert pool.idle == 1

    play(scenario)


def test_a_dial_makes_the_longest_idle_one_dispensable() -> None:
    """P6: what it brings is kept in its place."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        [wire] = await idle(pool, 1)
        await asyncio.sleep(61.0)
        assert wire.is_open
        wanting = asyncio.create_task(pool.acquire(10.0, fresh=True))
        await asyncio.sleep(0.1)
        assert not wire.is_open
        pool.release((await wanting).connection)

    play(scenario)


def test_the_idle_time_begins_with_the_last_use() -> None:
    """P6: a spare connection in steady use stays."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await idle(pool, 2)
        for _ in range(10):
            await asyncio.sleep(SPARE_IDLE_TIME - 0.5)
            await idle(pool, 2)
        assert len(network.dialled_at) == 2

    play(scenario)


def test_a_pool_that_is_no_longer_kept_empties() -> None:
    """P11, P6: the voice left behind costs a session for max_idle_time, and no longer."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await idle(pool, 1)
        pool.resize(0)
        assert pool.idle == 1
        await asyncio.sleep(61.0)
        assert pool.is_empty

    play(scenario)


# Closing


def test_closing_is_never_awaited_by_discard() -> None:
    """P7: discard() is synchronous, and the close happens afterwards."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        wire = await leased(pool)
        pool.discard(wire, Reason.INTERRUPTED)
        assert wire.closed_at == now()

    play(scenario)


def test_a_closed_pool_hands_out_nothing() -> None:
    """After its end acquire() says so instead of waiting for ever."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        await pool.aclose()
        with pytest.raises(PoolClosedError):
            await pool.acquire(10.0)

    play(scenario)


def test_closing_lets_waiters_have_their_dials_and_takes_nothing_back() -> None:
    """No turn falls silent because its pool ends; what comes back afterwards is closed."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
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

    play(scenario)


def test_aclose_during_a_dial_that_hangs() -> None:
    """aclose() waits close_timeout for it, then nobody waits any more."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.hang_next = 1
        caller = asyncio.create_task(leased(pool))
        await asyncio.sleep(0.1)
        began = now()
        await pool.aclose()
        assert now() - began <= 5.1
        assert len(network.dialled_at) == 1, "dialled again for a pool that has ended"
        with pytest.raises(PoolClosedError):
            await caller

    play(scenario)


def test_aclose_waits_no_longer_than_for_one_of_them() -> None:
    """What the dial has used up of close_timeout, the closing of others does not get."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
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

    play(scenario)


def test_aclose_during_a_standbys_dial_closes_what_it_brings() -> None:
    """A handshake under way is brought to its end, so that the server gets a Close frame."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await asyncio.sleep(0.1)
        await pool.aclose()
        assert len(network.wires) == 1
        assert not network.wires[0].is_open

    play(scenario)


def test_a_session_that_is_gone_ends_the_pool_quietly(caplog: pytest.LogCaptureFixture) -> None:
    """P9: no redial and no warning when what the pool dials with was closed."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        [wire] = await idle(pool, 1)
        network.is_gone = True
        wire.break_off()
        await asyncio.sleep(3600.0)
        assert pool.is_closed
        assert len(network.dialled_at) == 1

    play(scenario)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_a_standby_that_fails_since_the_session_is_gone_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P9: nobody is warned of what was to be expected."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        network.refuse = [FailureKind.TRANSIENT]
        pool.resize(1)
        await asyncio.sleep(HANDSHAKE / 2)
        network.is_gone = True
        await asyncio.sleep(HANDSHAKE)
        assert pool.metrics.counters.totals["standby_failures"] == 0

    play(scenario)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_asked_by_another_thread_between_two_changes() -> None:
    """Statistics are looked at from anywhere: a count that cannot be is not told."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        [wire] = await idle(pool, 1)
        entry = pool._entries.pop(wire)
        assert (pool.idle, pool.leased) == (1, 0)
        pool._entries[wire] = entry

    play(scenario)


def test_repr_tells_the_whole_state() -> None:
    """A failing test, or an operator with a debugger, sees what there is."""

    async def scenario(network: Network, pool: Pool[Wire]) -> None:
        pool.resize(1)
        await leased(pool)
        assert repr(pool) == (
            "<Pool open idle=0 leased=1 clearing=0 connecting=0 waiting=0 closing=0 min_size=1>"
        )
        pool.close()
        assert repr(pool).startswith("<Pool closed idle=0 leased=1 ")

    play(scenario)
