"""When background dials may be made."""

from __future__ import annotations

import math
import random

from xai_pool_patch.pool.backoff import Backoff, FailureKind, RateLimit


def make(rate_limit: RateLimit | None = None) -> Backoff:
    return Backoff(rate_limit or RateLimit(), random.Random(1))


def test_nothing_is_delayed_before_the_first_failure() -> None:
    """The first dial may be made at once."""
    assert make().next_attempt == -math.inf


def test_the_delay_never_exceeds_its_limit() -> None:
    """Not even after a million failures, about a year."""
    backoff, now = make(), 0.0
    for _ in range(1_000_000):
        backoff.failed(FailureKind.TRANSIENT, now)
        delay, now = backoff.next_attempt - now, backoff.next_attempt
    assert 24.0 <= delay <= 30.0


def test_failures_of_one_burst_count_once() -> None:
    """Ten dials that fail together are one failure and do not double the delay ten times."""
    backoff = make()
    for _ in range(10):
        backoff.failed(FailureKind.TRANSIENT, 100.0)
    assert 100.4 <= backoff.next_attempt <= 100.5


def test_a_success_ends_the_backoff() -> None:
    """Also that of a permanent failure."""
    backoff = make()
    backoff.failed(FailureKind.TRANSIENT, 0.0)
    backoff.failed(FailureKind.PERMANENT, 10.0)
    assert backoff.next_attempt == math.inf
    backoff.succeeded()
    assert backoff.next_attempt == -math.inf


def test_a_429_during_a_backoff_still_pauses_the_other_pools() -> None:
    """The other pools of the API key wait, though this one was waiting already."""
    rate_limit = RateLimit()
    backoff, other = make(rate_limit), make(rate_limit)
    backoff.failed(FailureKind.TRANSIENT, 0.0)
    backoff.failed(FailureKind.REFUSED, 0.1)
    assert other.next_attempt > 0.1
