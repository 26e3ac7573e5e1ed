"""S3, S3b: how the pools of one event loop hear of refusals, and of nobody."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.clock import in_virtual_time
from tests.kit import event_of
from tests.unit.pool_kit import no_fault
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.shortage import Shortage
from xai_pool_patch.sessions.watch import ShortageWatch

HOST = "api.x.ai"


class Shelf(Store):
    """A store whose failures are chosen. Its clock is that of the event loop."""

    name = "shelf"

    def __init__(self) -> None:
        self.until: float | None = None
        self.fails: dict[str, Exception] = {}
        """By operation."""
        self.hangs: set[str] = set()
        self.reads: list[float] = []
        self.writes: list[float] = []
        self.probes = 0

    async def read(self, host: str) -> float | None:
        assert host == HOST
        self.reads.append(asyncio.get_running_loop().time())
        await self._do("read")
        return self.until

    async def write(self, host: str, until: float) -> None:
        assert host == HOST
        await self._do("write")
        self.writes.append(until)
        self.until = until

    async def probe(self, host: str) -> None:
        assert host == HOST
        await self._do("probe")
        self.probes += 1

    async def _do(self, operation: str) -> None:
        await asyncio.sleep(0.01)
        if operation in self.hangs:
            await asyncio.Event().wait()
        if operation in self.fails:
            raise self.fails[operation]


class Process:
    """One process in virtual time, with one event loop."""

    def __init__(self, store: Store | None, seed: int = 1) -> None:
        self.loop = asyncio.get_running_loop()
        uniform = random.Random(seed).uniform
        self.shortage = Shortage(HOST, self.loop.time, self.loop.time, uniform)
        self.has_idle = True
        self.changes: list[tuple[bool, bool]] = []
        """Whether it was on, and lean, after each change."""
        self.watch = ShortageWatch(
            self.shortage,
            store,
            supervisor=Supervisor(no_fault),
            on_change=self._changed,
            wants_to_know=lambda: self.has_idle,
        )

    def _changed(self) -> None:
        self.changes.append((self.shortage.is_on, self.watch.is_lean))

    async def go_on(self, seconds: float) -> None:
        """Begin, if that has not happened, and let time pass."""
        self.watch.begin()
        await asyncio.sleep(seconds)

    async def end(self) -> None:
        self.watch.end()
        await asyncio.sleep(0.1)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since the last call: the event, the store and the operation."""
    caplog.set_level(logging.DEBUG, "xai_pool_patch")

    def take() -> list[str]:
        lines = []
        for record in caplog.records:
            of = [getattr(record, f"xai_pool_{n}", "") for n in ("store", "operation", "reason")]
            lines.append(" ".join([event_of(record), *filter(None, of)]))
        caplog.clear()
        return lines

    return take


@in_virtual_time
async def test_a_healthy_store_makes_nobody_lean(logged: Callable[[], list[str]]) -> None:
    """Not for a moment: the first turn is warm already."""
    process = Process(Shelf())
    assert not process.watch.is_lean
    await process.go_on(300.0)
    assert (process.watch.is_lean, process.changes, logged()) == (False, [], [])
    await process.end()


@in_virtual_time
async def test_the_store_is_asked_about_once_a_second() -> None:
    """By a process that has something to let go of, and at no fixed beat."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(600.0)
    assert 400 <= len(shelf.reads) <= 750
    pauses = [later - sooner for sooner, later in zip(shelf.reads, shelf.reads[1:], strict=False)]
    assert 0.8 <= min(pauses) < 0.9
    assert 1.3 < max(pauses) <= 1.4
    assert shelf.probes == 1
    await process.end()


@in_virtual_time
async def test_who_holds_nothing_asks_nothing() -> None:
    """After the first look, which says whether others can be heard at all."""
    shelf = Shelf()
    process = Process(shelf)
    process.has_idle = False
    await process.go_on(60.0)
    assert len(shelf.reads) == 1
    process.has_idle = True
    await process.go_on(1.5)
    assert len(shelf.reads) >= 2
    await process.end()


@in_virtual_time
async def test_a_refusal_goes_from_one_process_to_another(
    logged: Callable[[], list[str]],
) -> None:
    """At once to the own pools, and within a look to the others. It ends for both."""
    shelf = Shelf()
    process, other = Process(shelf, 1), Process(shelf, 2)
    await process.go_on(5.0)
    await other.go_on(5.0)
    process.watch.refused(429)
    assert (process.watch.is_lean, process.changes) == (True, [(True, True)])
    await asyncio.sleep(0.05)
    assert len(shelf.writes) == 1
    await asyncio.sleep(1.45)
    assert (other.watch.is_lean, other.changes) == (True, [(True, True)])
    assert len(shelf.writes) == 1, "what was heard is not passed on"
    assert logged() == [
        "sessions scarce a refusal to this process",
        "sessions scarce a refusal to another process",
    ]
    await asyncio.sleep(100.0)
    assert process.watch.is_lean
    await asyncio.sleep(65.0)
    assert process.changes == other.changes == [(True, True), (False, False)]
    assert logged() == ["sessions suffice"] * 2
    await process.end()
    await other.end()


@in_virtual_time
async def test_two_loops_of_one_process() -> None:
    """They share what they know; the other one's pools hear of it at their next tick."""
    process = Process(Shelf())
    process.has_idle = False
    other_changes: list[bool] = []
    other = ShortageWatch(
        process.shortage,
        Shelf(),
        supervisor=Supervisor(no_fault),
        on_change=lambda: other_changes.append(other.is_lean),
        wants_to_know=lambda: False,
    )
    other.begin()
    await process.go_on(5.0)
    process.watch.refused(429)
    assert other.is_lean
    await asyncio.sleep(1.5)
    assert other_changes == [True]
    other.end()
    await process.end()


@in_virtual_time
async def test_others_are_refused_again_and_again() -> None:
    """Who is lean looks on, and does not come back while others are refused."""
    shelf = Shelf()
    process = Process(shelf)
    process.has_idle = False
    process.watch.refused(429)
    for _ in range(10):
        await process.go_on(60.0)
        shelf.until = process.loop.time() + 110.0
        assert process.watch.is_lean
    assert process.changes == [(True, True)]
    await process.go_on(150.0)
    assert process.changes == [(True, True), (False, False)]
    await process.end()


@in_virtual_time
async def test_refusals_one_after_the_other() -> None:
    """A thousand make few writes."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(1.0)
    for _ in range(1000):
        process.watch.refused(429)
        await asyncio.sleep(0.05)
    assert 2 <= len(shelf.writes) <= 16
    assert process.changes == [(True, True)]
    await process.end()


FAILURES = [("read", "read"), ("probe", "write")]
"""What fails, and what the log calls it."""


@pytest.mark.parametrize(("fails", "named"), FAILURES)
@in_virtual_time
async def test_who_cannot_be_sure_to_be_heard_is_lean(
    fails: str, named: str, logged: Callable[[], list[str]]
) -> None:
    """From the first look on until one succeeds. It is logged once each."""
    shelf = Shelf()
    shelf.fails[fails] = OSError()
    process = Process(shelf)
    await process.go_on(0.1)
    assert (process.watch.is_lean, process.changes) == (True, [(False, True)])
    await process.go_on(600.0)
    assert logged() == [f"session store failed shelf {named}"]
    shelf.fails.clear()
    await process.go_on(62.0)
    assert (process.watch.is_lean, process.changes) == (False, [(False, True), (False, False)])
    assert logged() == ["session store works again shelf"]
    await process.end()


@pytest.mark.parametrize(("hangs", "named"), FAILURES)
@in_virtual_time
async def test_a_store_that_hangs(hangs: str, named: str, logged: Callable[[], list[str]]) -> None:
    """Counts as healthy for a second at most."""
    shelf = Shelf()
    shelf.hangs.add(hangs)
    process = Process(shelf)
    await process.go_on(0.95)
    assert not process.watch.is_lean
    await process.go_on(0.1)
    assert process.watch.is_lean
    assert logged() == [f"session store failed shelf {named}"]
    await process.end()


@in_virtual_time
async def test_one_look_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, and whatever happens meanwhile."""
    monkeypatch.setattr("xai_pool_patch.sessions.watch.TIMEOUT", 60.0)
    shelf = Shelf()
    shelf.hangs.add("read")
    process = Process(shelf)
    await process.go_on(10.0)
    process.watch.refused(429)
    await process.go_on(10.0)
    assert len(shelf.reads) == 1
    await process.end()


@in_virtual_time
async def test_a_store_that_fails_is_asked_less_and_less() -> None:
    """After a second, and then up to a minute."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(10.0)
    shelf.fails["read"] = ConnectionError()
    before = len(shelf.reads)
    await process.go_on(600.0)
    pauses = [b - a for a, b in zip(shelf.reads[before:], shelf.reads[before + 1 :], strict=False)]
    assert 10 <= len(pauses) <= 20
    assert pauses[0] < 2.5
    assert 48.0 <= max(pauses) <= 61.5
    shelf.fails.clear()
    await process.go_on(62.0)
    before = len(shelf.reads)
    await process.go_on(10.0)
    assert len(shelf.reads) - before >= 7
    await process.end()


@in_virtual_time
async def test_it_can_be_read_again_but_not_written() -> None:
    """That is not enough."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(10.0)
    shelf.fails["read"] = ConnectionError()
    await process.go_on(10.0)
    shelf.fails = {"probe": OSError("read-only")}
    await process.go_on(300.0)
    assert process.watch.is_lean
    await process.end()


@in_virtual_time
async def test_a_refusal_that_could_not_be_written_is_written_later(
    logged: Callable[[], list[str]],
) -> None:
    """As long as it lasts, and once."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(10.0)
    shelf.fails["write"] = OSError()
    process.watch.refused(429)
    end = process.shortage.news_for(None)
    await process.go_on(10.0)
    assert logged() == [
        "sessions scarce a refusal to this process",
        "session store failed shelf write",
    ]
    assert shelf.writes == []
    shelf.fails.clear()
    await process.go_on(60.0)
    assert shelf.writes == [pytest.approx(end)]
    await process.go_on(300.0)

    shelf.fails["write"] = OSError()
    process.watch.refused(429)
    await process.go_on(300.0)
    shelf.fails.clear()
    await process.go_on(100.0)
    assert len(shelf.writes) == 1, "a store that comes back too late gets no old end"
    assert not process.watch.is_lean
    await process.end()


@in_virtual_time
async def test_a_store_that_forgets_is_told_again() -> None:
    """A Redis that was started again is empty."""
    shelf = Shelf()
    process = Process(shelf)
    await process.go_on(10.0)
    process.watch.refused(429)
    await process.go_on(10.0)
    shelf.until = None
    await process.go_on(10.0)
    assert len(shelf.writes) == 2
    assert shelf.writes[0] == pytest.approx(shelf.writes[1])
    await process.end()


@in_virtual_time
async def test_without_a_store(logged: Callable[[], list[str]]) -> None:
    """It is lean for ever, says so when asked, and logs no failure."""
    process = Process(None)
    assert process.watch.is_lean
    await process.go_on(60.0)
    process.watch.refused(429)
    await process.go_on(60.0)
    assert process.watch.is_lean
    await process.go_on(120.0)
    assert process.watch.is_lean
    assert logged() == ["sessions scarce a refusal to this process", "sessions suffice"]
    await process.end()


@pytest.mark.parametrize("nonsense", ["text", (1.0, 2.0), b"17"])
@in_virtual_time
async def test_a_store_that_answers_with_something_else(nonsense: Any) -> None:
    """It counts as one that cannot be read."""
    shelf = Shelf()
    shelf.until = nonsense
    process = Process(shelf)
    await process.go_on(1.0)
    assert process.watch.is_lean
    await process.end()


@in_virtual_time
async def test_no_secret_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An error's message may quote the URL, and with it the password: only its type is logged."""
    shelf = Shelf()
    shelf.fails["read"] = ConnectionError("redis://:secret@host")
    process = Process(shelf)
    await process.go_on(1.0)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.xai_pool_error.startswith("ConnectionError at ")  # type: ignore[attr-defined]
    assert "secret" not in str(vars(record))
    await process.end()


@in_virtual_time
async def test_it_begins_once_and_ends_in_the_middle_of_a_look() -> None:
    """The look ends at once, and counts as no failure. Then it begins again."""
    shelf = Shelf()
    process = Process(shelf)
    process.watch.begin()
    await process.go_on(10.0)
    assert len(shelf.reads) <= 13
    shelf.hangs.add("read")
    await process.go_on(1.41)
    await process.end()
    reads = len(shelf.reads)
    await asyncio.sleep(60.0)
    assert (len(shelf.reads), process.watch.is_lean) == (reads, False)
    shelf.hangs.clear()
    await process.go_on(10.0)
    assert len(shelf.reads) - reads >= 7
    await process.end()
    process.watch.end()
