"""S3: how long a refusal counts, as one process knows it."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import pytest

from tests.kit import event_of
from xai_pool_patch.sessions.shortage import Shortage

LENGTH = (108.0, 132.0)
"""Two minutes, a tenth shorter or longer."""
SPREAD = 30.0

OWN, OTHERS = "a refusal to this process", "a refusal to another process"


class Clock:
    """The time of one machine. Its wall clock can be set; its monotonic clock cannot."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.wall_minus_now = 1.7e9

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_minus_now

    def shortage(self, seed: int = 1) -> Shortage:
        uniform = random.Random(seed).uniform
        return Shortage("api.x.ai", self.monotonic, self.wall, uniform)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(shortage: Shortage) -> float:
    """The end that is published."""
    assert shortage.refused(429)
    news = shortage.news_for(None)
    assert news is not None
    return news


def test_without_a_refusal(clock: Clock) -> None:
    """Nothing is scarce, nothing has been, and others need to hear nothing."""
    shortage = clock.shortage()
    assert not shortage.is_on
    assert (shortage.until, shortage.seconds_left) == (-math.inf, 0.0)
    assert shortage.news_for(None) is None
    shortage.learn(None)
    assert not shortage.is_on


def test_one_refusal(clock: Clock) -> None:
    """It counts for two minutes and a share; what is published is without the share."""
    shortage = clock.shortage()
    published = refused(shortage)
    length = published - clock.wall()
    assert LENGTH[0] <= length <= LENGTH[1]
    assert (shortage.is_on, shortage.reason) == (True, OWN)
    assert length <= shortage.seconds_left <= length + SPREAD
    assert shortage.seconds_left == pytest.approx(shortage.until - clock.now)
    assert repr(shortage) == f"<Shortage at api.x.ai, {shortage.seconds_left:.0f} s left>"
    clock.now = shortage.until - 0.1
    assert shortage.is_on
    clock.now = shortage.until
    assert (shortage.is_on, shortage.seconds_left) == (False, 0.0)


def test_the_refusals_of_many_processes(clock: Clock) -> None:
    """They do not end together, even if nobody hears of the others'."""
    ends = [refused(clock.shortage(seed)) - clock.wall() for seed in range(100)]
    assert min(ends) < 111.0
    assert max(ends) > 129.0


def test_from_the_last_refusal_on(clock: Clock) -> None:
    """It does not grow, however often it comes back."""
    shortage = clock.shortage()
    for pause in (20.0, 60.0, 100.0, 200.0, 200.0, 200.0, 1.0e4):
        assert LENGTH[0] <= refused(shortage) - clock.wall() <= LENGTH[1]
        clock.now += pause


def test_a_thousand_refusals(clock: Clock) -> None:
    """They are news to others at most once in a quarter of a minute."""
    shortage = clock.shortage()
    news = 0
    for _ in range(1000):
        news += shortage.refused(429)
        clock.now += 0.1
    assert 2 <= news <= 1 + 100.0 / 3.0
    assert shortage.seconds_left > LENGTH[0] - 30.0


def test_the_shares_of_many_processes(clock: Clock) -> None:
    """Those that saw one end come back one by one, over a quarter of its length."""
    shortages = [clock.shortage(seed) for seed in range(400)]
    for shortage in shortages:
        shortage.learn(clock.wall() + 100.0)
    shares = sorted(shortage.seconds_left - 100.0 for shortage in shortages)
    assert shares[0] >= 0.0
    assert shares[-1] <= SPREAD
    most_in_a_second = max(sum(t <= s < t + 1 for s in shares) for t in range(30))
    assert most_in_a_second < 30, "13 on average"


def test_the_share_is_drawn_once(clock: Clock) -> None:
    """As long as it is on. Else the last refusals of many processes would bring them together."""
    shortage = clock.shortage()
    shares = set()
    for _ in range(10):
        length = refused(shortage) - clock.wall()
        shares.add(round(shortage.seconds_left - length, 3))
        clock.now += 60.0
    assert len(shares) == 1
    clock.now = shortage.until
    length = refused(shortage) - clock.wall()
    assert round(shortage.seconds_left - length, 3) not in shares


def test_an_end_of_others(clock: Clock) -> None:
    """It counts as one's own does, however often it is seen, and is not passed on."""
    shortage = clock.shortage()
    end = clock.wall() + 50.0
    shortage.learn(end)
    assert (shortage.is_on, shortage.reason) == (True, OTHERS)
    until = shortage.until
    assert 50.0 <= until - clock.now <= 50.0 + SPREAD
    clock.now += 10.0
    shortage.learn(end)
    shortage.learn(end + 0.5)
    assert shortage.until == until
    assert shortage.news_for(None) is None


def test_a_later_end_of_others(clock: Clock) -> None:
    """The later end counts, whoever it is from; an earlier one shortens nothing."""
    shortage = clock.shortage()
    refused(shortage)
    clock.now += 60.0
    shortage.learn(clock.wall() + 130.0)
    assert 130.0 <= shortage.seconds_left <= 130.0 + SPREAD
    assert shortage.reason == OTHERS
    until = shortage.until
    shortage.learn(clock.wall() + 5.0)
    assert shortage.until == until


def test_what_a_store_has_to_be_told(clock: Clock) -> None:
    """This process's own end, unless it has that or a later one, and as long as it lasts."""
    shortage = clock.shortage()
    end = refused(shortage)
    assert shortage.news_for(end) is None
    assert shortage.news_for(end - 0.5) is None, "clocks of two machines differ"
    assert shortage.news_for(end + 20.0) is None
    assert shortage.news_for(end - 20.0) == pytest.approx(end)
    assert shortage.news_for(math.nan) == pytest.approx(end)
    assert shortage.news_for(end + 3600.0) == pytest.approx(end), "nonsense is replaced"
    shortage.learn(end + 20.0)
    assert shortage.news_for(end + 20.0) is None
    clock.now += end - clock.wall()
    assert shortage.is_on, "for this process"
    assert shortage.news_for(None) is None


def test_others_are_refused_at_the_same_time(clock: Clock) -> None:
    """A refusal right after one that this process has heard of is no news."""
    shortage = clock.shortage()
    shortage.learn(clock.wall() + 120.0)
    assert not shortage.refused(429)


def test_a_refusal_after_a_failed_handshake(clock: Clock) -> None:
    """Others have heard of none of the two, and hear of the refusal. It shortens nothing."""
    shortage = clock.shortage()
    shortage.failed()
    assert shortage.news_for(None) is None
    until = shortage.until
    clock.now += 1.0
    assert shortage.refused(429)
    assert shortage.news_for(None) is not None
    assert shortage.until >= until
    assert not shortage.refused(429)


@pytest.mark.parametrize("ahead", [math.nan, math.inf, -math.inf, 241.0, 1e300, -1e300, 0.0, -1.0])
def test_nonsense(clock: Clock, ahead: float) -> None:
    """It is no shortage, and changes none."""
    shortage = clock.shortage()
    shortage.learn(clock.wall() + ahead)
    assert not shortage.is_on
    refused(shortage)
    until = shortage.until
    shortage.learn(clock.wall() + ahead)
    assert (shortage.until, shortage.reason) == (until, OWN)


def test_another_machines_clock_is_a_minute_ahead(clock: Clock) -> None:
    """Nothing lasts for longer than it can."""
    shortage = clock.shortage()
    shortage.learn(clock.wall() + 180.0)
    assert shortage.is_on
    assert shortage.seconds_left <= LENGTH[1] + SPREAD


@pytest.mark.parametrize("jump", [-86400.0, -3600.0, -60.0, 60.0, 3600.0, 86400.0])
def test_a_clock_that_jumps(clock: Clock, jump: float) -> None:
    """What a process knows ends when it would have, and nothing lasts for longer than it can.

    A process that starts after the jump sees the end at another time, or none.
    """
    shortage = clock.shortage()
    end = refused(shortage)
    shortage.learn(end)
    until = shortage.until
    clock.wall_minus_now += jump
    newcomer = clock.shortage()
    newcomer.learn(end)
    assert newcomer.seconds_left <= LENGTH[1] + SPREAD
    while clock.now < until:
        shortage.learn(end)
        assert shortage.is_on
        clock.now += 1.0
    shortage.learn(end)
    assert not shortage.is_on
    clock.now += LENGTH[1] + SPREAD
    newcomer.learn(end)
    assert not newcomer.is_on


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [r for r in caplog.records if event_of(r) == "sessions scarce for ten minutes"]


def test_it_lasts_for_long(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One warning names the host and the status; the next comes after a pause."""
    caplog.set_level(logging.INFO, "xai_pool_patch")
    shortage = clock.shortage()
    for _ in range(30):
        shortage.refused(503)
        clock.now += 60.0
        assert len(warnings_in(caplog)) == (clock.now - 60.0 - 5000.0 > 600.0)
    [record] = warnings_in(caplog)
    assert record.levelno == logging.WARNING
    assert (record.xai_pool_host, record.xai_pool_status) == ("api.x.ai", 503)
    assert record.xai_pool_for_s == pytest.approx(660.0)
    clock.now = shortage.until
    for _ in range(10):
        shortage.refused(None)
        clock.now += 60.0
    assert len(warnings_in(caplog)) == 1
    shortage.refused(None)
    shortage.refused(None)
    clock.now += 60.0
    shortage.refused(None)
    assert len(warnings_in(caplog)) == 2


def test_refusals_with_pauses(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A few at each rush hour are no reason for a warning."""
    shortage = clock.shortage()
    for _ in range(10):
        refused(shortage)
        clock.now = shortage.until
    assert warnings_in(caplog) == []
