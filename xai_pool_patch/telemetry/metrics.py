"""Prometheus metrics, on the page that LiveKit's server shows at /metrics.

`METRICS` is the table of them all. Each is at 0 for every value of its label from the start, so
that `increase()` sees the first event.

The numbers lie in memory, until the process may write them into `PROMETHEUS_MULTIPROC_DIR`. From
there LiveKit's page collects those of all job processes. The files are this package's own:

- `AgentServer.run` empties the directory after `install()`. What had been opened before would be
  written into deleted files, and a file of prometheus_client may be shared with an application that
  has opened it that early.
- Without files of its own this package would depend on whether prometheus_client was imported
  before the directory was named, which `AgentServer` may do by an argument.

No gauge tells a momentary state: on that page it would stay for ever if its job was killed.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import multiprocessing.process
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client import values as stores
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from .log import LogEvent, harmless, log_event, status_of

PREFIX = "xai_pool_patch_"
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
OTHER = "other"

SECONDS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
"""Histogram buckets. A handshake takes about half a second, and at most ten."""
BOUNDS = (*map(str, SECONDS), "+Inf")


class Number:
    """One series, and where its value lies."""

    def __init__(self, metric: Metric, suffix: str = "", **labels: str) -> None:
        self.name = metric.name + suffix
        self.labels = labels
        names, values = tuple(labels), tuple(labels.values())
        self.identity = (metric.kind, metric.family, self.name, names, values, metric.text)
        self.value: Any = stores.MutexValue(*self.identity)  # type: ignore[no-untyped-call]


METRICS: list[Metric] = []
"""All that were made, in the order of the page."""


class Metric:
    """One metric.

    Args:
        name: without `PREFIX`.
        text: what the page says about it.
        values: all that its label may have, if it has a label. If `OTHER` is among them, it stands
            for any other.

    Attributes:
        numbers: by the value of the label.
    """

    kind: ClassVar[str]
    suffix = ""

    def __init__(self, name: str, text: str, **values: Sequence[str]) -> None:
        self.name = PREFIX + name
        self.family = self.name.removesuffix("_total")  # so prometheus_client knows it
        self.text = text
        self.numbers: dict[str, Number] = {}
        for label, several in values.items():
            self.numbers = {each: Number(self, self.suffix, **{label: each}) for each in several}
        METRICS.append(self)


class Counter(Metric):
    kind = "counter"

    def __init__(self, name: str, text: str, **values: Sequence[str]) -> None:
        super().__init__(name, text, **values)
        self.numbers = self.numbers or {"": Number(self)}

    def count(self, value: str = "") -> None:
        number = self.numbers.get(value) or self.numbers[OTHER]
        number.value.inc(1.0)


class Histogram(Metric):
    """A distribution of seconds."""

    kind = "histogram"
    suffix = "_bucket"

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text, le=BOUNDS)
        self.numbers["sum"] = Number(self, "_sum")

    def observe(self, seconds: float) -> None:
        self.numbers["sum"].value.inc(seconds)
        self.numbers[BOUNDS[bisect.bisect_left(SECONDS, seconds)]].value.inc(1.0)


class Info(Metric):
    """What is installed: 1 for what is, 0 for what was before."""

    kind = "gauge"

    def tell(self, labels: dict[str, str]) -> None:
        self.withdraw()
        told = str(labels)
        if told not in self.numbers:
            self.numbers = {**self.numbers, told: Number(self, **labels)}
        self.numbers[told].value.set(1.0)

    def withdraw(self) -> None:
        for number in self.numbers.values():
            number.value.set(0.0)


INFO = Info(
    "info",
    "1 if the plugin is patched, with the versions of this package, the plugin and livekit-agents",
)
REUSED = Counter("connections_reused_total", "Utterances that found a connection ready")
WAITED = Histogram(
    "connection_wait_seconds", "Time that utterances waited for a connection, also to be replayed"
)
CONNECTED = Histogram(
    "connect_seconds", "Time that handshakes took; their count is that of the connections made"
)
CLOSED = Counter(
    "connections_closed_total",
    "Connections taken out of the pool",
    reason=("interrupted", "lost", "failed", "expired", "surplus", "shutdown", OTHER),
)
CLEARED = Counter("connections_cleared_total", "Interrupted connections that text.clear made clean")
REFUSED = Counter(
    "dials_refused_total",
    "Dials that the server refused because it has too many sessions or requests",
)
STANDBY_FAILURES = Counter(
    "standby_failures_total",
    "Dials in the background that failed, by HTTP status or kind of error",
    error=("401", "403", "429", "4xx", "5xx", "timeout", "connection"),
)
EXPECTED = Counter(
    "replies_expected_total",
    "Replies for which a connection was made ready in advance, by whether they used one",
    connection=("used", "unused"),
)
REPLAYS = Counter(
    "replays_total",
    "Utterances sent again over another connection, by what was wrong with the first",
    reason=("ended by the peer", "no sign of life", OTHER),
)
FAILED_OPEN = Counter(
    "failed_open_total", "Faults of this package, after which the plugin connects by itself"
)


def kind_of(error: Exception) -> str:
    """The value of the label `error`: few, whatever an exception is called."""
    status = status_of(error)
    if status is not None:
        return str(status) if status in (401, 403, 429) else f"{min(max(status // 100, 4), 5)}xx"
    return "timeout" if isinstance(error, (TimeoutError, asyncio.TimeoutError)) else "connection"


class _Collector(Collector):
    """For a page that shows this process alone."""

    def collect(self) -> Iterable[Family]:
        for metric in METRICS:
            family, count = Family(metric.family, metric.text, metric.kind), 0.0
            for number in metric.numbers.values():
                value = number.value.get()
                if "le" in number.labels:
                    value = count = count + value
                family.add_sample(number.name, number.labels, value)
            if metric.kind == "histogram":
                family.add_sample(f"{metric.name}_count", {}, count)
            yield family


def _process() -> str:
    """What the names of this process's files end in."""
    return f"{os.getpid()}-xai"


_lock = threading.Lock()
_file: Path | None = None
"""One of the files that the numbers lie in."""
_has_warned = False


@harmless
def install(versions: dict[str, str], registry: CollectorRegistry = REGISTRY) -> None:
    """Show the metrics from now on. In a job process of LiveKit's, open its files."""
    INFO.tell(versions)
    _register(registry)
    if multiprocessing.process.parent_process() is not None:
        share()


@functools.cache
def _register(registry: CollectorRegistry) -> None:
    try:
        registry.register(_Collector())
    except ValueError:
        _warn("the application has registered metrics of the same names")


uninstall = harmless(INFO.withdraw)


@harmless
def share() -> None:
    """Write the numbers into the directory that all processes share, if there is one.

    Opening the files takes a thread of its own where an event loop runs.
    """
    if DIRECTORY not in os.environ:
        return
    if asyncio._get_running_loop() is None:
        _share()
    else:
        threading.Thread(target=_share, name="xai_pool_patch.metrics", daemon=True).start()


@harmless
def _share() -> None:
    global _file
    with _lock:
        file = Path(os.environ[DIRECTORY], f"counter_{_process()}.db")
        if file == _file and file.exists():
            return
        numbers = [number for metric in METRICS for number in metric.numbers.values()]
        place = stores.MultiProcessValue(_process)  # type: ignore[no-untyped-call]
        try:
            values = [place(*number.identity, multiprocess_mode="max") for number in numbers]
        except OSError as error:
            _warn(f"{DIRECTORY} cannot be used: {error.strerror}")
            return
        for number, value in zip(numbers, values, strict=True):
            # In this order, since other threads go on to count.
            before, number.value = number.value, value
            value.inc(before.get())
        _file = file


def _warn(reason: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        log_event(LogEvent.METRICS_MISSING, reason=reason)
