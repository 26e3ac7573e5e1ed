"""What a pool says of itself."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.unit.pool_kit import HANDSHAKE, Network, Wire, idle, leased, now, with_pool
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import (
    LEAN,
    LINGER,
    ON_DEMAND,
    ROOM_LASTS,
    SPARE_IDLE_TIME,
    WARM,
    DialFailedError,
    Mode,
    Pool,
)


@with_pool()
async def test_counts_read_in_another_thread_are_never_negative(pool: Pool[Wire]) -> None:
    """Such a read may come between two changes that belong together."""
    [wire] = await idle(pool, 1)
    entry = pool._entries.pop(wire)
    assert (pool.idle, pool.leased) == (1, 0)
    pool._entries[wire] = entry


@with_pool()
async def test_repr_shows_the_whole_state(pool: Pool[Wire]) -> None:
    """A failing test, or an operator with a debugger, sees every count."""
    pool.resize(1)
    await leased(pool)
    assert repr(pool) == (
        "<Pool warm idle=0 leased=1 clearing=0 connecting=0 waiting=0 closing=0 min_size=1>"
    )
    pool.close()
    assert repr(pool).startswith("<Pool closed idle=0 leased=1 ")


@with_pool()
async def test_repr_says_why_nothing_is_dialled(network: Network, pool: Pool[Wire]) -> None:
    """S5a, P4, S4: no place, a pause, or callers only."""
    network.has_room = False
    pool.resize(1)
    await asyncio.sleep(0.1)
    assert repr(pool).endswith(" min_size=1, no place for a standby>")
    network.has_room, network.refuse = True, [FailureKind.REFUSED]
    pool.settle()
    await asyncio.sleep(HANDSHAKE + 0.01)
    assert re.search(r" min_size=1, next dial in 0\.[45] s>$", repr(pool))
    pool.set_lean(True)
    assert repr(pool).startswith("<Pool lean ")
    assert repr(pool).endswith(" min_size=1>")
    assert await leased(pool)
    for connection in pool.connections:
        pool.give_back(connection, Outcome.FINISHED)
    pool.let_go()
    assert repr(pool).startswith("<Pool on demand ")
    assert repr(pool).endswith(f", dials for callers only for {ROOM_LASTS} s>")


@pytest.mark.parametrize(
    ("mode", "keeps", "spare_closes_after", "is_dialled_ahead"),
    [
        (WARM, 1, SPARE_IDLE_TIME, True),
        (LEAN, 0, LINGER, True),
        (ON_DEMAND, 0, 0.0, False),
    ],
)
@with_pool()
async def test_what_a_pool_keeps_in_each_mode(
    network: Network,
    pool: Pool[Wire],
    mode: Mode,
    keeps: int,
    spare_closes_after: float,
    is_dialled_ahead: bool,
) -> None:
    """S1, S4: the standby, what is not needed, and what a reply that comes next will find."""
    pool.resize(1)
    pool.set_lean(mode is not WARM)
    wires = await asyncio.gather(leased(pool), leased(pool))
    if mode is ON_DEMAND:
        network.refuse = [FailureKind.REFUSED]
        with pytest.raises(DialFailedError):
            await pool.acquire(1.0)
    assert pool.mode is mode
    for wire in wires:
        pool.give_back(wire, Outcome.FINISHED)
    given_back_at = now()
    await asyncio.sleep(30.0)
    assert pool.mode is mode
    assert pool.idle == keeps
    assert wires[0].closed_at == pytest.approx(given_back_at + spare_closes_after)
    pool.expect("Ann", now() + 5.0)
    pool.expect("Bob", now() + 5.0)
    await asyncio.sleep(1.0)
    assert pool.idle == (2 if is_dialled_ahead else 0)
