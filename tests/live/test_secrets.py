"""T2: no key, header or spoken text in anything that the patch logs, shows or hands on."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from livekit import agents
from livekit.agents import APIConnectOptions, telemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

import xai_pool_patch
from tests.kit import API_KEY, Heard, line_to, quick, speak
from tests.live.test_errors import FAILURES, REFUSALS
from tests.live.test_faults import FAULTS, ROUND_TRIP, TEXT, _inject
from xai_pool_patch import PoolOptions

OPTIONS = PoolOptions(heartbeat=0.4)
VOICE = "somebodys-own-voice"
FIRST_TEXT = "Whatever was spoken first."
SECRETS = (
    API_KEY,
    "'wrong'",
    "Bearer",
    "Authorization",
    VOICE,
    *TEXT.split()[-2:],
    "Whatever",
    "spoken",
)


@pytest.fixture
def output(caplog: pytest.LogCaptureFixture) -> Iterator[Output]:
    caplog.set_level(logging.DEBUG)
    output, before = Output(caplog), telemetry.tracer._tracer_provider
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(output.spans))
    telemetry.set_tracer_provider(provider)
    xai_pool_patch.install(OPTIONS)
    yield output
    xai_pool_patch.uninstall()
    telemetry.set_tracer_provider(before)


class Output:
    """Everything in which a secret might appear: records, objects, metrics, errors."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.spans = InMemorySpanExporter()
        self.errors: list[str] = []

    def note(self, event: Any) -> None:
        """At once: the framework raises it with another context to the caller."""
        self.errors += exception_texts(event.error)

    def records(self) -> Iterator[str]:
        for record in self._caplog.records:
            if record.name.startswith("xai_pool_patch"):
                every = " ".join(f"%({attribute})s" for attribute in vars(record))
                yield logging.Formatter(every).format(record)
                yield repr(vars(record))

    def objects(self) -> Iterator[str]:
        for thing in gc.get_objects():
            module = str(getattr(type(thing), "__module__", ""))
            if module.startswith("xai_pool_patch") and not module.startswith(
                ("xai_pool_patch.demo", "xai_pool_patch.testing")
            ):
                yield repr(thing)
                yield str(thing)
        for task in asyncio.all_tasks():
            if task.get_name().startswith("xai_pool_patch"):
                yield repr(task)

    def measured(self) -> Iterator[str]:
        yield repr(xai_pool_patch.stats())
        yield repr(xai_pool_patch.pool_stats())
        for line in generate_latest().decode().splitlines():
            if line.startswith("xai_pool_patch"):
                yield line.partition("{")[2]  # a word of the text may be one of a name
        for span in self.spans.get_finished_spans():
            for event in span.events:
                if event.name.startswith("xai_pool_patch"):
                    yield repr((event.name, dict(event.attributes or {})))

    def check(self, *heard: Heard) -> None:
        errors = [text for one in heard if one.error for text in exception_texts(one.error)]
        texts = [*self.records(), *self.objects(), *self.measured(), *self.errors, *errors]
        assert [text for text in texts if any(secret in text for secret in SECRETS)] == []


def exception_texts(error: BaseException) -> Iterator[str]:
    """As it is printed, and each of its chain by itself, those included that are not printed."""
    # Without the lines of source code, which may have any word: Python 3.13 quotes more of them.
    yield "".join(traceback.format_exception(error, limit=0))
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield f"{link!r} {link!s} {link.args!r} {vars(link)!r}"
            chain += [link.__cause__, link.__context__]


@pytest.mark.parametrize("name", FAULTS)
async def test_no_secret_appears_during_any_fault(name: str, output: Output) -> None:
    """Nor after it."""
    times = {"pace": 20.0, "speech_per_character": 0.02}
    async with line_to(quick(**times), ROUND_TRIP) as line:
        tts = line.tts(voice=VOICE)
        tts.on("error", output.note)
        await speak(tts, FIRST_TEXT)
        injecting = asyncio.create_task(_inject(line, FAULTS[name]))
        turn = asyncio.create_task(
            speak(tts, TEXT, APIConnectOptions(max_retry=0, timeout=2.0), heard=Heard())
        )
        await asyncio.sleep(2 * ROUND_TRIP)  # in its midst: a dial takes three
        output.check()
        heard = await turn
        injecting.cancel()
        output.check(heard)
        line.server.network.unfreeze()
        await tts.aclose()
        output.check(heard)


@pytest.mark.parametrize("name", [*REFUSALS, *FAILURES])
async def test_no_secret_appears_after_a_failed_dial(name: Any, output: Output) -> None:
    """aiohttp's own errors carry the headers of the request; the patch's must not."""
    async with line_to() as line:
        prepared = {**REFUSALS, **FAILURES}[name](line)
        tts = line.tts(**{"voice": VOICE, **prepared})
        tts.on("error", output.note)
        tts.prewarm()
        options = APIConnectOptions(max_retry=0, timeout=0.3)
        heard = [await speak(tts, TEXT, options) for _ in range(2)]
        assert output.errors
        output.check(*heard)
        await tts.aclose()
        output.check(*heard)


async def test_ignored_messages_are_logged_without_their_content(output: Output) -> None:
    """Their type is logged only if it looks like one."""
    async with line_to() as line:
        tts = line.tts(voice=VOICE)
        await speak(tts, FIRST_TEXT)
        for kind in ("session.updated", FIRST_TEXT, API_KEY):
            await line.server.broadcast(json.dumps({"type": kind, "text": TEXT}))
        while "".join(output.records()).count("ignored while idle") < 3 * 2:
            await asyncio.sleep(0)
        output.check()
        assert any("session.updated" in text for text in output.records())
        await tts.aclose()


def test_the_search_itself_finds_a_key(output: Output) -> None:
    """In a record, in an object, and in an exception that is not printed."""
    from xai_pool_patch.pool.backoff import FailureKind
    from xai_pool_patch.pool.pool import DialFailedError
    from xai_pool_patch.telemetry.log import LogEvent, log_event

    log_event(LogEvent.CLOSED, reason=API_KEY)
    hidden = DialFailedError(OSError(), FailureKind.TRANSIENT)
    hidden.args = (API_KEY,)
    shown = agents.APIError("shown")
    shown.__context__, shown.__suppress_context__ = hidden, True
    for found in (output.records(), output.objects(), exception_texts(shown)):
        assert any(API_KEY in text for text in found)
