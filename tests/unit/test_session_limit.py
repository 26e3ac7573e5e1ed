"""S3, S6: how long sessions count as scarce, and how stores that fail are asked."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.virtual import in_virtual_time
from xai_pool_patch.mark import Mark
from xai_pool_patch.sessions.limit import SessionLimit, SharedMarks, digest_of

FIRST = (108.0, 132.0)
"""Two minutes, a tenth shorter or longer."""


class Clock:
    """The time of one machine. Its wall clock can be set; its monotonic clock cannot."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.wall_minus_now = 1.7e9

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_minus_now

    def limit(self, seed: int = 1) -> SessionLimit:
        return SessionLimit(self.monotonic, self.wall, random.Random(seed))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(limit: SessionLimit) -> Mark:
    mark = limit.refused()
    assert mark is not None
    return mark


def test_without_a_refusal(clock: Clock) -> None:
    """Nothing is scarce, and nothing has been."""
    limit = clock.limit()
    assert not limit.is_reached
    assert (limit.seconds_left, limit.until, limit.source) == (0.0, -math.inf, "")


def test_one_refusal(clock: Clock) -> None:
    """The key is scarce for two minutes and a share; what is published says two minutes."""
    limit = clock.limit()
    mark = refused(limit)
    assert FIRST[0] <= mark.length <= FIRST[1]
    assert mark.until == pytest.approx(clock.wall() + mark.length)
    assert limit.is_reached
    assert limit.source == "this process"
    assert mark.length <= limit.seconds_left <= mark.length * 1.25
    assert limit.seconds_left == pytest.approx(limit.until - clock.now)
    clock.now = limit.until - 0.1
    assert limit.is_reached
    clock.now = limit.until
    assert not limit.is_reached
    assert limit.seconds_left == 0.0


def test_the_marks_of_many_processes(clock: Clock) -> None:
    """They do not end together, even if nobody hears of the others'."""
    lengths = {refused(clock.limit(seed)).length for seed in range(100)}
    assert min(lengths) < 111.0
    assert max(lengths) > 129.0


def test_a_thousand_refusals(clock: Clock) -> None:
    """They make one mark, and one more once half of it has passed, without doubling."""
    limit = clock.limit()
    mark = refused(limit)
    until = limit.until
    for _ in range(1000):
        assert limit.refused() is None
    assert limit.until == until
    clock.now += mark.length / 2 + 0.1
    prolonged = refused(limit)
    assert prolonged.length == mark.length
    assert prolonged.until == pytest.approx(clock.wall() + mark.length)
    assert limit.seconds_left >= mark.length
    assert limit.refused() is None


@pytest.mark.parametrize("pause", [0.0, 299.0])
def test_it_recurs(clock: Clock, pause: float) -> None:
    """Within five minutes of its end it is twice as long each time, half an hour at most."""
    limit = clock.limit()
    lengths = [refused(limit).length]
    for _ in range(8):
        clock.now = limit.until + pause
        lengths.append(refused(limit).length)
    assert lengths[1:] == [min(2 * length, 1800.0) for length in lengths[:-1]]
    assert lengths[-1] == 1800.0


def test_it_recurs_while_others_dial_already(clock: Clock) -> None:
    """The mark has ended for others, not for this process, whose share is longer: it recurs."""
    limit = clock.limit()
    mark = refused(limit)
    clock.now += mark.length + 0.01
    assert limit.is_reached
    assert refused(limit).length == 2 * mark.length


def test_it_comes_again_later(clock: Clock) -> None:
    """After five minutes without a refusal it starts at two minutes again."""
    limit = clock.limit()
    refused(limit)
    clock.now = limit.until
    refused(limit)
    clock.now = limit.until + 301.0
    assert FIRST[0] <= refused(limit).length <= FIRST[1]


def test_the_shares_of_many_processes(clock: Clock) -> None:
    """Those that saw one mark come back one by one, over a quarter of its length."""
    mark = Mark(clock.wall() + 100.0, 120.0)
    limits = [clock.limit(seed) for seed in range(400)]
    for limit in limits:
        limit.learn(mark, "machine")
    shares = sorted(limit.until - clock.now - 100.0 for limit in limits)
    assert shares[0] >= 0.0
    assert shares[-1] <= 30.0
    most_in_a_second = max(sum(t <= s < t + 1 for s in shares) for t in range(30))
    assert most_in_a_second < 30, "13 on average"


def test_a_mark_of_others(clock: Clock) -> None:
    """It counts as one's own does. The share is drawn once, however often the mark is seen."""
    limit = clock.limit()
    mark = Mark(clock.wall() + 50.0, 120.0)
    limit.learn(mark, "redis")
    assert (limit.is_reached, limit.source) == (True, "redis")
    until = limit.until
    assert 50.0 <= until - clock.now <= 80.0
    clock.now += 10.0
    limit.learn(mark, "redis")
    limit.learn(Mark(mark.until + 0.001, mark.length), "machine")
    assert (limit.until, limit.source) == (until, "redis")
    clock.now = until
    assert refused(limit).length == 240.0


def test_a_longer_mark_of_others(clock: Clock) -> None:
    """The later end counts, whoever it is from; an earlier one shortens nothing."""
    limit = clock.limit()
    refused(limit)
    limit.learn(Mark(clock.wall() + 600.0, 900.0), "machine")
    assert limit.source == "machine"
    assert 600.0 <= limit.seconds_left <= 825.0
    until = limit.until
    limit.learn(Mark(clock.wall() + 5.0, 120.0), "redis")
    assert (limit.until, limit.source) == (until, "machine")


@pytest.mark.parametrize(
    ("ahead", "length"),
    [
        (math.nan, 120.0),
        (100.0, math.nan),
        (math.inf, 120.0),
        (100.0, math.inf),
        (-math.inf, 120.0),
        (100.0, -120.0),
        (100.0, 0.0),
        (2401.0, 1800.0),
        (100.0, 1e9),
        (-301.0, 120.0),
    ],
)
def test_nonsense(clock: Clock, ahead: float, length: float) -> None:
    """It marks nothing, changes no mark, and makes no refusal's mark longer."""
    nonsense = Mark(clock.wall() + ahead, length)
    limit = clock.limit()
    limit.learn(nonsense, "redis")
    assert not limit.is_reached
    mark = refused(limit)
    until = limit.until
    limit.learn(nonsense, "redis")
    assert limit.reconcile(mark, nonsense) == mark
    assert (limit.until, limit.source) == (until, "this process")
    assert FIRST[0] <= mark.length <= FIRST[1]


@pytest.mark.parametrize("jump", [-86400.0, -3600.0, -60.0, 60.0, 3600.0, 86400.0])
def test_a_clock_that_jumps(clock: Clock, jump: float) -> None:
    """What a process knows ends when it would have, and nothing lasts for longer than its length.

    A process that starts after the jump sees the mark end at another time, or no mark.
    """
    limit = clock.limit()
    own = refused(limit)
    limit.learn(own, "machine")
    until = limit.until
    clock.wall_minus_now += jump
    newcomer = clock.limit()
    newcomer.learn(own, "machine")
    assert newcomer.seconds_left <= 1.25 * own.length
    while clock.now < until:
        limit.learn(own, "machine")
        assert limit.is_reached
        clock.now += 1.0
    limit.learn(own, "machine")
    assert not limit.is_reached
    clock.now += 1.25 * own.length
    newcomer.learn(own, "machine")
    assert not newcomer.is_reached


def test_a_mark_that_ended_before_this_process_began(clock: Clock) -> None:
    """A refusal of a process that knows nothing makes a mark as long as if it had known."""
    limit = clock.limit()
    mark = refused(limit)
    ended = Mark(clock.wall() - 200.0, 480.0)
    renewed = limit.reconcile(mark, ended)
    assert renewed == Mark(pytest.approx(clock.wall() + 960.0), 960.0)
    assert limit.seconds_left >= 960.0
    assert limit.reconcile(renewed, ended) == renewed


def test_a_mark_that_others_have_left_already(clock: Clock) -> None:
    """It is not written again, unless less than half of it is left; doubling is for recurrences."""
    limit = clock.limit()
    mark = refused(limit)
    assert limit.reconcile(mark, None) == mark
    assert limit.reconcile(mark, Mark(clock.wall() + 110.0, 120.0)) is None
    renewed = limit.reconcile(mark, Mark(clock.wall() + 200.0, 480.0))
    assert renewed == Mark(pytest.approx(clock.wall() + 480.0), 480.0)


def test_a_digest_says_nothing_of_its_key() -> None:
    """The same for the same key, another for another key, and fit for a file's name."""
    assert digest_of("xai-secret") == digest_of("xai-secret")
    assert digest_of("xai-secret") != digest_of("xai-secret2")
    assert len(digest_of("")) == 32
    assert digest_of("xai-secret").isalnum()


class Shelf:
    """A store whose failures are chosen. The marks are those of `clock`'s wall."""

    interval = 1.0

    def __init__(self, name: str = "shelf") -> None:
        self.name = name
        self.mark: Mark | None = None
        self.read_fails: Exception | None = None
        self.write_fails: Exception | None = None
        self.hangs = False
        self.reads = 0
        self.writes: list[Mark] = []

    async def read(self, digest: str) -> Mark | None:
        self.reads += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.read_fails is not None:
            raise self.read_fails
        return self.mark

    async def write(self, digest: str, mark: Mark) -> None:
        if self.write_fails is not None:
            raise self.write_fails
        self.writes.append(mark)
        self.mark = mark

    async def aclose(self) -> None: ...


class World:
    """A process in virtual time: its limit, and the marks that it shares."""

    def __init__(self, *stores: Any) -> None:
        loop = asyncio.get_running_loop()
        self.limit = SessionLimit(loop.time, loop.time, random.Random(2))
        self.marks = SharedMarks("digest", self.limit, stores, random.Random(1))

    async def look_for(self, seconds: float) -> None:
        """As `PoolManager` does while something idles: several times a second."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            await self.marks.look()
            await asyncio.sleep(0.25)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since the last call: the event, the store and the operation."""
    caplog.set_level(logging.DEBUG, "xai_pool_patch")

    def take() -> list[str]:
        lines = [
            f"{r.message}: {r.xai_pool_operation} {r.xai_pool_store}"  # type: ignore[attr-defined]
            for r in caplog.records
        ]
        caplog.clear()
        return lines

    return take


@in_virtual_time
async def test_a_store_is_asked_once_in_its_interval() -> None:
    """However often the pools look: they do at each connection that is given back."""
    shelf = Shelf()
    world = World(shelf)
    await world.look_for(60.0)
    assert 60 <= shelf.reads <= 81


@in_virtual_time
async def test_a_mark_goes_from_one_process_to_another() -> None:
    """Through each store, and a store that has it already is not written to."""
    shelf, other = Shelf(), Shelf("other")
    world = World(shelf, other)
    await world.marks.publish(refused(world.limit))
    assert [len(shelf.writes), len(other.writes)] == [1, 1]
    neighbour = World(other)
    await neighbour.look_for(0.1)
    assert (neighbour.limit.is_reached, neighbour.limit.source) == (True, "other")
    unknowing = World(shelf)
    await unknowing.marks.publish(refused(unknowing.limit))
    assert len(shelf.writes) == 1


@in_virtual_time
async def test_doubling_by_what_others_marked() -> None:
    """A process that starts after a mark's end finds it in the store, and doubles it."""
    shelf = Shelf()
    world = World(shelf)
    shelf.mark = Mark(asyncio.get_running_loop().time() - 100.0, 240.0)
    mark = refused(world.limit)
    await world.marks.publish(mark)
    assert [each.length for each in shelf.writes] == [480.0]
    assert world.limit.seconds_left >= 480.0


@in_virtual_time
async def test_a_store_that_fails_is_asked_less_and_less(logged: Callable[[], list[str]]) -> None:
    """It is logged once, asked again after a second and then up to a minute, and once more logged
    when it works. Meanwhile the other store serves."""
    broken, sound = Shelf("broken"), Shelf("sound")
    world = World(broken, sound)
    broken.read_fails = ConnectionError("redis://:secret@host")
    await world.look_for(600.0)
    assert 10 <= broken.reads <= 20
    assert sound.reads >= 550
    assert logged() == ["mark store failed: read broken"]
    broken.read_fails = None
    await world.look_for(61.0)
    assert logged() == ["mark store works again: read broken"]
    reads = broken.reads
    await world.look_for(10.0)
    assert broken.reads - reads >= 8


@in_virtual_time
async def test_calls_that_fail_at_once_count_once(logged: Callable[[], list[str]]) -> None:
    """Fifty connections given back at once must not delay the next attempt by a minute."""
    shelf = Shelf()
    world = World(shelf)
    shelf.read_fails = OSError()
    mark = refused(world.limit)
    publishes = [world.marks.publish(mark) for _ in range(50)]
    shelf.hangs = True
    await asyncio.gather(*publishes)
    shelf.hangs, shelf.read_fails = False, None
    await world.look_for(2.0)
    assert logged() == ["mark store failed: read shelf", "mark store works again: read shelf"]


@in_virtual_time
async def test_no_secret_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An error's message may quote the URL, and with it the password: only its type is logged."""
    shelf = Shelf()
    world = World(shelf)
    shelf.read_fails = ConnectionError("redis://:secret@host")
    await world.look_for(1.0)
    [record] = caplog.records
    assert record.xai_pool_error.startswith("ConnectionError at ")  # type: ignore[attr-defined]
    assert "secret" not in str(vars(record))


@in_virtual_time
async def test_a_store_that_hangs_delays_no_other() -> None:
    """What the other knows is known at once; a look lasts for a second at most."""
    slow, quick = Shelf("slow"), Shelf("quick")
    world = World(slow, quick)
    slow.hangs = True
    loop = asyncio.get_running_loop()
    quick.mark = Mark(loop.time() + 60.0, 120.0)
    began = loop.time()
    look = asyncio.ensure_future(world.marks.look())
    await asyncio.sleep(0.01)
    assert world.limit.is_reached
    await look
    assert loop.time() - began == pytest.approx(1.0, abs=0.1)


@in_virtual_time
async def test_a_store_that_can_only_be_read(logged: Callable[[], list[str]]) -> None:
    """It goes on being read, and that it cannot be written is logged once, not at each mark."""
    shelf = Shelf()
    world = World(shelf)
    shelf.write_fails = OSError("read-only")
    for _ in range(5):
        await world.marks.publish(refused(world.limit))
        await world.look_for(1500.0)
    assert shelf.reads > 5000
    assert logged() == ["mark store failed: write shelf"]


@in_virtual_time
async def test_a_mark_that_could_not_be_written_is_written_later() -> None:
    """As long as it lasts, and once. A store that comes back too late gets no old mark."""
    shelf = Shelf()
    world = World(shelf)
    shelf.write_fails = shelf.read_fails = OSError()
    mark = refused(world.limit)
    await world.marks.publish(mark)
    await world.look_for(10.0)
    shelf.write_fails = shelf.read_fails = None
    await world.look_for(60.0)
    assert shelf.writes == [mark]

    await asyncio.sleep(world.limit.seconds_left)
    shelf.write_fails = OSError()
    await world.marks.publish(refused(world.limit))
    await asyncio.sleep(world.limit.seconds_left)
    shelf.write_fails = None
    await world.look_for(100.0)
    world.limit.learn(Mark(asyncio.get_running_loop().time() + 60.0, 120.0), "other")
    await world.look_for(10.0)
    assert shelf.writes == [mark]


@pytest.mark.parametrize("nonsense", ["text", Mark("soon", 1.0), (1.0, 2.0), 17])  # type: ignore[arg-type]
@in_virtual_time
async def test_a_store_that_answers_with_something_else(
    nonsense: Any, logged: Callable[[], list[str]]
) -> None:
    """An operator's own store may: it counts as failed, and a mark is written all the same."""
    shelf = Shelf()
    world = World(shelf)
    shelf.mark = nonsense
    await world.look_for(3.0)
    assert logged() == ["mark store failed: read shelf"]
    assert not world.limit.is_reached
    await world.marks.publish(refused(world.limit))
    assert len(shelf.writes) == 1


@in_virtual_time
async def test_a_look_that_is_cancelled() -> None:
    """It ends at once, and counts as no failure of the store."""
    shelf = Shelf()
    world = World(shelf)
    shelf.hangs = True
    look = asyncio.ensure_future(world.marks.look())
    await asyncio.sleep(0.5)
    look.cancel()
    with pytest.raises(asyncio.CancelledError):
        await look
    shelf.hangs = False
    await world.look_for(10.0)
    assert shelf.reads >= 10
