"""T1: each event of a pool, in the log and in its statistics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.kit import event_of
from tests.unit.pool_kit import HANDSHAKE, Network, with_pool
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.backoff import FailureKind
from xai_pool_patch.pool.entries import Outcome
from xai_pool_patch.pool.pool import Pool
from xai_pool_patch.telemetry.log import FIELD_PREFIX, LogEvent
from xai_pool_patch.telemetry.usage import Counters, UsageStats

MAX_AGE = PoolOptions().max_age
WHEN_ROTATED = pytest.approx(0.9 * MAX_AGE, rel=0.06)
GROWN_OLD = 0.88 * MAX_AGE
"""With this jitter, old enough to be replaced and not too old to be handed out."""

Scenario = Callable[[Network, Pool[Any]], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "xai_pool_patch")


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Each message so far, with its own fields."""
    usual = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "xai_pool_event"}
    return [
        (
            event_of(r),
            {k.removeprefix(FIELD_PREFIX): v for k, v in vars(r).items() if k not in usual},
        )
        for r in caplog.records
    ]


async def one_idle(pool: Pool[Any]) -> Any:
    wire = (await pool.acquire(10.0)).connection
    pool.give_back(wire, Outcome.FINISHED)
    return wire


@with_pool()
async def test_dials_waits_and_reuse_are_logged_and_counted(
    pool: Pool[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """INFO for a connection, DEBUG for a turn; waits and handshakes in milliseconds."""
    await one_idle(pool)
    await one_idle(pool)
    records, counted = logged(caplog), pool.metrics.counters.totals
    assert records == [
        ("connected", {"number": 1, "connect_ms": 450.0}),
        ("waited", {"number": 1, "wait_ms": 450.0}),
        ("reused", {"number": 1}),
    ]
    assert [r.levelname for r in caplog.records] == ["INFO", "DEBUG", "DEBUG"]
    assert (counted["connections_made"], counted["connections_reused"]) == (1, 1)
    assert counted["acquire_wait_ms_total"] == pytest.approx(HANDSHAKE * 1e3)
    assert counted["acquire_wait_ms_max"] == pytest.approx(counted["connect_ms_max"])


async def interrupt(network: Network, pool: Pool[Any]) -> None:
    pool.give_back((await pool.acquire(10.0)).connection, Outcome.INTERRUPTED)


async def lose(network: Network, pool: Pool[Any]) -> None:
    wire = await one_idle(pool)
    await asyncio.sleep(30.0)
    wire.break_off()


async def lose_in_use(network: Network, pool: Pool[Any]) -> None:
    (await pool.acquire(10.0)).connection.break_off()


async def rotate(network: Network, pool: Pool[Any]) -> None:
    pool.resize(1)
    await one_idle(pool)
    while len(network.wires) < 2:
        await asyncio.sleep(1.0)


async def expire(network: Network, pool: Pool[Any]) -> None:
    wire = (await pool.acquire(10.0)).connection
    await asyncio.sleep(2000.0)
    pool.give_back(wire, Outcome.FINISHED)


async def grow_old_unkept(network: Network, pool: Pool[Any]) -> None:
    wire = (await pool.acquire(10.0)).connection
    await asyncio.sleep(GROWN_OLD)
    pool.give_back(wire, Outcome.FINISHED)


async def trim(network: Network, pool: Pool[Any]) -> None:
    await one_idle(pool)
    await asyncio.sleep(61.0)


async def close(network: Network, pool: Pool[Any]) -> None:
    await one_idle(pool)
    pool.close()


@pytest.mark.parametrize(
    ("operation", "reason", "age_s", "idle_s"),
    [
        (interrupt, "interrupted", 0.0, None),
        (lose, "lost", 30.0, 30.0),
        (lose_in_use, "failed", 0.0, None),
        (rotate, "expired", WHEN_ROTATED, WHEN_ROTATED),
        (expire, "expired", 2000.0, None),
        (grow_old_unkept, "expired", GROWN_OLD, 0.0),
        (trim, "surplus", 60.0, 60.0),
        (close, "shutdown", 0.0, 0.0),
    ],
)
@with_pool()
async def test_the_end_of_a_connection_is_logged_and_counted_once(
    network: Network,
    pool: Pool[Any],
    operation: Scenario,
    reason: str,
    age_s: float,
    idle_s: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One event `closed`, with its reason, its age and how long it was idle."""
    await operation(network, pool)
    records, counted = logged(caplog), pool.metrics.counters.totals
    [fields] = [fields for message, fields in records if message == "closed"]
    assert (fields["reason"], fields["age_s"]) == (reason, age_s)
    assert fields.get("idle_s") == idle_s
    discarded = {name: n for name, n in counted.items() if name.startswith("closed") and n}
    assert discarded == {f"closed_{reason}": 1}


@pytest.mark.parametrize(
    ("failure_kind", "retry_in_s"),
    [(FailureKind.TRANSIENT, pytest.approx(0.45, abs=0.06)), (FailureKind.PERMANENT, None)],
)
@with_pool()
async def test_a_failed_standby_is_logged_with_the_time_to_the_next_attempt(
    network: Network,
    pool: Pool[Any],
    failure_kind: FailureKind,
    retry_in_s: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A WARNING. After a permanent failure the field is None: JSON has no infinity."""
    network.refuse = [failure_kind]
    pool.resize(1)
    await asyncio.sleep(HANDSHAKE + 0.1)
    records, counted = logged(caplog), pool.metrics.counters.totals
    [(message, fields)] = records
    assert (message, caplog.records[0].levelname) == ("standby failed", "WARNING")
    assert fields["retry_in_s"] == retry_in_s
    assert fields["error"].startswith("RefusedError at connect:")
    assert counted["standby_failures"] == 1


@with_pool()
async def test_no_field_collides_with_an_attribute_of_log_records(
    network: Network, pool: Pool[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """`logging` refuses a record whose extra fields overwrite its own."""
    assert len({event.label for event in LogEvent}) == len(LogEvent)
    for operation in (lose, interrupt, trim):
        await operation(network, pool)
    pool.metrics.replayed(0.1, "no answer")
    pool.metrics.replay_failed(error=OSError("no"), reason="no answer")
    records = logged(caplog)
    assert all(fields.keys() >= {"number"} for _, fields in records)


def test_counts_of_a_pool_are_added_to_those_of_its_loop() -> None:
    """So what a pool did stays in the totals when the pool is gone."""
    loop = Counters()
    first, second = Counters(loop), Counters(loop)
    for counters, seconds in ((first, 0.2), (second, 0.1)):
        counters.count("replays")
        counters.time("connect", seconds)
    assert (first.totals["replays"], loop.totals["replays"]) == (1, 2)
    assert loop.totals["connect_ms_total"] == pytest.approx(300.0)
    assert loop.totals["connect_ms_max"] == 200.0


def test_usage_of_a_tts_includes_the_waits_of_replays() -> None:
    """A replay's wait belongs to the same utterance."""
    usage = UsageStats()
    usage.begun(0.45, reused=False)
    usage.begun(0.0, reused=True)
    usage.replaced(0.5)
    assert usage.as_fields() == {
        "utterances": 2,
        "reused": 1,
        "replays": 1,
        "wait_ms_total": 950.0,
        "wait_ms_max": 500.0,
    }
