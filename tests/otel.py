"""The meter provider of the test process: OpenTelemetry lets it be set once."""

from __future__ import annotations

import functools

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader

from xai_pool_patch.telemetry import instruments


class _Provider(MeterProvider):
    def shutdown(self, timeout_millis: float = 30_000) -> None:
        """Stays: the end of a LiveKit job shuts down the one that it finds."""


@functools.cache
def _set_up() -> InMemoryMetricReader:
    """After the instruments were made, as LiveKit does it in a job."""
    assert instruments.wait_time is not None
    delta = AggregationTemporality.DELTA
    reader = InMemoryMetricReader(preferred_temporality={Counter: delta, Histogram: delta})
    readers = [reader, PrometheusMetricReader()]
    metrics.set_meter_provider(_Provider(metric_readers=readers, shutdown_on_exit=False))
    return reader


def empty_reader() -> InMemoryMetricReader:
    """Reads what is recorded from now on."""
    reader = _set_up()
    reader.get_metrics_data()
    return reader
