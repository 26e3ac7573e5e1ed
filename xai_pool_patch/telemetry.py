"""What the pool tells about itself: log records and counters."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, cast

if TYPE_CHECKING:
    import structlog


@functools.cache
def log() -> structlog.stdlib.BoundLogger:
    """The structlog logger that ends in the standard logger `xai_pool_patch`.

    Its processors are its own, so the application's structlog configuration is neither used nor
    changed. structlog is imported at the first use: it takes longer than all else here.
    """
    import structlog

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger("xai_pool_patch"),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


def describe(error: BaseException) -> str:
    """Type and place of an error, without its message.

    A message or a traceback may quote what must not be logged: aiohttp's handshake errors carry
    the request's headers, and with them the API key.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].name}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


class Totals(TypedDict):
    """What has happened so far. Times in milliseconds, the rest are counts."""

    connections_made: int
    connections_reused: int
    connections_reclaimed: int
    discarded_interrupted: int
    discarded_stale: int
    discarded_error: int
    discarded_expired: int
    discarded_trimmed: int
    discarded_closed: int
    standby_failures: int
    replays: int
    acquire_wait_ms_total: float
    acquire_wait_ms_max: float
    handshake_ms_total: float
    handshake_ms_max: float


class Stats(Totals):
    """A snapshot of all pools of this process: the totals, and what there is at the moment."""

    pools: int
    idle: int
    leased: int
    restoring: int
    dialling: int


class Counters:
    """The totals of one event loop's pools."""

    def __init__(self) -> None:
        self.totals = cast(Totals, dict.fromkeys(Totals.__annotations__, 0))

    def reused(self) -> None:
        self.totals["connections_reused"] += 1

    def reclaimed(self) -> None:
        self.totals["connections_reclaimed"] += 1

    def waited(self, seconds: float) -> None:
        milliseconds = seconds * 1e3
        self.totals["acquire_wait_ms_total"] += milliseconds
        self.totals["acquire_wait_ms_max"] = max(self.totals["acquire_wait_ms_max"], milliseconds)

    def connected(self, handshake: float) -> None:
        milliseconds = handshake * 1e3
        self.totals["connections_made"] += 1
        self.totals["handshake_ms_total"] += milliseconds
        self.totals["handshake_ms_max"] = max(self.totals["handshake_ms_max"], milliseconds)

    def standby_failed(self) -> None:
        self.totals["standby_failures"] += 1

    def replayed(self) -> None:
        self.totals["replays"] += 1

    def discarded(self, reason: str) -> None:
        totals = cast(dict[str, int], self.totals)
        totals[f"discarded_{reason}"] += 1

    def add(self, other: Counters) -> None:
        mine, theirs = cast(dict[str, float], self.totals), cast(dict[str, float], other.totals)
        for name, value in theirs.items():
            mine[name] = max(mine[name], value) if name.endswith("_max") else mine[name] + value


class Countable(Protocol):
    """What the snapshot asks of a pool."""

    @property
    def idle(self) -> int: ...
    @property
    def leased(self) -> int: ...
    @property
    def restoring(self) -> int: ...
    @property
    def dialling(self) -> int: ...


def stats_of(pools: Sequence[Countable], counters: Counters) -> Stats:
    return {
        **counters.totals,
        "pools": len(pools),
        "idle": sum(pool.idle for pool in pools),
        "leased": sum(pool.leased for pool in pools),
        "restoring": sum(pool.restoring for pool in pools),
        "dialling": sum(pool.dialling for pool in pools),
    }
