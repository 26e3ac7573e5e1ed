"""What a pool says of itself."""

from __future__ import annotations

from tests.unit.pool_kit import Wire, idle, leased, with_pool
from xai_pool_patch.pool.pool import Pool


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
        "<Pool open idle=0 leased=1 clearing=0 connecting=0 waiting=0 closing=0 min_size=1>"
    )
    pool.close()
    assert repr(pool).startswith("<Pool closed idle=0 leased=1 ")
