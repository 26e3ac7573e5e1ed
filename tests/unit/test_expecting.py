"""Rules S1, S2 and S5: which connections a pool keeps when replies are expected, warm and lean."""

from __future__ import annotations

import asyncio

import pytest

from tests.clock import in_virtual_time
from tests.unit.pool_kit import (
    HANDSHAKE,
    Network,
    Wire,
    close_all,
    idle,
    leased,
    make_pool,
    now,
    with_pool,
)
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import (
    LINGER,
    ON_DEMAND_LASTS,
    PREWARM_LASTS,
    ROOM_LASTS,
    SPARE_IDLE_TIME,
    DialFailedError,
    Pool,
)

ANN, BOB = "Ann", "Bob"


async def speak(pool: Pool[Wire], caller: object) -> Wire:
    wire = (await pool.acquire(10.0, caller=caller)).connection
    pool.give_back(wire, Outcome.FINISHED)
    return wire


@with_pool()
async def test_lean_keeps_nothing_between_replies(network: Network, pool: Pool[Wire]) -> None:
    """S1: a connection closes some tenths of a second after its last use, and none is dialled."""
    pool.resize(1)
    pool.set_lean(True)
    await asyncio.sleep(1.0)
    assert network.wires == []
    await speak(pool, ANN)
    await asyncio.sleep(LINGER / 2)
    await speak(pool, ANN)
    assert len(network.wires) == 1
    await asyncio.sleep(LINGER / 2)
    assert len(network.open) == 1
    await asyncio.sleep(LINGER)
    assert (network.open, len(network.wires)) == ([], 1)


@with_pool()
async def test_one_dial_however_many_signs(network: Network, pool: Pool[Wire]) -> None:
    """S2: and the reply that was expected finds it ready."""
    pool.set_lean(True)
    for _ in range(3):
        pool.expect(ANN, now() + 10.0)
        await asyncio.sleep(HANDSHAKE)
    assert (await pool.acquire(1.0, caller=ANN)).reused
    assert len(network.wires) == 1
    counted = pool.metrics.counters.totals
    assert (counted["signs_used"], counted["signs_unused"]) == (1, 0)


@with_pool()
async def test_who_waits_is_not_dialled_for_as_expected_too(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: a reply that waits is given up for the next one, which gets its dial."""
    pool.expect(ANN, now() + 10.0)
    given_up = asyncio.create_task(pool.acquire(10.0, caller=ANN))
    await asyncio.sleep(HANDSHAKE / 2)
    pool.expect(ANN, now() + 10.0)
    given_up.cancel()
    await asyncio.wait([given_up])
    await pool.acquire(10.0, caller=ANN)
    await asyncio.sleep(HANDSHAKE)
    assert len(network.wires) == 1


@with_pool()
async def test_each_expected_caller_has_one(pool: Pool[Wire]) -> None:
    """S2: two sessions of one voice reply at the same time."""
    pool.resize(1)
    pool.expect(ANN, now() + 10.0)
    pool.expect(BOB, now() + 10.0)
    await asyncio.sleep(1.0)
    assert pool.idle == 2
    for caller in (ANN, BOB):
        assert (await pool.acquire(1.0, caller=caller)).reused


@with_pool()
async def test_who_was_not_expected_does_not_leave_the_expected_one_without(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: a connection that is taken by somebody else is replaced at once."""
    pool.set_lean(True)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(2 * HANDSHAKE)
    assert (await pool.acquire(1.0, caller=BOB)).reused
    await asyncio.sleep(2 * HANDSHAKE)
    assert (await pool.acquire(1.0, caller=ANN)).reused
    assert len(network.wires) == 2


@with_pool()
async def test_a_connection_in_use_by_another_is_none_to_expect(pool: Pool[Wire]) -> None:
    """S2: Bob needs one of his own while Ann speaks."""
    pool.set_lean(True)
    await pool.acquire(1.0, caller=ANN)
    pool.expect(BOB, now() + 10.0)
    await asyncio.sleep(1.0)
    assert (pool.leased, pool.idle) == (1, 1)


@with_pool()
async def test_who_speaks_next_takes_the_connection_that_it_has(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: a queued reply waits for the one that speaks, and needs no second session."""
    pool.set_lean(True)
    wire = (await pool.acquire(1.0, caller=ANN)).connection
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(2.0)
    pool.give_back(wire, Outcome.FINISHED)
    await asyncio.sleep(10 * LINGER)
    assert (await pool.acquire(1.0, caller=ANN)).connection is wire
    assert len(network.wires) == 1


@with_pool()
async def test_who_was_handed_a_connection_by_another_has_it(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: Bob waits, gets the connection that Ann gives back, and is expected to speak on."""
    wire = (await pool.acquire(1.0, caller=ANN)).connection
    network.hang_next = 1
    bob = asyncio.create_task(pool.acquire(5.0, caller=BOB))
    await asyncio.sleep(0.1)
    pool.give_back(wire, Outcome.FINISHED)
    assert (await bob).connection is wire
    pool.expect(BOB, now() + 60.0)
    await asyncio.sleep(20.0)
    assert len(network.wires) == 1


@with_pool()
async def test_a_reply_that_does_not_come_costs_one_connection_for_a_while(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: withdrawn, or not heard of any more."""
    pool.set_lean(True)
    pool.expect(ANN, now() + 3.0)
    pool.expect(ANN, now() + 2.0)
    await asyncio.sleep(2.9)
    assert len(network.open) == 1
    await asyncio.sleep(0.2)
    assert network.open == []
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(1.0)
    pool.withdraw(ANN)
    pool.withdraw(BOB)
    assert network.open == []
    assert pool.metrics.counters.totals["signs_unused"] == 2


@with_pool()
async def test_the_first_to_be_expected_is_who_was_prewarmed_for(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: a session that starts and greets needs one connection, and a second session another."""
    pool.resize(1)
    pool.prewarm()
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(1.0)
    assert len(network.wires) == 1
    pool.expect(BOB, now() + 10.0)
    await asyncio.sleep(1.0)
    assert len(network.wires) == 2


@with_pool()
async def test_prewarm_is_for_whoever_asks_first(network: Network, pool: Pool[Wire]) -> None:
    """S2: and only for so long, unless something else keeps it."""
    pool.set_lean(True)
    pool.prewarm()
    await asyncio.sleep(PREWARM_LASTS - 0.1)
    assert pool.idle == 1
    assert (await pool.acquire(1.0, caller=ANN)).reused
    pool.prewarm()
    await asyncio.sleep(PREWARM_LASTS + LINGER)
    assert len(network.wires) == 1


@with_pool()
async def test_warm_keeps_what_it_keeps(network: Network, pool: Pool[Wire]) -> None:
    """S1: a sign makes no second connection where one is ready."""
    pool.resize(1)
    await asyncio.sleep(1.0)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(1.0)
    await speak(pool, ANN)
    await asyncio.sleep(100.0)
    assert len(network.wires) == len(network.open) == 1


@with_pool()
async def test_lean_begins_and_ends(network: Network, pool: Pool[Wire]) -> None:
    """S1, S3: idle connections close at once when it begins; when it ends, the pool is warm."""
    pool.resize(1)
    wires = await idle(pool, 2)
    await asyncio.sleep(2 * LINGER)
    pool.set_lean(True)
    await asyncio.sleep(0.01)
    assert [wire.is_open for wire in wires] == [False, False]
    await asyncio.sleep(10.0)
    assert network.open == []
    pool.set_lean(False)
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@with_pool()
async def test_an_expected_reply_dials_no_sooner_than_the_backoff_says(
    network: Network, pool: Pool[Wire]
) -> None:
    """P4: a sign is no caller."""
    network.refuse = [FailureKind.TRANSIENT, None]
    pool.set_lean(True)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(HANDSHAKE + 0.1)
    pool.expect(ANN, now() + 10.0)
    assert len(network.dialled_at) == 1
    await asyncio.sleep(0.5 + HANDSHAKE)
    assert pool.idle == 1


@with_pool()
async def test_refused_while_lean_it_dials_for_callers_only(
    network: Network, pool: Pool[Wire]
) -> None:
    """S4, S7: it holds no session longer than an utterance takes, and minutes later it does."""
    network.refuse = [FailureKind.REFUSED]
    pool.set_lean(True)
    with pytest.raises(DialFailedError):
        await pool.acquire(1.0, caller=ANN)
    for _ in range(3):
        await asyncio.sleep(20.0)
        pool.expect(ANN, now() + 10.0)
        await asyncio.sleep(1.0)
        assert pool.idle == 0
        await speak(pool, ANN)
        assert network.open == []
    assert len(network.dialled_at) == 4
    await asyncio.sleep(ON_DEMAND_LASTS)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@in_virtual_time
async def test_the_refusal_that_makes_it_lean_is_the_only_one() -> None:
    """S3: the pool becomes lean before the caller hears of the refusal, and dials once for it."""
    network = Network(refuse=[FailureKind.REFUSED] * 2)
    pool = make_pool(network)
    network.on_dial_failed = lambda _: pool.set_lean(True)
    with pytest.raises(DialFailedError):
        await pool.acquire(1.0)
    await asyncio.sleep(2 * HANDSHAKE)
    assert len(network.dialled_at) == 1
    await close_all(network, pool)


@with_pool()
async def test_refused_while_warm_it_dials_ahead_as_before(
    network: Network, pool: Pool[Wire]
) -> None:
    """S3: the first refusal makes a pool lean, and lean is enough as long as nobody is refused."""
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE + 0.1)
    network.refuse = [FailureKind.REFUSED]
    taken = await leased(pool)
    with pytest.raises(DialFailedError):
        await pool.acquire(1.0)
    pool.give_back(taken, Outcome.FINISHED)
    pool.set_lean(True)
    await asyncio.sleep(20.0)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(1.0)
    assert pool.idle == 1


@with_pool()
async def test_closing_idle_connections_makes_room(network: Network, pool: Pool[Wire]) -> None:
    """S4: the tasks end when the closes do; what is leased stays."""
    wire = await leased(pool)
    await idle(pool, 1)
    tasks = pool.let_go()
    await asyncio.wait(tasks)
    assert [each.is_open for each in network.wires] == [True, False]
    await asyncio.sleep(0.0)
    assert pool.let_go() == []
    pool.give_back(wire, Outcome.FINISHED)


@with_pool()
async def test_a_spare_closes_within_seconds(pool: Pool[Wire]) -> None:
    """S5: a dial that came too late to be needed."""
    pool.resize(1)
    [wire] = await idle(pool, 1)
    taken = await leased(pool)
    late = asyncio.create_task(leased(pool))
    await asyncio.sleep(HANDSHAKE / 2)
    pool.give_back(taken, Outcome.FINISHED)
    assert await late is wire
    pool.give_back(wire, Outcome.FINISHED)
    await asyncio.sleep(HANDSHAKE)
    assert pool.idle == 2
    await asyncio.sleep(SPARE_IDLE_TIME)
    assert pool.idle == 1


@with_pool()
async def test_a_dial_for_a_voice_left_meanwhile_is_closed(
    network: Network, pool: Pool[Wire]
) -> None:
    """P11: at once; a voice that has spoken keeps its connection for a while."""
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE / 2)
    pool.retire()
    await asyncio.sleep(HANDSHAKE)
    assert (len(network.wires), network.open) == (1, [])
    pool.resize(1)
    await speak(pool, ANN)
    pool.retire()
    await asyncio.sleep(50.0)
    assert pool.idle == 1
    await asyncio.sleep(11.0)
    assert pool.idle == 0


@with_pool()
async def test_who_is_expected_moves_on_with_the_voice(pool: Pool[Wire]) -> None:
    """P11: a pool that nobody speaks with expects nobody, and says whom it expected."""
    until = now() + 10.0
    pool.set_lean(True)
    pool.expect(ANN, until)
    assert pool.retire() == {ANN: until}
    await asyncio.sleep(HANDSHAKE + LINGER)
    assert pool.connections == ()


@with_pool()
async def test_after_a_refused_dial_ahead_of_a_reply_it_pauses(
    network: Network, pool: Pool[Wire]
) -> None:
    """S4, P4: it cost nobody a reply, so the pool goes on dialling ahead when the backoff ends."""
    network.refuse = [FailureKind.REFUSED]
    pool.set_lean(True)
    pool.expect(ANN, now() + 10.0)
    await asyncio.sleep(HANDSHAKE + 0.1)
    pool.expect(BOB, now() + 5.0)
    assert len(network.dialled_at) == 1
    assert "next dial in" in repr(pool)
    await asyncio.sleep(0.5 + HANDSHAKE)
    assert pool.idle == 2
    pool.withdraw(ANN)
    pool.withdraw(BOB)


@with_pool()
async def test_who_let_go_dials_nothing_ahead_for_a_while(
    network: Network, pool: Pool[Wire]
) -> None:
    """S4: neither a standby nor for a reply takes the place that was made, and a caller may."""
    pool.resize(1)
    await idle(pool, 2)
    closing = pool.let_go()
    assert (pool.idle, len(closing)) == (0, 2)
    pool.expect(ANN, now() + 60.0)
    await asyncio.sleep(ROOM_LASTS - 1.0)
    assert len(network.dialled_at) == 2
    await speak(pool, BOB)
    assert (pool.idle, len(network.dialled_at)) == (0, 3)
    await asyncio.sleep(1.0 + 0.01)
    assert (pool.idle, len(network.dialled_at)) == (1, 4), "the end needs no other event"


@with_pool()
async def test_letting_go_does_not_shorten_what_a_refusal_asks_for(
    network: Network, pool: Pool[Wire]
) -> None:
    """S4: the later of the two ends counts."""
    network.refuse = [FailureKind.REFUSED]
    pool.set_lean(True)
    with pytest.raises(DialFailedError):
        await pool.acquire(1.0, caller=ANN)
    assert pool.let_go() == []
    pool.expect(ANN, now() + ON_DEMAND_LASTS)
    await asyncio.sleep(2 * ROOM_LASTS)
    assert len(network.dialled_at) == 1


@with_pool()
async def test_nothing_is_dialled_ahead_while_there_is_no_place(
    network: Network, pool: Pool[Wire]
) -> None:
    """S5a: a caller is served all the same, and what was held back is dialled when one is free."""
    network.has_room = False
    pool.resize(1)
    pool.expect(ANN, now() + 60.0)
    await asyncio.sleep(1.0)
    assert network.dialled_at == []
    wire = await leased(pool)
    assert len(network.dialled_at) == 1
    pool.give_back(wire, Outcome.FAILED)
    await asyncio.sleep(1.0)
    assert len(network.dialled_at) == 1
    assert network.closed_at == [pytest.approx(wire.closed_at + 0.1)]  # type: ignore[operator]
    network.has_room = True
    pool.settle()
    assert pool.connecting == 1


@with_pool()
async def test_a_left_pool_that_is_expected_replaces_no_dial_without_pause(
    network: Network, pool: Pool[Wire]
) -> None:
    """P11, S2: a dial that was made for whoever is expected is not one too many."""
    pool.retire()
    pool.expect(ANN, now() + 60.0)
    await asyncio.sleep(30.0)
    assert (pool.idle, len(network.dialled_at)) == (1, 1)
