"""P4, S2: how often a pool dials, where each dial ends at once or is for nobody."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.pool_kit import Network, Wire, leased, now, with_pool
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import ON_DEMAND_LASTS, DialFailedError, Pool

ANN = "Ann"
SECONDS = 10.0
A_FEW = 3


@pytest.mark.parametrize("handshake", [0.0, 0.45])
@with_pool()
async def test_a_left_pool_that_is_expected_dials_no_more_than_once(
    network: Network, pool: Pool[Wire], handshake: float
) -> None:
    """S2, P11: whoever is expected in it has one connection, which is none too many."""
    network.handshake = handshake
    pool.resize(1)
    await asyncio.sleep(1.0)
    pool.retire()
    pool.expect(ANN, now() + SECONDS)
    await asyncio.sleep(SECONDS)
    assert len(network.dialled_at) <= 2, "the first, and one for whoever is expected"


@with_pool()
async def test_a_left_pool_whose_connection_is_in_use_dials_once_for_the_expected(
    network: Network, pool: Pool[Wire]
) -> None:
    """S2: Ann is expected while another's utterance is not over."""
    pool.resize(1)
    wire = await leased(pool)
    pool.retire()
    pool.expect(ANN, now() + SECONDS)
    await asyncio.sleep(SECONDS)
    assert len(network.dialled_at) <= 2
    pool.give_back(wire, Outcome.FINISHED)


@with_pool()
async def test_a_pool_that_was_left_and_never_used_expects_in_vain_and_dials_once(
    network: Network, pool: Pool[Wire]
) -> None:
    pool.retire()
    pool.expect(ANN, now() + SECONDS)
    await asyncio.sleep(SECONDS)
    assert len(network.dialled_at) <= 1


@pytest.mark.parametrize("handshake", [0.0, 0.45])
@with_pool()
async def test_the_end_of_on_demand_needs_no_event(
    network: Network, pool: Pool[Wire], handshake: float
) -> None:
    """S4: who is still expected then gets a connection dialled at that moment."""
    network.handshake = handshake
    network.refuse = [FailureKind.REFUSED]
    pool.set_lean(True)
    with pytest.raises(DialFailedError):
        await pool.acquire(1.0, caller=ANN)
    refused_at = now()
    await asyncio.sleep(1.0)
    pool.expect(ANN, refused_at + ON_DEMAND_LASTS + 10.0)
    await asyncio.sleep(ON_DEMAND_LASTS * 0.8 - 2.0)
    assert len(network.dialled_at) == 1, "nothing is dialled ahead until then"
    await asyncio.sleep(ON_DEMAND_LASTS * 0.2 + 2.0 + handshake)
    assert pool.idle == 1
    assert len(network.dialled_at) == 2


@pytest.mark.parametrize("life", [0.0, 0.2])
@with_pool()
async def test_connections_that_end_at_once_are_dialled_with_pauses(
    network: Network, pool: Pool[Wire], life: float
) -> None:
    """P4: the backoff limits standbys that the server ends as soon as they are open."""
    network.handshake = 0.0
    pool.resize(1)
    until = now() + SECONDS
    while now() < until:
        for wire in network.open:
            if wire.is_reusable and now() - wire.made_at >= life:
                wire.break_off()
        await asyncio.sleep(0.1)
    assert len(network.dialled_at) <= 2 * A_FEW


@with_pool()
async def test_dials_that_end_at_once_are_not_repeated_without_pause(
    network: Network, pool: Pool[Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P11, S2: a left pool that is expected, where no dial takes time, would never stop."""
    connect = network.connect

    async def at_once(pool: Pool[Wire], timeout: float) -> Wire | DialFailedError:
        # Else the clock of the test would stand still for ever.
        network.handshake = 0.0 if len(network.dialled_at) < 10 else 60.0
        return await connect(pool, timeout)

    monkeypatch.setattr(network, "connect", at_once)
    pool.retire()
    pool.expect(ANN, now() + SECONDS)
    await asyncio.sleep(SECONDS)
    assert len(network.dialled_at) <= 1
