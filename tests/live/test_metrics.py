"""T3: Prometheus metrics, as LiveKit's own page shows them, and events on LiveKit's spans."""

from __future__ import annotations

import asyncio
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from livekit.agents import APIStatusError, telemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import xai_pool_patch
from tests.kit import API_KEY, event_of, line_to, python, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.telemetry import metrics
from xai_pool_patch.telemetry.pool_metrics import PoolMetrics
from xai_pool_patch.telemetry.usage import Totals
from xai_pool_patch.testing import Ending

DOCS = Path(__file__).parents[2] / "docs/observability.md"

ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in DOCS.read_text().splitlines()
    if line.startswith(f"| `{metrics.PREFIX}")
    for cells in [[cell.strip() for cell in line.split("|")[1:-1]]]
}
"""The documentation's table, by metric: the type, the labels, the statistics and the text."""

Samples = dict[tuple[str, str], float]
"""By name without its prefix, and the value of the label."""


def samples() -> Samples:
    return {
        (sample.name.removeprefix(metrics.PREFIX), ",".join(sample.labels.values())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(metrics.PREFIX)
    }


class Increase:
    """What has happened since it was made."""

    def __init__(self) -> None:
        self._before = samples()

    def __getitem__(self, key: tuple[str, str]) -> float:
        return samples()[key] - self._before[key]


async def test_waits_and_handshakes_are_histograms_in_seconds(patched: None) -> None:
    """The buckets are cumulative, and the count is that of the last one."""
    since = Increase()
    async with line_to(round_trip=0.1) as line:
        tts = line.tts()
        for number in range(3):
            await speak(tts, f"Turn {number}.")
        assert since["connections_reused_total", ""] == 2
        for name in ("connection_wait_seconds", "connect_seconds"):
            assert since[f"{name}_count", ""] == since[f"{name}_bucket", "+Inf"] == 1
            assert 0.3 <= since[f"{name}_sum", ""] < 5.0
            assert since[f"{name}_bucket", "0.25"] == 0
            assert since[f"{name}_bucket", "10.0"] == 1
        await tts.aclose()


REASONS = [reason for reason in metrics.CLOSED.numbers if reason != metrics.OTHER]

EVENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("reused", ()),
    ("waited", (0.1,)),
    ("connected", (0.1,)),
    ("standby_failed", (OSError(), 0.5)),
    *(("closed", (reason, 1.0, None)) for reason in REASONS),
    ("sign_used", ()),
    ("sign_unused", ()),
    ("rate_limited", ()),
    ("cleared", ()),
    ("replayed", (0.1, "no sign of life")),
]
"""Those that a pool counts, and what it says of each."""


def told_by(event: str, arguments: tuple[Any, ...]) -> tuple[str, set[str]]:
    """The metric and the statistics that count an event."""
    reports, before = PoolMetrics(1), values()
    getattr(reports, event)(*arguments)
    [metric] = [name for name, value in values().items() if value > before[name]]
    return metric, {name for name, total in reports.counters.totals.items() if total}


def values() -> dict[str, float]:
    return {m.name: sum(n.value.get() for n in m.numbers.values()) for m in metrics.METRICS}


def test_each_statistic_is_a_metric() -> None:
    """As the documentation's table says. A longest time is none: it cannot be added up."""
    told: dict[str, set[str]] = {name: set() for name in ROWS}
    for event, arguments in EVENTS:
        metric, statistics = told_by(event, arguments)
        told[metric] |= statistics
    assert set().union(*told.values()) == Totals.__annotations__.keys()
    longest, closed = {"acquire_wait_ms_max", "connect_ms_max"}, {f"closed_{r}" for r in REASONS}
    for name, (_, _, statistic, _) in ROWS.items():
        documented = set(re.findall("`(.+?)`", statistic))
        assert told[name] - longest == (closed if documented == {"closed_<reason>"} else documented)


async def test_closes_and_failures_are_counted_by_reason() -> None:
    """Few values each, and none is a voice, a key or a URL."""
    since = Increase()
    xai_pool_patch.install(PoolOptions(warm="always"))
    async with line_to(quick()) as line:
        tts = line.tts(voice="a voice of somebody's own")
        await speak(tts, "First.")
        line.server.behaviour.refuse_next = [503]
        line.server.reset_all()
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        while not xai_pool_patch.stats()["idle"]:
            await asyncio.sleep(0)
        line.server.behaviour.end_before_audio = Ending.CLOSE
        turn = asyncio.create_task(speak(tts, "Second."))
        await line.server.wait_for(lambda s: not s.connections[1].is_open)
        line.server.behaviour.end_before_audio = None
        assert (await turn).error is None
        await tts.aclose()
    assert since["connections_closed_total", "lost"] == 2
    assert since["standby_failures_total", "5xx"] == 1
    assert since["replays_total", "ended by the peer"] == 1
    text = str(samples())
    for secret in (API_KEY, "somebody", "api.x.ai"):
        assert secret not in text
    xai_pool_patch.uninstall()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (APIStatusError("", status_code=401), "401"),
        (APIStatusError("", status_code=429), "429"),
        (APIStatusError("", status_code=404), "4xx"),
        (APIStatusError("", status_code=503), "5xx"),
        (APIStatusError("", status_code=301), "4xx"),
        (asyncio.TimeoutError(), "timeout"),
        (type("Made_up", (Exception,), {})(), "connection"),
    ],
)
def test_an_error_is_one_of_few_kinds(error: Exception, kind: str) -> None:
    """A label with the names of exceptions would have any number of values."""
    assert metrics.kind_of(error) == kind
    metrics.STANDBY_FAILURES.count(kind)


def test_a_reason_that_nobody_has_listed_is_other(patched: None) -> None:
    """It is counted, and adds no series."""
    since = Increase()
    metrics.REPLAYS.count("something new")
    assert since["replays_total", metrics.OTHER] == 1


def test_everything_is_there_at_0_before_anything_happens() -> None:
    """`increase()` sees no first event that comes with its series. What is installed is told."""
    page = run(
        """
        import xai_pool_patch, prometheus_client
        from livekit.plugins import xai
        xai_pool_patch.install()
        print(prometheus_client.generate_latest().decode())
        """
    )
    shown = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith(metrics.PREFIX)
    }
    [(info, one)] = [(key, value) for key, value in shown.items() if value]
    assert (info[0], one) == ("xai_pool_patch_info", 1.0)
    assert xai_pool_patch.__version__ in info
    for metric in metrics.METRICS:
        if metric.kind == "counter":
            for value in metric.numbers:
                assert (metric.name, *([value] if value else [])) in shown


def infos() -> list[float]:
    """One value for each combination of versions that this process has had installed."""
    return sorted(value for (name, _), value in samples().items() if name == "info")


async def test_the_info_is_0_once_uninstalled() -> None:
    """And 1 again, without a second series, once it is installed again."""
    xai_pool_patch.install()
    installed = infos()
    assert installed == [0.0] * (len(installed) - 1) + [1.0]
    xai_pool_patch.uninstall()
    assert infos() == [0.0] * len(installed)
    xai_pool_patch.install()
    assert infos() == installed
    xai_pool_patch.uninstall()


async def test_a_fault_is_counted(patched: None) -> None:
    """After it the plugin connects by itself."""
    from tests.kit import registry

    since = Increase()
    registry().fail("test", RuntimeError())
    assert since["failed_open_total", ""] == 1


def run(code: str, **environment: str) -> str:
    done = python(textwrap.dedent(code), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_registry_that_has_our_names_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The application's stay, and ours are counted all the same."""
    from prometheus_client import Counter

    registry = CollectorRegistry(auto_describe=True)  # as the usual one
    Counter("xai_pool_patch_replays", "the application's own", registry=registry)
    monkeypatch.setattr(metrics, "_has_warned", False)
    for _ in range(2):
        metrics.install({"version": "", "plugin": "", "agents": ""}, registry)
    metrics.uninstall()
    metrics.INFO.numbers.popitem()
    assert [event_of(record) for record in caplog.records] == ["metrics missing"]


IN_A_DIRECTORY = """
import asyncio, os, sys
import logging; logging.basicConfig()
import xai_pool_patch
xai_pool_patch.install()
from tests.kit import line_to, speak

async def main():
    async with line_to() as line:
        tts = line.tts()
        assert (await speak(tts, "Hello.")).error is None
        assert (await speak(tts, "Hello.")).error is None
        await tts.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["missing", "a file", "not writable"])
def test_a_directory_that_cannot_be_used_is_one_warning(kind: str, tmp_path: Path) -> None:
    """No turn is lost."""
    directory = tmp_path / "metrics"
    if kind == "a file":
        directory.write_text("")
    elif kind == "not writable":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        directory.mkdir(mode=0o500)
    said = run(IN_A_DIRECTORY, PROMETHEUS_MULTIPROC_DIR=str(directory))
    [warning] = [line for line in said.splitlines() if "WARNING" in line]
    assert "PROMETHEUS_MULTIPROC_DIR cannot be used" in warning


def test_what_was_counted_before_the_files_were_opened_is_in_them(tmp_path: Path) -> None:
    """The files are opened beside the first turn, in a thread."""
    code = """
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    from xai_pool_patch.telemetry import metrics
    metrics.share()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
    """
    page = run(IN_A_DIRECTORY + textwrap.dedent(code), PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert "xai_pool_patch_connections_reused_total 1.0" in page
    assert "xai_pool_patch_connection_wait_seconds_count 1.0" in page
    assert 'xai_pool_patch_connections_closed_total{reason="shutdown"} 1.0' in page
    assert 'xai_pool_patch_replays_total{reason="no sign of life"} 0.0' in page


def test_a_directory_that_is_emptied_gets_its_files_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `AgentServer.run` does it, with what had been counted."""
    from prometheus_client import multiprocess

    def shown() -> float:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
        value = registry.get_sample_value("xai_pool_patch_dials_refused_total")
        assert value is not None
        return value

    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path))
    numbers = [number for metric in metrics.METRICS for number in metric.numbers.values()]
    before = [number.value for number in numbers]
    try:
        metrics.share()
        first = shown()
        metrics.REFUSED.count()
        assert shown() == first + 1
        for file in tmp_path.iterdir():
            file.unlink()
        metrics.share()
        assert shown() == first + 1
        metrics.share()
        assert shown() == first + 1, "counted twice"
    finally:
        for number, value in zip(numbers, before, strict=True):
            number.value = value
        monkeypatch.setattr(metrics, "_file", None)


async def test_a_workers_metrics_page_shows_them(patched: None) -> None:
    """LiveKit's own, with nothing else done."""
    async with line_to() as line:
        tts = line.tts()
        for number in range(3):
            await speak(tts, f"Turn {number}.")
        server = telemetry.http_server.HttpServer("127.0.0.1", 0)
        await server.start()
        url = f"http://127.0.0.1:{server.port}/metrics"
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            page = await response.text()
        await server.aclose()
        await tts.aclose()
    for metric in metrics.METRICS:
        assert f"\n{metric.name}" in page
    assert re.search(r"\nxai_pool_patch_connections_reused_total [1-9]", page)


@pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_documented(patched: None, metric: metrics.Metric) -> None:
    """With its kind, its labels and its text, as the table in the code has them."""
    names = {name: None for number in metric.numbers.values() for name in number.labels}
    labels = ", ".join(f"`{name}`" for name in names if name != "le")
    kind, documented, _, text = ROWS[metric.name]
    assert (kind, documented, text) == (metric.kind, labels, metric.text)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Those of livekit-agents."""
    exporter, before = InMemorySpanExporter(), telemetry.tracer._tracer_provider
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.set_tracer_provider(provider)
    yield exporter
    telemetry.set_tracer_provider(before)


def span_events(spans: InMemorySpanExporter) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (span.name, event.name, dict(event.attributes or {}))
        for span in spans.get_finished_spans()
        for event in span.events
        if event.name.startswith("xai_pool_patch")
    ]


async def test_a_wait_is_an_event_of_the_request_span(
    patched: None, spans: InMemorySpanExporter
) -> None:
    """It explains a slow turn. A turn that did not wait has none."""
    async with line_to(round_trip=0.01) as line:
        tts = line.tts()
        for number in range(2):
            await speak(tts, f"Turn {number}.")
        [(span, event, attributes)] = span_events(spans)
        assert (span, event) == ("tts_request", "xai_pool_patch.waited")
        assert attributes.keys() == {"wait_ms"}
        assert attributes["wait_ms"] == pytest.approx(line.metrics[0].acquire_time * 1e3, abs=0.1)
        await tts.aclose()


async def test_a_replay_is_an_event_of_the_request_span(
    patched: None, spans: InMemorySpanExporter
) -> None:
    """Though the pool's tasks begin it."""
    async with line_to(quick(), round_trip=0.01) as line:
        tts = line.tts()
        await speak(tts, "First.")
        spans.clear()
        line.server.behaviour.end_before_audio = Ending.CLOSE
        turn = asyncio.create_task(speak(tts, "Second."))
        await line.server.wait_for(lambda s: not s.connections[0].is_open)
        line.server.behaviour.end_before_audio = None
        await turn
        [(span, event, attributes)] = span_events(spans)
        assert (span, event) == ("tts_request", "xai_pool_patch.replayed")
        assert attributes["reason"] == "ended by the peer"
        assert attributes["wait_ms"] > 0
        await tts.aclose()
