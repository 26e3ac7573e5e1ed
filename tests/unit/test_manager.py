"""S5a: what the pools of one loop dial ahead where a place may be missing."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.clock import in_virtual_time
from tests.unit.pool_kit import no_fault
from xai_pool_patch.manager import PoolManager
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.protocol.request import Request
from xai_pool_patch.sessions.shortage import Shortage


def session(limit: int = 0, limit_per_host: int = 0) -> Any:
    connector = SimpleNamespace(limit=limit, limit_per_host=limit_per_host)
    return SimpleNamespace(closed=False, connector=connector)


def request(of: Any, host: str = "api.x.ai") -> Request:
    return Request(of, (f"wss://{host}/v1/tts",), {}, max_age=math.inf)


def manager(shortage: Shortage, hold: int = 0, closing: int = 0) -> tuple[PoolManager, Request]:
    """One pool that has so many dials and closes under way, as far as the manager knows."""
    pools = PoolManager(
        PoolOptions(warm="always"),
        no_fault,
        shortage_at=lambda host: shortage,
        store=None,
        make_room=lambda: None,
    )
    key = request(session(limit=5, limit_per_host=3))
    pool = pools._make(key)
    pool._dials = set(range(hold))  # type: ignore[arg-type]
    pool._closing = dict.fromkeys(range(closing))  # type: ignore[arg-type]
    return pools, key


def may_dial_ahead(pools: PoolManager, key: Request) -> bool:
    return pools.may_dial_ahead(pools.pools.get(key) or pools._make(key))


def shortage() -> Shortage:
    clock = asyncio.get_running_loop().time
    return Shortage("api.x.ai:443", clock, clock)


@pytest.mark.parametrize(
    ("hold", "closing", "may"), [(0, 0, True), (2, 0, True), (3, 0, False), (1, 2, False)]
)
@in_virtual_time
async def test_a_full_connector_has_no_place_for_a_standby(
    hold: int, closing: int, may: bool
) -> None:
    """The lesser limit counts, and what is closing takes a place until it has gone."""
    pools, key = manager(shortage(), hold, closing)
    assert may_dial_ahead(pools, key) == may


@in_virtual_time
async def test_other_sessions_and_hosts_have_places_of_their_own() -> None:
    pools, key = manager(shortage(), hold=3)
    for other in (request(session(limit=1)), request(key.session, "eu.x.ai")):
        assert may_dial_ahead(pools, other)
    assert not may_dial_ahead(pools, key)


@pytest.mark.parametrize("session", [session(), SimpleNamespace(closed=False, connector=None)])
@in_virtual_time
async def test_without_a_limit_there_is_always_a_place(session: Any) -> None:
    """0 is no limit, and a closed HTTP session has no connector."""
    pools, _ = manager(shortage())
    key = request(session)
    pools._make(key)._dials = set(range(100))  # type: ignore[arg-type]
    assert may_dial_ahead(pools, key)


@pytest.mark.parametrize("closing", [0, 1])
@in_virtual_time
async def test_where_sessions_are_scarce_a_close_comes_first(closing: int) -> None:
    """So that nobody holds more at a time than without the pool."""
    known = shortage()
    pools, key = manager(known, closing=closing)
    pools._watch_of(key.host)
    assert may_dial_ahead(pools, key)
    known.refused(429)
    assert may_dial_ahead(pools, key) == (closing == 0)


@in_virtual_time
async def test_standbys_do_not_take_more_places_than_there_are() -> None:
    """One that waits for a place makes room, and would close the one before, again and again."""
    pools, key = manager(shortage(), hold=2)
    pool, dialled = pools.pools[key], list[object]()
    pool._dial = lambda *_: (dialled.append(1), pool._dials.add(object()))  # type: ignore[assignment,func-returns-value]
    pool._min_size = 7
    pool._top_up()
    assert len(dialled) == 1
