"""Counters, and the snapshots that `stats()` and `pool_stats()` return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

from .log import in_ms


class Totals(TypedDict):
    """What has happened so far. Times are in milliseconds; the rest are counts."""

    connections_made: int
    connections_reused: int
    """Idle connections handed out. If the utterance was replayed, `replays` counts it too."""
    connections_cleared: int
    """Interrupted connections that a `text.clear` made clean, so that the pool kept them."""
    closed_interrupted: int
    closed_lost: int
    """The peer ended an idle connection, or one was found dead when an utterance began."""
    closed_failed: int
    closed_expired: int
    closed_surplus: int
    closed_shutdown: int
    standby_failures: int
    rate_limited: int
    """Dials refused because the team has too many sessions or requests, or probably for that: by
    HTTP 429, 403 or 5xx, or by a Close or an error frame as the first answer."""
    signs_used: int
    """Replies for which a connection was called for in advance, and that used one."""
    signs_unused: int
    """Replies for which a connection was called for in advance, and that used none."""
    replays: int
    acquire_wait_ms_total: float
    """Includes the waits for replays."""
    acquire_wait_ms_max: float
    connect_ms_total: float
    connect_ms_max: float


class Counts(Totals):
    """The totals, and the connections at the moment by their state."""

    idle: int
    leased: int
    clearing: int
    """A `text.clear` is under way."""
    connecting: int
    lean: int
    """Pools that keep a connection only while a reply is expected."""


class Stats(Counts):
    """A snapshot of all pools of this process. The totals include pools that have ended."""

    pools: int


class PoolStats(Counts):
    """A snapshot of one pool."""

    pool: int
    """The pool's number, which its log records carry too. No number is used twice."""


class Counters:
    """The running totals of one pool, or of several.

    Args:
        into: other counters that count the same as well.
    """

    def __init__(self, into: Counters | None = None) -> None:
        zero = {name: 0.0 if "_ms_" in name else 0 for name in Totals.__annotations__}
        self.totals = cast(Totals, zero)
        self._into = into

    def count(self, name: str) -> None:
        cast(dict[str, int], self.totals)[name] += 1
        if self._into is not None:
            self._into.count(name)

    def time(self, name: str, seconds: float) -> None:
        """Add a time to `name_ms_total`, and keep the longest in `name_ms_max`."""
        totals, milliseconds = cast(dict[str, float], self.totals), seconds * 1e3
        totals[f"{name}_ms_total"] += milliseconds
        totals[f"{name}_ms_max"] = max(totals[f"{name}_ms_max"], milliseconds)
        if self._into is not None:
            self._into.time(name, seconds)

    def add(self, other: Counters) -> None:
        mine, theirs = cast(dict[str, float], self.totals), cast(dict[str, float], other.totals)
        for name, value in theirs.items():
            mine[name] = max(mine[name], value) if name.endswith("_max") else mine[name] + value


def sum_of(*several: Counters) -> Counters:
    whole = Counters()
    for counters in several:
        whole.add(counters)
    return whole


@dataclass
class UsageStats:
    """What the pools did for one TTS. Times are in seconds."""

    utterances: int = 0
    reused: int = 0
    """Utterances that began on an idle connection. If it was replayed, `replays` counts it too."""
    replays: int = 0
    wait_total: float = 0.0
    wait_max: float = 0.0

    def begun(self, waited: float, *, reused: bool) -> None:
        self.utterances += 1
        self.reused += reused
        self._waited(waited)

    def replaced(self, waited: float) -> None:
        self.replays += 1
        self._waited(waited)

    def _waited(self, seconds: float) -> None:
        self.wait_total += seconds
        self.wait_max = max(self.wait_max, seconds)

    def as_fields(self) -> dict[str, Any]:
        return {
            "utterances": self.utterances,
            "reused": self.reused,
            "replays": self.replays,
            "wait_ms_total": in_ms(self.wait_total),
            "wait_ms_max": in_ms(self.wait_max),
        }


class Countable(Protocol):
    """What a snapshot needs of a pool."""

    @property
    def idle(self) -> int: ...
    @property
    def leased(self) -> int: ...
    @property
    def clearing(self) -> int: ...
    @property
    def connecting(self) -> int: ...
    @property
    def is_lean(self) -> bool: ...


def counts_of(pools: Sequence[Countable], counters: Counters) -> Counts:
    totals = cast(dict[str, float], counters.totals.copy())
    return {
        **cast(Totals, {name: round(total, 3) for name, total in totals.items()}),
        "idle": sum(pool.idle for pool in pools),
        "leased": sum(pool.leased for pool in pools),
        "clearing": sum(pool.clearing for pool in pools),
        "connecting": sum(pool.connecting for pool in pools),
        "lean": sum(pool.is_lean for pool in pools),
    }


def stats_of(pools: Sequence[Countable], counters: Counters) -> Stats:
    return {**counts_of(pools, counters), "pools": len(pools)}
