"""When background dials may be made."""

from __future__ import annotations

import math
import random

from xai_pool_patch.pool.backoff import Backoff, FailureKind, RateLimit


def make(rate_limit: RateLimit | None = None) -> Backoff:
    return Backoff(rate_limit or RateLimit(), random.Random(1))


def test_at_once_as_long_as_nothing_failed() -> None:
    """A first dial is never delayed."""
    assert make().next_attempt == -math.inf


def test_an_outage_of_a_year() -> None:
    """The delay stays at its limit however often it would have doubled."""
    backoff, now = make(), 0.0
    for _ in range(1_000_000):
        backoff.failed(FailureKind.TRANSIENT, now)
        delay, now = backoff.next_attempt - now, backoff.next_attempt
    assert 24.0 <= delay <= 30.0


def test_failures_of_one_burst_count_once() -> None:
    """Ten dials that fail together are one failure, not a delay of ten doublings."""
    backoff = make()
    for _ in range(10):
        backoff.failed(FailureKind.TRANSIENT, 100.0)
    assert 100.4 <= backoff.next_attempt <= 100.5


def test_success_ends_it() -> None:
    """What comes next begins with the first delay again."""
    backoff = make()
    backoff.failed(FailureKind.TRANSIENT, 0.0)
    backoff.failed(FailureKind.PERMANENT, 10.0)
    assert backoff.next_attempt == math.inf
    backoff.succeeded()
    assert backoff.next_attempt == -math.inf


def test_over_limit_counts_during_another_backoff_too() -> None:
    """A 429 in the middle of a backoff still pauses the other pools of the API key."""
    rate_limit = RateLimit()
    backoff, other = make(rate_limit), make(rate_limit)
    backoff.failed(FailureKind.TRANSIENT, 0.0)
    backoff.failed(FailureKind.RATE_LIMITED, 0.1)
    assert other.next_attempt > 0.1
