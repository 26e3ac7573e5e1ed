"""What the pool does with connections that can be made clean again, and proven alive."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pool_kit import HANDSHAKE, ROUND_TRIP, Network, Wire, idle, leased, now, with_pool
from tests.virtual import block
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.clearing import CLEAR, RELIANCE
from xai_pool_patch.pool.pool import AcquireTimeoutError, Pool

RELIED_ON = RELIANCE.times * ROUND_TRIP
VERIFY_AFTER = 300.0
STOPPED = "clearing stopped"

CLEARS = PoolOptions(interruption="clear")
VERIFIES = PoolOptions(verify_after=VERIFY_AFTER)


def interrupt(pool: Pool[Wire], wire: Wire) -> None:
    """In the middle of an utterance: something is owed."""
    wire.is_reusable = False
    pool.release_cut_off(wire)


async def interrupted(pool: Pool[Wire]) -> Wire:
    wire = await leased(pool)
    interrupt(pool, wire)
    return wire


def warnings(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Messages and reasons."""
    records = [record for record in caplog.records if record.levelname == "WARNING"]
    return [(record.getMessage(), vars(record)["xai_pool_reason"]) for record in records]


# Reclaiming


@with_pool()
async def test_the_default_discards(pool: Pool[Wire]) -> None:
    """Nothing is asked of the server, not even where nothing was asked of it before."""
    for is_clean in (True, False):
        wire = await leased(pool)
        wire.is_reusable = is_clean
        pool.release_cut_off(wire)
        assert (wire.is_open, wire.clears) == (False, 0)
    assert pool.metrics.counters.totals["closed_interrupted"] == 2


@with_pool(CLEARS)
async def test_an_interrupted_connection_is_reclaimed_in_the_background(
    network: Network, pool: Pool[Wire]
) -> None:
    """It waits for nothing; a round trip later the connection is there, and no other was made."""
    pool.resize(1)
    wire = await interrupted(pool)
    assert (pool.idle, pool.leased, pool.clearing) == (0, 0, 1)
    await asyncio.sleep(ROUND_TRIP + 0.01)
    assert (pool.idle, pool.leased, pool.clearing) == (1, 0, 0)
    acquired = await pool.acquire(10.0)
    assert (acquired.connection, acquired.reused, acquired.fresh) == (wire, True, False)
    assert len(network.dialled_at) == 1, "it counts as kept"
    assert pool.metrics.counters.totals["connections_cleared"] == 1


@with_pool(CLEARS)
async def test_nothing_is_cleared_where_nothing_is_owed(pool: Pool[Wire]) -> None:
    """Interrupted before anything was sent, a connection is as good as before."""
    wire = await leased(pool)
    pool.release_cut_off(wire)
    assert (pool.idle, wire.clears) == (1, 0)


@with_pool(CLEARS)
async def test_a_caller_gets_the_connection_that_is_being_cleared(
    network: Network, pool: Pool[Wire]
) -> None:
    """On time, that is sooner than a dial: none is made. The connection is no fresh one."""
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    acquired = await pool.acquire(10.0)
    assert acquired.connection is wire
    assert acquired.waited == pytest.approx(ROUND_TRIP - 0.1)
    assert (acquired.reused, acquired.fresh) == (False, False)
    assert len(network.dialled_at) == 1


@pytest.mark.parametrize("clear_takes", [0.4, 1e9])
@with_pool(CLEARS)
async def test_a_caller_does_not_rely_on_a_clear_that_is_late(
    network: Network, pool: Pool[Wire], clear_takes: float
) -> None:
    """After two round trips it dials, and takes whichever is first."""
    first = await leased(pool)
    first.cleared_after = clear_takes
    interrupt(pool, first)
    began = now()
    wire = await leased(pool)
    assert network.dialled_at[1:] == [pytest.approx(began + RELIED_ON)]
    assert (wire is first) == (clear_takes == 0.4)
    assert now() - began == pytest.approx(min(clear_takes, RELIED_ON + HANDSHAKE))


@with_pool(CLEARS)
async def test_a_caller_relies_on_a_clear_that_could_not_get_on(
    network: Network, pool: Pool[Wire]
) -> None:
    """Its acknowledgement came while the loop was blocked, and is not read yet."""
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    block(2 * RELIED_ON)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


@with_pool(CLEARS)
async def test_a_caller_does_not_rely_on_a_clear_over_an_unknown_distance(
    network: Network, pool: Pool[Wire]
) -> None:
    """It dials at once."""
    wire = await leased(pool)
    wire.round_trip = None
    interrupt(pool, wire)
    began = now()
    assert await leased(pool) is wire
    assert network.dialled_at[1:] == [began]


@with_pool(CLEARS)
async def test_over_no_distance_a_clear_still_has_a_moment(
    network: Network, pool: Pool[Wire]
) -> None:
    """The server's own time is not in the round trip."""
    wire = await leased(pool)
    wire.round_trip, wire.cleared_after = 0.0, RELIANCE.at_least - 0.01
    interrupt(pool, wire)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


@with_pool(CLEARS)
async def test_only_as_many_callers_rely_on_clears_as_there_are(
    network: Network, pool: Pool[Wire]
) -> None:
    """The second one dials at once."""
    wire = await interrupted(pool)
    began = now()
    first, second = await asyncio.gather(leased(pool), leased(pool))
    assert first is wire
    assert second is not wire
    assert network.dialled_at[1:] == [began]


@with_pool(CLEARS)
async def test_whoever_wants_a_fresh_one_does_not_rely_on_a_clear(
    network: Network, pool: Pool[Wire]
) -> None:
    """A replacement is dialled at once."""
    wire = await interrupted(pool)
    began = now()
    assert (await pool.acquire(10.0, fresh=True)).connection is not wire
    assert network.dialled_at[1:] == [began]


@pytest.mark.parametrize("fresh_first", [True, False])
@with_pool(CLEARS)
async def test_one_wants_a_fresh_one_and_another_relies_on_a_clear(
    network: Network, pool: Pool[Wire], fresh_first: bool
) -> None:
    """Each gets its own, by one dial, whoever came first."""
    wire = await interrupted(pool)
    began = now()
    callers = [pool.acquire(10.0, fresh=True), pool.acquire(10.0)]
    results = await asyncio.gather(*(callers if fresh_first else callers[::-1]))
    fresh, other = results if fresh_first else results[::-1]
    assert other.connection is wire
    assert fresh.connection is not wire
    assert network.dialled_at[1:] == [began]


@with_pool(CLEARS)
async def test_whoever_wants_a_fresh_one_is_dialled_for_however_many_clears_there_are(
    network: Network, pool: Pool[Wire]
) -> None:
    """A clear is relied on for one caller, and not for another that has no use for it."""
    for wire in await asyncio.gather(leased(pool), leased(pool)):
        interrupt(pool, wire)
    began = now()
    await asyncio.gather(pool.acquire(10.0), pool.acquire(10.0, fresh=True))
    assert network.dialled_at[2:] == [began]


@with_pool(CLEARS)
async def test_a_caller_that_gives_up_leaves_the_clear_alone(
    network: Network, pool: Pool[Wire]
) -> None:
    """P3: the next one finds the connection."""
    wire = await interrupted(pool)
    with pytest.raises(AcquireTimeoutError):
        await pool.acquire(0.1)
    await asyncio.sleep(0.1)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


# Clears that fail


@pytest.mark.parametrize(
    ("round_trip", "bound"), [(0.001, CLEAR.at_least), (0.1, 0.6), (1.0, 1.0), (None, 1.0)]
)
@with_pool(CLEARS)
async def test_a_clear_that_is_not_acknowledged_is_given_up(
    network: Network, pool: Pool[Wire], round_trip: float | None, bound: float
) -> None:
    """By the distance, and after clear_timeout at most; P4: a standby is dialled at once."""
    pool.resize(1)
    wire = await leased(pool)
    wire.round_trip, wire.cleared_after = round_trip, 1e9
    interrupt(pool, wire)
    given_up_at = now() + bound
    await asyncio.sleep(5.0)
    assert wire.closed_at == pytest.approx(given_up_at)
    assert network.dialled_at[1:] == [pytest.approx(given_up_at)]
    assert pool.metrics.counters.totals["closed_interrupted"] == 1


@with_pool(CLEARS)
async def test_a_connection_that_is_lost_meanwhile_is_replaced_at_once(pool: Pool[Wire]) -> None:
    """C3: nobody waits for an acknowledgement that cannot come."""
    pool.resize(1)
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    wire.break_off()
    assert (pool.clearing, pool.connecting) == (0, 1)
    await asyncio.sleep(5.0)
    assert pool.metrics.counters.totals["closed_interrupted"] == 1


@with_pool(CLEARS)
async def test_a_connection_that_grew_old_meanwhile_is_not_handed_on(pool: Pool[Wire]) -> None:
    """P5: though a caller waits for it."""
    wire = await leased(pool)
    await asyncio.sleep(1800.0)
    interrupt(pool, wire)
    assert await leased(pool) is not wire
    assert pool.metrics.counters.totals["closed_expired"] == 1


async def _refuse(pool: Pool[Wire]) -> Wire:
    """An interruption whose clear is not acknowledged; the connection that nothing came of."""
    wire = await leased(pool)
    wire.is_clearable = False
    interrupt(pool, wire)
    await asyncio.sleep(ROUND_TRIP + 0.01)
    assert not wire.is_open
    return wire


@with_pool(CLEARS)
async def test_after_two_refusals_in_a_row_it_discards(
    pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """And says so once."""
    wires = [await _refuse(pool) for _ in range(4)]
    assert [wire.clears for wire in wires] == [1, 1, 0, 0]
    assert pool.metrics.counters.totals["closed_interrupted"] == 4
    assert warnings(caplog) == [(STOPPED, "clears are not acknowledged")]


@with_pool(CLEARS)
async def test_a_refusal_is_forgiven(pool: Pool[Wire], caplog: pytest.LogCaptureFixture) -> None:
    """As soon as a clear is acknowledged."""
    for _ in range(3):
        await _refuse(pool)
        wire = await interrupted(pool)
        await asyncio.sleep(ROUND_TRIP + 0.01)
        assert wire.is_open
        pool.release(await leased(pool))
    await pool.aclose()
    assert warnings(caplog) == []


@pytest.mark.parametrize("use", ["idle", "leased"])
@with_pool(CLEARS)
async def test_a_broken_word_is_not_forgiven(
    pool: Pool[Wire], use: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server whose acknowledgement proved wrong once is not asked for another."""
    wire = await interrupted(pool)
    await asyncio.sleep(ROUND_TRIP + 0.01)
    if use == "leased":
        assert await leased(pool) is wire
    wire.sent_stale_audio = True
    wire.break_off()
    other = await interrupted(pool)
    assert (other.is_open, other.clears) == (False, 0)
    reason = "audio came after the acknowledgement of a clear"
    assert warnings(caplog) == [(STOPPED, reason)]


# Closing


@with_pool(CLEARS)
async def test_closing_does_not_wait_for_an_acknowledgement(pool: Pool[Wire]) -> None:
    """P7: what is being cleared is closed at once, like an idle connection."""
    wire = await leased(pool)
    wire.cleared_after = 1e9
    interrupt(pool, wire)
    began = now()
    await pool.aclose()
    assert wire.closed_at == began
    assert now() - began < 0.2
    assert pool.metrics.counters.totals["closed_shutdown"] == 1


@with_pool(CLEARS)
async def test_closing_leaves_whoever_relies_on_a_clear_a_dial(pool: Pool[Wire]) -> None:
    """No turn falls silent because its pool ends."""
    cleared = await interrupted(pool)
    caller = asyncio.create_task(leased(pool))
    await asyncio.sleep(0.05)
    pool.close()
    wire = await caller
    assert wire is not cleared
    assert wire.is_open


@with_pool(CLEARS)
async def test_a_closed_pool_clears_nothing(pool: Pool[Wire]) -> None:
    """What comes back after the end is discarded."""
    wire = await leased(pool)
    pool.close()
    interrupt(pool, wire)
    assert (wire.is_open, wire.clears) == (False, 0)


# Proving


@with_pool()
async def test_pings_are_proof_enough_by_default(pool: Pool[Wire]) -> None:
    """Nothing else is asked of an idle connection."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    await asyncio.sleep(1500.0)
    assert wire.clears == 0


@with_pool(VERIFIES)
async def test_an_idle_connection_proves_that_it_lives(network: Network, pool: Pool[Wire]) -> None:
    """Again and again, each time that long after the last use or proof."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    await asyncio.sleep(VERIFY_AFTER - 1.0)
    await idle(pool, 1)
    await asyncio.sleep(VERIFY_AFTER - 1.0)
    assert wire.clears == 0
    await asyncio.sleep(2.0)
    assert wire.clears == 1
    await asyncio.sleep(3 * VERIFY_AFTER)
    assert wire.clears == 4
    assert (pool.idle, len(network.dialled_at)) == (1, 1)
    assert pool.metrics.counters.totals["connections_cleared"] == 0


@with_pool(VERIFIES)
async def test_one_that_does_not_is_lost_and_replaced(network: Network, pool: Pool[Wire]) -> None:
    """P4: long before a turn would have found out; and no clear of an utterance was refused."""
    pool.resize(1)
    for count in (1, 2, 3):
        [wire] = await idle(pool, 1)
        wire.cleared_after = 1e9
        await asyncio.sleep(VERIFY_AFTER + 5.0)
        assert not wire.is_open
        assert (pool.idle, len(network.dialled_at)) == (1, count + 1)
        assert pool.metrics.counters.totals["closed_lost"] == count
        [wire] = await idle(pool, 1)
        await asyncio.sleep(VERIFY_AFTER + 5.0)
        assert wire.is_open


@with_pool(VERIFIES)
async def test_a_server_that_refuses_is_asked_twice(
    network: Network, pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """Else each connection would be dialled, asked and lost, for ever and without a word."""
    pool.resize(1)
    for _ in range(2):
        [wire] = await idle(pool, 1)
        wire.is_clearable = False
        lost_at = now() + VERIFY_AFTER
        await asyncio.sleep(VERIFY_AFTER + 5.0)
        assert not wire.is_open
        assert network.dialled_at[-1] > lost_at + ROUND_TRIP + 0.1, "no backoff"
    [wire] = await idle(pool, 1)
    await asyncio.sleep(3 * VERIFY_AFTER)
    assert (wire.is_open, wire.clears) == (True, 0)
    kept = "verifying stopped"
    assert warnings(caplog) == [(kept, "clears are not acknowledged")]


@with_pool(VERIFIES)
async def test_while_one_proves_it_the_others_serve(pool: Pool[Wire]) -> None:
    """One at a time: a caller finds a connection."""
    pool.resize(2)
    wires = await idle(pool, 2)
    await asyncio.sleep(VERIFY_AFTER + 0.01)
    pool.resize(2)  # any event will do
    await asyncio.sleep(0.01)
    assert (pool.idle, pool.clearing) == (1, 1)
    assert (await pool.acquire(10.0)).waited == 0.0
    await asyncio.sleep(3 * ROUND_TRIP)
    assert [wire.clears for wire in wires] == [1, 0]
    pool.release(wires[1])


@with_pool(VERIFIES)
async def test_a_caller_takes_the_only_one_as_soon_as_it_has_proven_it(pool: Pool[Wire]) -> None:
    """Or dials, when the proof is late."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    await asyncio.sleep(VERIFY_AFTER + 0.1)
    acquired = await pool.acquire(10.0)
    assert acquired.connection is wire
    assert acquired.waited == pytest.approx(ROUND_TRIP - 0.1)
    pool.release(wire)
    wire.cleared_after = 1e9
    await asyncio.sleep(VERIFY_AFTER + 0.1)
    acquired = await pool.acquire(10.0)
    assert acquired.connection is not wire
    assert acquired.waited == pytest.approx(RELIED_ON - 0.1 + HANDSHAKE)


@with_pool(PoolOptions(verify_after=10000.0))
async def test_a_proof_that_is_not_due_does_not_put_off_rotation(
    network: Network, pool: Pool[Wire]
) -> None:
    """P5: whichever comes first sets the timer."""
    pool.resize(1)
    await asyncio.sleep(1800.0)
    assert len(network.dialled_at) == 2
    assert network.wires[0].clears == 0


@with_pool(PoolOptions(verify_after=20.0))
async def test_a_proof_is_no_use(pool: Pool[Wire]) -> None:
    """P1, P6: last in is still first out, and a spare connection is still trimmed in its time."""
    pool.resize(1)
    first, second = await asyncio.gather(leased(pool), leased(pool))
    pool.release(first)
    await asyncio.sleep(5.0)
    pool.release(second)
    await asyncio.sleep(36.0)
    assert (first.clears, second.clears) == (2, 1)
    assert await leased(pool) is second
    pool.release(second)
    await asyncio.sleep(20.0)
    assert (first.is_open, second.is_open) == (False, True)
