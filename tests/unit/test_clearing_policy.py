"""When the pool clears interrupted connections."""

from __future__ import annotations

import asyncio

import pytest

from tests.clock import block
from tests.kit import event_of
from tests.unit.pool_kit import HANDSHAKE, ROUND_TRIP, Network, Wire, about, leased, now, with_pool
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.clearing import CLEAR, RELIANCE
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import AcquireTimeoutError, Pool

RELIED_ON = RELIANCE.times * ROUND_TRIP
STOPPED = "clearing stopped"

CLEARS = PoolOptions(interruption="clear")


def interrupt(pool: Pool[Wire], wire: Wire) -> None:
    """In the middle of an utterance, so that the server still owes audio."""
    wire.is_reusable = False
    pool.give_back(wire, Outcome.INTERRUPTED)


async def interrupted(pool: Pool[Wire]) -> Wire:
    wire = await leased(pool)
    interrupt(pool, wire)
    return wire


def warnings(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Messages and reasons."""
    records = [record for record in caplog.records if record.levelname == "WARNING"]
    return [(event_of(record), vars(record)["xai_pool_reason"]) for record in records]


# Clearing


@with_pool()
async def test_by_default_an_interrupted_connection_is_discarded(pool: Pool[Wire]) -> None:
    """The pool sends no clear, and does not keep even a clean connection."""
    for is_clean in (True, False):
        wire = await leased(pool)
        wire.is_reusable = is_clean
        pool.give_back(wire, Outcome.INTERRUPTED)
        assert (wire.is_open, wire.clears) == (False, 0)
    assert pool.metrics.counters.totals["closed_interrupted"] == 2


@with_pool(CLEARS)
async def test_an_interrupted_connection_is_cleared_in_the_background(
    network: Network, pool: Pool[Wire]
) -> None:
    """A round trip later it is idle again, and the pool has dialled no other."""
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
async def test_a_connection_that_owes_nothing_is_kept_without_a_clear(pool: Pool[Wire]) -> None:
    """It was interrupted before anything was sent."""
    wire = await leased(pool)
    pool.give_back(wire, Outcome.INTERRUPTED)
    assert (pool.idle, wire.clears) == (1, 0)


@with_pool(CLEARS)
async def test_a_connection_whose_clear_proves_nothing_is_closed(pool: Pool[Wire]) -> None:
    """L4a: its server's PONGs do not show what an answer is for. That is no failed clear."""
    for _ in range(3):
        wire = await leased(pool)
        wire.clear_round_trip = None
        interrupt(pool, wire)
        assert (wire.is_open, wire.clears) == (False, 0)
    assert pool.metrics.counters.totals["closed_interrupted"] == 3
    assert (await interrupted(pool)).is_open


@with_pool(CLEARS)
async def test_a_failed_utterance_is_not_cleared(pool: Pool[Wire]) -> None:
    """Nobody knows in which state its session is, however clean it looks."""
    for is_clean in (True, False):
        wire = await leased(pool)
        wire.is_reusable = is_clean
        pool.give_back(wire, Outcome.FAILED)
        assert (wire.is_open, wire.clears) == (False, 0)
    assert pool.metrics.counters.totals["closed_failed"] == 2


@with_pool(CLEARS)
async def test_a_caller_gets_the_connection_that_is_being_cleared(
    network: Network, pool: Pool[Wire]
) -> None:
    """A clear on time is faster than a dial, so none is made. The connection is not fresh."""
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    acquired = await pool.acquire(10.0)
    assert acquired.connection is wire
    assert acquired.waited == about(ROUND_TRIP - 0.1)
    assert (acquired.reused, acquired.fresh) == (False, False)
    assert len(network.dialled_at) == 1


@pytest.mark.parametrize("clear_takes", [0.4, 1e9])
@with_pool(CLEARS)
async def test_a_caller_does_not_rely_on_a_clear_that_is_late(
    network: Network, pool: Pool[Wire], clear_takes: float
) -> None:
    """After two round trips the pool dials, and the caller takes whichever is first."""
    first = await leased(pool)
    first.cleared_after = clear_takes
    interrupt(pool, first)
    began = now()
    wire = await leased(pool)
    assert network.dialled_at[1:] == [pytest.approx(began + RELIED_ON)]
    assert (wire is first) == (clear_takes == 0.4)
    assert now() - began == pytest.approx(min(clear_takes, RELIED_ON + HANDSHAKE))


@with_pool(CLEARS)
async def test_time_in_which_the_loop_is_blocked_does_not_count_against_a_clear(
    network: Network, pool: Pool[Wire]
) -> None:
    """Its acknowledgement came while the loop was blocked, and is not read yet."""
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    block(2 * RELIED_ON)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


@with_pool(CLEARS)
async def test_a_clear_over_a_short_round_trip_has_a_minimum_of_time(
    network: Network, pool: Pool[Wire]
) -> None:
    """The server's own time is not part of the round trip."""
    wire = await leased(pool)
    wire.clear_round_trip, wire.cleared_after = 0.0, RELIANCE.at_least - 0.01
    interrupt(pool, wire)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


@with_pool(CLEARS)
async def test_each_clear_is_relied_on_by_one_caller(network: Network, pool: Pool[Wire]) -> None:
    """The pool dials for the second caller at once."""
    wire = await interrupted(pool)
    began = now()
    first, second = await asyncio.gather(leased(pool), leased(pool))
    assert first is wire
    assert second is not wire
    assert network.dialled_at[1:] == [about(began)]


@with_pool(CLEARS)
async def test_a_caller_that_wants_a_fresh_connection_does_not_rely_on_a_clear(
    network: Network, pool: Pool[Wire]
) -> None:
    """The pool dials for its replay at once."""
    wire = await interrupted(pool)
    began = now()
    assert (await pool.acquire(10.0, fresh=True)).connection is not wire
    assert network.dialled_at[1:] == [about(began)]


@pytest.mark.parametrize("fresh_first", [True, False])
@with_pool(CLEARS)
async def test_a_dial_for_one_caller_and_a_clear_for_another(
    network: Network, pool: Pool[Wire], fresh_first: bool
) -> None:
    """Each gets its own, whoever came first, and the pool dials once."""
    wire = await interrupted(pool)
    began = now()
    callers = [pool.acquire(10.0, fresh=True), pool.acquire(10.0)]
    results = await asyncio.gather(*(callers if fresh_first else callers[::-1]))
    fresh, other = results if fresh_first else results[::-1]
    assert other.connection is wire
    assert fresh.connection is not wire
    assert network.dialled_at[1:] == [about(began)]


@with_pool(CLEARS)
async def test_clears_do_not_count_for_a_caller_that_wants_a_fresh_connection(
    network: Network, pool: Pool[Wire]
) -> None:
    """However many clears are under way, the pool dials for it."""
    for wire in await asyncio.gather(leased(pool), leased(pool)):
        interrupt(pool, wire)
    began = now()
    await asyncio.gather(pool.acquire(10.0), pool.acquire(10.0, fresh=True))
    assert network.dialled_at[2:] == [about(began)]


@with_pool(CLEARS)
async def test_a_caller_that_gives_up_does_not_stop_the_clear(
    network: Network, pool: Pool[Wire]
) -> None:
    """P3: the next caller finds the connection."""
    wire = await interrupted(pool)
    with pytest.raises(AcquireTimeoutError):
        await pool.acquire(0.1)
    await asyncio.sleep(0.1)
    assert await leased(pool) is wire
    assert len(network.dialled_at) == 1


# Clears that fail


@pytest.mark.parametrize(("round_trip", "bound"), [(0.001, CLEAR.at_least), (0.1, 0.6), (1.0, 1.0)])
@with_pool(CLEARS)
async def test_a_clear_without_acknowledgement_is_given_up(
    network: Network, pool: Pool[Wire], round_trip: float, bound: float
) -> None:
    """After a time by the round trip, a second at most. P4: a standby is dialled at once."""
    pool.resize(1)
    wire = await leased(pool)
    wire.clear_round_trip, wire.cleared_after = round_trip, 1e9
    interrupt(pool, wire)
    given_up_at = now() + bound
    await asyncio.sleep(5.0)
    assert wire.closed_at == pytest.approx(given_up_at)
    assert network.dialled_at[1:] == [pytest.approx(given_up_at)]
    assert pool.metrics.counters.totals["closed_interrupted"] == 1


@with_pool(CLEARS)
async def test_a_connection_lost_during_its_clear_is_replaced_at_once(pool: Pool[Wire]) -> None:
    """C3: nobody waits for an acknowledgement that cannot come."""
    pool.resize(1)
    wire = await interrupted(pool)
    await asyncio.sleep(0.1)
    wire.break_off()
    assert (pool.clearing, pool.connecting) == (0, 1)
    await asyncio.sleep(5.0)
    assert pool.metrics.counters.totals["closed_interrupted"] == 1


@with_pool(CLEARS)
async def test_a_connection_that_expired_during_its_clear_is_not_handed_on(
    pool: Pool[Wire],
) -> None:
    """P5: though a caller waits for it."""
    wire = await leased(pool)
    await asyncio.sleep(PoolOptions().max_age)
    interrupt(pool, wire)
    assert await leased(pool) is not wire
    assert pool.metrics.counters.totals["closed_expired"] == 1


async def _fail_to_clear(pool: Pool[Wire]) -> Wire:
    """Interrupt an utterance whose clear the server does not acknowledge."""
    wire = await leased(pool)
    wire.acknowledges = False
    interrupt(pool, wire)
    await asyncio.sleep(ROUND_TRIP + 0.01)
    assert not wire.is_open
    return wire


@with_pool(CLEARS)
async def test_after_two_failed_clears_in_a_row_the_pool_stops_clearing(
    pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """It logs that once, and discards from then on."""
    wires = [await _fail_to_clear(pool) for _ in range(4)]
    assert [wire.clears for wire in wires] == [1, 1, 0, 0]
    assert pool.metrics.counters.totals["closed_interrupted"] == 4
    assert warnings(caplog) == [(STOPPED, "clears are not acknowledged")]


@with_pool(CLEARS)
async def test_an_acknowledged_clear_resets_the_count_of_failed_ones(
    pool: Pool[Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """One failure in every two clears does not stop clearing."""
    for _ in range(3):
        await _fail_to_clear(pool)
        wire = await interrupted(pool)
        await asyncio.sleep(ROUND_TRIP + 0.01)
        assert wire.is_open
        pool.give_back(await leased(pool), Outcome.FINISHED)
    await pool.aclose()
    assert warnings(caplog) == []


@pytest.mark.parametrize("use", ["idle", "leased"])
@with_pool(CLEARS)
async def test_audio_after_an_acknowledgement_stops_clearing(
    pool: Pool[Wire], use: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The acknowledgement was wrong, so the pool sends no clear any more."""
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
async def test_aclose_does_not_wait_for_an_acknowledgement(pool: Pool[Wire]) -> None:
    """P7: a connection that is being cleared is closed at once, like an idle one."""
    wire = await leased(pool)
    wire.cleared_after = 1e9
    interrupt(pool, wire)
    began = now()
    await pool.aclose()
    assert wire.closed_at == about(began)
    assert now() - began < 0.2
    assert pool.metrics.counters.totals["closed_shutdown"] == 1


@with_pool(CLEARS)
async def test_close_dials_for_a_caller_that_relied_on_a_clear(pool: Pool[Wire]) -> None:
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
    """It discards what is released after its end."""
    wire = await leased(pool)
    pool.close()
    interrupt(pool, wire)
    assert (wire.is_open, wire.clears) == (False, 0)
