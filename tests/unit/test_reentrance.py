"""A log handler that runs the event loop again, as nest_asyncio lets an application do.

It meets the pool in the middle of whatever logs. So the pool must log when its state is whole.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.clock import in_virtual_time
from tests.reentrant import log_that_runs_the_loop
from tests.unit.pool_kit import HANDSHAKE, Network, Wire, close_all, idle, leased, make_pool
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import Pool


async def call(pool: Pool[Wire], name: str, turns: int, chance: random.Random) -> int:
    """One caller's turns, some of which end badly; how many got a connection."""
    served = 0
    for _ in range(turns):
        pool.expect(name, asyncio.get_running_loop().time() + 2.0)
        wire = (await pool.acquire(10.0, caller=name)).connection
        assert wire.is_open
        served += 1
        await asyncio.sleep(chance.choice([0.0, 0.1, 0.5]))
        how = chance.choice(["release", "release", "cut off", "discard", "lost"])
        if how == "release":
            pool.give_back(wire, Outcome.FINISHED)
        elif how == "cut off":
            pool.give_back(wire, Outcome.INTERRUPTED)
        elif how == "discard":
            pool.give_back(wire, Outcome.FAILED)
        else:
            wire.break_off()
            pool.give_back(wire, Outcome.FAILED)
        await asyncio.sleep(chance.choice([0.0, 0.0, 0.2, 6.0]))
    return served


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("handshake", [0.0, 0.45])
@pytest.mark.parametrize("warm", ["always", "reply"])
def test_a_handler_that_runs_the_loop_costs_no_turn(warm: str, handshake: float, seed: int) -> None:
    """Every caller gets a connection of its own at every turn, and nothing raises."""

    @in_virtual_time
    async def run() -> None:
        chance = random.Random(seed)
        network = Network(handshake=handshake)
        pool = make_pool(network, PoolOptions(warm=warm))  # type: ignore[arg-type]
        pool.set_lean(warm == "reply")
        pool.resize(1)
        calls = [call(pool, name, 60, chance) for name in ("Ann", "Bob", "Cem", "Dee")]
        assert await asyncio.gather(*calls) == [60] * 4
        assert pool.leased == 0
        await close_all(network, pool)

    with log_that_runs_the_loop() as handler:
        run()
    assert handler.callbacks > 0, "it ran nothing"


EMPTIED_BY: dict[str, Callable[[Pool[Wire], Wire], object]] = {
    "evicted": lambda pool, wire: pool.evict(wire, listen=False, with_others=True),
    "lean": lambda pool, wire: pool.set_lean(True),
    "room is made": lambda pool, wire: pool.let_go(),
    "expired": lambda pool, wire: None,
}


@pytest.mark.parametrize("by", list(EMPTIED_BY))
def test_who_asks_while_idle_connections_close_gets_one_that_stays(by: str) -> None:
    """The log of the first close lets callers run: none gets a connection that closes next."""

    @in_virtual_time
    async def run() -> None:
        network = Network()
        pool = make_pool(network, PoolOptions(max_idle_time=3.0))
        pool.resize(1)
        used, *_ = await idle(pool, 4)
        if by == "evicted":
            used = await leased(pool)
        callers = []

        def ask() -> None:
            callers.extend(asyncio.ensure_future(leased(pool)) for _ in range(2))

        if by == "expired":
            # As ready as the timer that ends them: it was set before.
            asyncio.get_running_loop().call_later(3.0, ask)
        else:
            ask()
        EMPTIED_BY[by](pool, used)
        await asyncio.sleep(3.0 + 2 * HANDSHAKE)
        wires = [caller.result() for caller in callers]
        assert len({wire.number for wire in wires}) == 2
        assert all(wire.is_open for wire in wires)
        for wire in wires:
            pool.give_back(wire, Outcome.FINISHED)
        await close_all(network, pool)

    with log_that_runs_the_loop():
        run()
