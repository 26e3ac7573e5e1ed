"""T3: OpenTelemetry metrics and span events, through the SDK's own readers and exporters."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from livekit.agents import telemetry
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import xai_pool_patch
from tests.kit import API_KEY, line_to, quick, registry, speak
from tests.otel import empty_reader
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import Ending

Points = dict[tuple[str, str], Any]
"""By instrument, without its prefix, and the values of its attributes."""


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return empty_reader()


def instruments(reader: InMemoryMetricReader) -> Iterator[Any]:
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            if scope.scope.name == "xai_pool_patch":
                assert scope.scope.version == xai_pool_patch.__version__
                yield from scope.metrics


def points(reader: InMemoryMetricReader) -> Points:
    found: Points = {}
    for instrument in instruments(reader):
        name = instrument.name.removeprefix("xai_pool_patch.")
        for point in instrument.data.data_points:
            values = ",".join(str(value) for value in point.attributes.values())
            assert (name, values) not in found, "observed twice"
            found[name, values] = point
    return found


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


async def test_waits_and_handshakes(patched: None, reader: InMemoryMetricReader) -> None:
    """Histograms in seconds; the share of utterances that found a connection is in one of them."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        for number in range(3):
            await speak(tts, f"Turn {number}.")
        found = points(reader)
        assert found["connection.wait_time", "True"].count == 2
        assert found["connection.wait_time", "True"].sum == 0.0
        waited = found["connection.wait_time", "False"]
        assert waited.count == found["connection.create_time", ""].count == 1
        assert 0.06 <= found["connection.create_time", ""].sum <= waited.sum < 5.0
        assert any(0 < bound < 0.1 for bound in waited.explicit_bounds), "made for milliseconds"
        await tts.aclose()


async def test_connections_by_state(patched: None, reader: InMemoryMetricReader) -> None:
    """Observed when asked for: all states, always."""

    def counts() -> list[int]:
        found = points(reader)
        states = ("idle", "leased", "clearing", "connecting")
        assert len([name for name, _ in found if name == "connection.count"]) == len(states)
        return [found["connection.count", state].value for state in states]

    assert counts() == [0, 0, 0, 0]
    behaviour = quick(pace=5.0, speech_per_character=0.02)
    async with line_to(behaviour) as line:
        tts = line.tts()
        async with tts.stream() as stream:
            stream.push_text("This takes a moment.")
            stream.end_input()
            await stream.__anext__()
            assert counts() == [0, 1, 0, 0]
            async for _ in stream:
                pass
        assert counts() == [1, 0, 0, 0]
        await tts.aclose()
        assert counts() == [0, 0, 0, 0]


async def test_discards_and_failures_by_reason(reader: InMemoryMetricReader) -> None:
    """Few values each, and none of them a voice, a key or a URL."""
    xai_pool_patch.install(PoolOptions(first_audio_timeout=0.2))
    async with line_to(quick()) as line:
        tts = line.tts(voice="a voice of somebody's own")
        await speak(tts, "First.")
        line.server.behaviour.refuse_next = [503]
        line.server.reset_all()
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        while not xai_pool_patch.stats()["idle"]:
            await asyncio.sleep(0)
        line.server.behaviour.mute = True
        turn = asyncio.create_task(speak(tts, "Second."))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        line.server.behaviour.mute = False
        assert (await turn).error is None
        await tts.aclose()
        found = points(reader)
        assert found["connection.closed", "lost"].value == 2
        assert found["connection.standby_failures", "503"].value == 1
        assert found["utterance.replays", "no answer"].value == 1
        told = str(found)
        for secret in (API_KEY, "somebody", "api.x.ai"):
            assert secret not in told
    xai_pool_patch.uninstall()


async def test_on_off_on_observes_once_and_keeps_nothing(reader: InMemoryMetricReader) -> None:
    """What is uninstalled is neither observed nor kept alive, and asking does not fail."""
    for _ in range(3):
        xai_pool_patch.install()
        xai_pool_patch.install()
        async with line_to() as line:
            tts = line.tts()
            await speak(tts, "Hello.")
            assert points(reader)["connection.count", "idle"].value == 1
            installed = weakref.ref(registry())
            xai_pool_patch.uninstall()
            await line.server.wait_for(lambda s: s.open_count == 0)
            del tts
        gc.collect()
        assert installed() is None
        assert points(reader)["connection.count", "idle"].value == 0


async def test_units(patched: None, reader: InMemoryMetricReader) -> None:
    """Those of the semantic conventions for connection pools."""
    async with line_to(quick(max_sessions=1)) as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        other = line.tts(voice="eve")
        await speak(other, "Hello.")
        await tts.aclose()
        await other.aclose()
    units = {i.name.removeprefix("xai_pool_patch."): i.unit for i in instruments(reader)}
    assert units == {
        "connection.count": "{connection}",
        "connection.create_time": "s",
        "connection.wait_time": "s",
        "connection.closed": "{connection}",
        "connection.rate_limited": "{dial}",
        "pool.lean": "{pool}",
    }


async def test_on_the_metrics_page_of_a_worker(patched: None, reader: InMemoryMetricReader) -> None:
    """With a Prometheus reader in the process, LiveKit's own /metrics shows them."""
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
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    promised = set(re.findall(r"xai_pool_patch_\w+", readme))
    assert "xai_pool_patch_connection_wait_time_seconds_count" in promised
    assert {name for name in promised if f"\n{name}{{" not in page} == set()
    assert re.search(r'\nxai_pool_patch_connection_wait_time_seconds_count{.*reused="true"', page)


async def test_a_wait_is_an_event_of_the_request_span(
    patched: None, spans: InMemorySpanExporter
) -> None:
    """Whoever looks at a slow turn sees what it waited for; a turn that did not wait has none."""
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
    """Though it is the pool's tasks that notice and mend it."""
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
