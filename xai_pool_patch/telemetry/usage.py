"""Counters, and the snapshots that `stats()` and `pool_stats()` return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast


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

    names: Iterable[str] = Totals.__annotations__

    def __init__(self, into: Counters | None = None) -> None:
        self.totals: dict[str, float] = {name: 0.0 if "_ms_" in name else 0 for name in self.names}
        self._into = into

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a total, or keep the larger if it is a `_max`."""
        total = self.totals[name]
        self.totals[name] = max(total, amount) if name.endswith("_max") else total + amount
        if self._into is not None:
            self._into.count(name, amount)

    def time(self, name: str, seconds: float) -> None:
        """Add a time to `name_ms_total`, and keep the longest in `name_ms_max`."""
        self.count(f"{name}_ms_total", seconds * 1e3)
        self.count(f"{name}_ms_max", seconds * 1e3)


def sum_of(*several: Counters) -> Counters:
    whole = Counters()
    for counters in several:
        for name, total in counters.totals.items():
            whole.count(name, total)
    return whole


class UsageStats(Counters):
    """What the pools did for one TTS. A replayed utterance may be among the reused ones, too."""

    names = ("utterances", "reused", "replays", "wait_ms_total", "wait_ms_max")

    def begun(self, waited: float, *, reused: bool) -> None:
        self.count("utterances")
        self.count("reused", reused)
        self.time("wait", waited)

    def replaced(self, waited: float) -> None:
        self.count("replays")
        self.time("wait", waited)

    def as_fields(self) -> dict[str, Any]:
        return {name: round(total, 1) for name, total in self.totals.items()}


def counts_of(states: Sequence[Mapping[str, int]], counters: Counters) -> Counts:
    """A snapshot.

    Args:
        states: what each pool has at the moment: see `Pool.counts`.
    """
    totals = {name: round(total, 3) for name, total in counters.totals.items()}
    momentary = ("idle", "leased", "clearing", "connecting", "lean")
    return cast(Counts, totals | {name: sum(each[name] for each in states) for name in momentary})


def stats_of(states: Sequence[Mapping[str, int]], counters: Counters) -> Stats:
    return {**counts_of(states, counters), "pools": len(states)}
