"""OpenTelemetry instruments, on the meter provider that livekit-agents uses: the application's.

Their names follow the semantic conventions for the connection pools of database clients,
`db.client.connection.*`. Importing this module makes them. They use a meter provider that the
application sets later, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from .._version import __version__
from .usage import Counts

STATES = ("idle", "leased", "clearing", "connecting")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Histogram buckets, from the semantic conventions for HTTP requests. The SDK's own default suits
milliseconds."""


class Source(Protocol):
    """Where the observed counts come from."""

    def stats(self) -> Counts: ...


_source: weakref.ref[Source] | None = None


def observe(source: Source) -> None:
    """Let `connection.count` report this source from now on, for as long as it exists."""
    global _source
    _source = weakref.ref(source)


def _observed(*names: str) -> list[int]:
    """The counts of those names; all 0 if there is no source."""
    source = _source() if _source is not None else None
    counts: Mapping[str, object] = source.stats() if source is not None else {}
    return [int(counts.get(name, 0)) for name in names]  # type: ignore[call-overload]


def _count(_: CallbackOptions) -> Iterable[Observation]:
    counts = zip(STATES, _observed(*STATES), strict=True)
    return [Observation(count, {"state": state}) for state, count in counts]


def _lean(_: CallbackOptions) -> Iterable[Observation]:
    return [Observation(count) for count in _observed("lean")]


_meter = metrics.get_meter("xai_pool_patch", __version__)

connection_count = _meter.create_observable_up_down_counter(
    "xai_pool_patch.connection.count",
    [_count],
    unit="{connection}",
    description="Connections by state: idle, leased, clearing, connecting",
)
lean_count = _meter.create_observable_up_down_counter(
    "xai_pool_patch.pool.lean",
    [_lean],
    unit="{pool}",
    description="Pools that keep a connection only while a reply is expected",
)
create_time = _meter.create_histogram(
    "xai_pool_patch.connection.create_time",
    unit="s",
    description="Time that handshakes took",
    explicit_bucket_boundaries_advisory=SECONDS,
)
wait_time = _meter.create_histogram(
    "xai_pool_patch.connection.wait_time",
    unit="s",
    description="Time that utterances waited for a connection",
    explicit_bucket_boundaries_advisory=SECONDS,
)
closed = _meter.create_counter(
    "xai_pool_patch.connection.closed",
    unit="{connection}",
    description="Connections taken out of the pool, by reason",
)
standby_failures = _meter.create_counter(
    "xai_pool_patch.connection.standby_failures",
    unit="{dial}",
    description="Background dials that failed, by HTTP status or type of the error",
)
rate_limited = _meter.create_counter(
    "xai_pool_patch.connection.rate_limited",
    unit="{dial}",
    description="Dials refused because the team has too many sessions or requests",
)
replays = _meter.create_counter(
    "xai_pool_patch.utterance.replays",
    unit="{utterance}",
    description="Utterances replayed over another connection, by what was wrong with the first",
)
