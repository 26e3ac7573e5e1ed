"""OpenTelemetry instruments, on the application's meter provider: livekit-agents uses the same.

Named after the semantic conventions for the connection pools of database clients,
`db.client.connection.*`. Made once, when the plugin is patched for the first time; a provider that
is set later is used from then on.
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
"""Histogram buckets: those of the semantic conventions for HTTP requests. Without them the SDK
takes buckets that are made for milliseconds."""


class Source(Protocol):
    """What the observed counts are taken from."""

    def stats(self) -> Counts: ...


_source: weakref.ref[Source] | None = None


def observe(source: Source) -> None:
    """From here on `connection.count` is this one's, for as long as it exists."""
    global _source
    _source = weakref.ref(source)


def _count(_: CallbackOptions) -> Iterable[Observation]:
    source = _source() if _source is not None else None
    counts: Mapping[str, object] = source.stats() if source is not None else {}
    return [Observation(int(counts.get(state, 0)), {"state": state}) for state in STATES]  # type: ignore[call-overload]


_meter = metrics.get_meter("xai_pool_patch", __version__)

connection_count = _meter.create_observable_up_down_counter(
    "xai_pool_patch.connection.count",
    [_count],
    unit="{connection}",
    description="Connections by state: idle, leased, clearing, dialling",
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
replays = _meter.create_counter(
    "xai_pool_patch.utterance.replays",
    unit="{utterance}",
    description="Utterances sent again over another connection, by what was wrong with the first",
)
