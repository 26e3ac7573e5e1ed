"""The questions that are asked by name, of servers of each temperament."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.probe.kit import HASTY, SHORT, ask, serving_both
from xai_pool_patch.probe import by_name
from xai_pool_patch.probe.question import Verdict
from xai_pool_patch.testing import End, Ending, Refusal

pytestmark = pytest.mark.asyncio

SO, OTHERWISE, UNKNOWN = Verdict.AS_SUPPOSED, Verdict.OTHERWISE, Verdict.UNKNOWN

IDLE = [
    ({}, SO, "usable after 1.", set()),
    ({"ping_interval": 0.1}, SO, "PINGs of the service", set()),
    ({"idle_limit": 0.2, "ending": Ending.CLOSE}, OTHERWISE, "with a Close frame 1000 after 0.",
     {"max_age"}),
    ({"idle_limit": 0.2, "ending": Ending.RESET}, OTHERWISE, "without a Close frame after 0.",
     {"max_age"}),
    ({"idle_limit": 0.2, "ending": Ending.SILENT}, OTHERWISE, "no sign of life after 0.",
     {"max_age"}),
    ({"idle_death": 0.2}, OTHERWISE, "PINGs are answered and a text is not", {"max_age"}),
]  # fmt: skip


@pytest.mark.parametrize(("behaviour", "verdict", "found", "advises"), IDLE)
async def test_an_idle_connection(
    behaviour: dict[str, Any], verdict: Verdict, found: str, advises: set[str]
) -> None:
    """Whether it can be used, how it ended and when, and what helps."""
    answer = await ask(by_name.idle(1.0), HASTY, **behaviour)
    assert answer.verdict is verdict, answer
    assert found in answer.found.partition("with PINGs")[2]
    assert set(answer.advises) == advises
    if "max_age" in advises:
        assert 0.1 < answer.advises["max_age"] < answer.measured["with_pings_s"]
        # By PINGs a session that is dead behind an edge lives to the end.
        assert (answer.measured["with_pings_s"] < 1.0) is ("idle_death" not in behaviour)


async def test_a_connection_that_needs_pings() -> None:
    """One that is dropped without them, and kept with them, needs them often enough."""
    alive = by_name._Fate(usable=True, lived=600.0, answers_pings=True, found="")
    for lived, advised in ((30.0, {"heartbeat": 10.0}), (300.0, {})):
        left = replace(alive, usable=False, lived=lived)
        assert by_name._for_idle(600.0, left, alive) == advised


async def test_the_deadline() -> None:
    """It is counted from the opening, whether a connection is used or not."""
    timing = replace(SHORT, deadline=2.0)
    answer = await ask(by_name.DEADLINE, timing, deadline=2.0)
    assert answer.verdict is SO, answer
    assert "counted from the opening" in answer.found
    assert set(answer.measured) == {"unused_s", "used_once_s", "used_often_s"}


async def test_an_early_deadline() -> None:
    """`max_age` has to be below it."""
    answer = await ask(by_name.DEADLINE, replace(SHORT, deadline=2.0), deadline=1.0)
    assert answer.verdict is OTHERWISE, answer
    assert 0.5 < answer.advises["max_age"] < 1.0


async def test_a_deadline_that_use_puts_off() -> None:
    """A server that drops what has been idle for long has none for the others."""
    timing = replace(SHORT, deadline=2.0)
    answer = await ask(by_name.DEADLINE, timing, idle_limit=1.0)
    assert answer.verdict is OTHERWISE, answer
    assert "not counted from the opening" in answer.found
    assert "used often: no end" in answer.found


async def test_no_deadline() -> None:
    """Is otherwise, and no reason for another option."""
    answer = await ask(by_name.DEADLINE, replace(SHORT, deadline=0.3))
    assert (answer.verdict, answer.advises) == (OTHERWISE, {})
    assert "no end" in answer.found


LIMITS = [
    ({"retry_after": 7}, SO, "refused with HTTP 429, Retry-After: 7", {"warm": "auto"}),
    ({}, SO, "A Close freed a session at once", {"warm": "auto"}),
    ({"refusal": Refusal.UNAVAILABLE}, OTHERWISE, "refused with HTTP 503", {"warm": "reply"}),
    ({"refusal": Refusal.ERROR_FRAME}, OTHERWISE, "error: concurrent session limit reached",
     {"warm": "auto"}),
    ({"close_frees_after": 1.5}, OTHERWISE, "A Close freed a session after",
     {"warm": "auto", "interruption": "clear"}),
]  # fmt: skip


@pytest.mark.parametrize(("behaviour", "verdict", "found", "advises"), LIMITS)
async def test_a_limit_of_sessions(
    behaviour: dict[str, Any], verdict: Verdict, found: str, advises: dict[str, str]
) -> None:
    """How many there are, what a refusal looks like, and how soon one is free."""
    async with serving_both(max_sessions=2, **behaviour) as (service, server):
        answer = await by_name.sessions(5).ask(service)
        await server.wait_for(lambda server: server.open_count == 0)
        assert service.characters == 0
    assert answer.verdict is verdict, answer
    assert "2 were open when the next was refused" in answer.found
    assert found in answer.found
    assert answer.advises == advises
    assert answer.measured["sessions"] == 2
    lost = [each for each in server.connections if each.ended is End.CLIENT_DROPPED]
    assert len(lost) == 1


async def test_a_session_that_is_freed_late() -> None:
    """The time is that from the Close to the next connection."""
    answer = await ask(by_name.sessions(5), max_sessions=2, close_frees_after=1.5)
    assert answer.measured["close_frees_s"] >= 0.5


async def test_a_session_that_is_never_freed() -> None:
    """Is said after the longest time."""
    timing = replace(SHORT, frees=0.3)
    answer = await ask(by_name.sessions(5), timing, max_sessions=2, close_frees_after=60.0)
    assert "A Close freed no session" in answer.found
    assert answer.verdict is OTHERWISE


async def test_idle_connections_are_free() -> None:
    """Only utterances are limited, so any number may be kept warm."""
    answer = await ask(by_name.sessions(4), max_utterances=2, generation=0.2)
    assert answer.verdict is OTHERWISE
    assert "4 idle connections were open and none was refused" in answer.found
    assert "of 4 utterances at once 2 failed: error: too many concurrent requests" in answer.found
    assert answer.advises == {"warm": "always"}


async def test_a_limit_that_is_not_reached() -> None:
    """Cannot be known, and stops at the number that was given."""
    async with serving_both(max_sessions=9) as (service, server):
        answer = await by_name.sessions(3).ask(service)
        assert service.characters == by_name.sessions(3).characters
        assert server.peak_open == 3
    assert (answer.verdict, answer.advises) == (UNKNOWN, {})
    assert "ask with more" in answer.found


async def test_no_session_was_free() -> None:
    """The other calls of the team have them all."""
    answer = await ask(by_name.sessions(3), max_sessions=0)
    assert answer.verdict is UNKNOWN
    assert "HTTP 429" in answer.found


async def test_closes_what_it_opened_when_it_is_stopped() -> None:
    """With a Close frame each, the connection being dialled included."""
    async with serving_both(max_sessions=9, handshake_delay=0.1) as (service, server):
        asking = asyncio.ensure_future(by_name.sessions(9).ask(service))
        await server.wait_for(lambda server: len(server.handshakes) == 3)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
    assert [each.ended for each in server.connections] == [End.CLIENT_CLOSE] * 3
