"""Code of the application that runs inside a dial finds what it finds unpatched; what it raises is
a dial that failed, and the patch stays on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import aiohttp
import pytest
from livekit.agents import APIConnectionError, APIError, JobContext, get_job_context
from livekit.agents.job import _JobContextVar
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import xai_pool_patch
from tests.kit import Line, hear_whole, line_to, speak
from tests.live.never_worse import (
    EITHER,
    ROUND_TRIP,
    as_far_as_xai,
    dials_unpatched,
    far,
    faults,
    installed,
)

CALL: contextvars.ContextVar[str] = contextvars.ContextVar("call")


@contextlib.asynccontextmanager
async def traced_by(hook: Callable[[], object]) -> Any:
    """A line whose HTTP session calls the hook at each request."""

    async def on_request_start(session: Any, context: Any, params: Any) -> None:
        hook()

    config = aiohttp.TraceConfig()
    config.on_request_start.append(on_request_start)
    async with (
        line_to(far(), ROUND_TRIP) as line,
        line.server.client_session(trace_configs=[config]) as http,
    ):
        yield Line(line.server, http)


@contextlib.contextmanager
def in_a_call() -> Iterator[None]:
    token = CALL.set("call-1")
    yield
    CALL.reset(token)


@contextlib.contextmanager
def in_a_job() -> Iterator[None]:
    job = mock.MagicMock(spec=JobContext, _redaction_enabled=False)  # read by 1.7 and 1.8.0
    token = _JobContextVar.set(job)
    yield
    _JobContextVar.reset(token)


@EITHER
@pytest.mark.parametrize(
    ("reads", "inside"),
    [(CALL.get, in_a_call), (get_job_context, in_a_job)],
    ids=["a context variable", "the job's context"],
)
async def test_a_trace_hook_that_reads_its_context(
    reads: Callable[[], object],
    inside: Callable[[], Any],
    is_patched: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a turn waits for the dial it is the turn's. The patch reuses as ever."""
    with installed(is_patched), inside():
        async with traced_by(reads) as line:
            tts = line.tts()
            for number in range(3):
                await hear_whole(line, tts, f"Turn {number}.")
                await asyncio.sleep(1.0)
            assert line.errors == []
            dials = 1 if is_patched else dials_unpatched(3)
            assert len(line.server.connections) == dials
            if is_patched:
                assert xai_pool_patch.stats()["connections_reused"] == 2
            await tts.aclose()
    assert faults(caplog) == []


async def test_a_standby_outside_of_any_context_is_a_dial_that_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A hook that raises there costs the turns what a dial costs, and no more."""
    with installed(), in_a_call():
        async with traced_by(CALL.get) as line:
            tts = line.tts()
            for number in range(3):
                await hear_whole(line, tts, f"Turn {number}.")
                await line.server.close_all()
                await asyncio.sleep(1.0)
            assert line.errors == []
            await tts.aclose()
    assert faults(caplog) == []


@EITHER
async def test_a_trace_hook_that_raises(is_patched: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The turn fails as unpatched, and the turns after it are pooled."""
    broken = True

    def hook() -> None:
        if broken:
            raise ZeroDivisionError

    with installed(is_patched):
        async with traced_by(hook) as line:
            tts = line.tts()
            heard = await speak(tts, "Not heard.")
            assert isinstance(heard.error, APIConnectionError)
            assert not isinstance(heard.error, APIError) or heard.error.retryable
            assert len(line.errors) == 1
            broken = False
            for number in range(3):
                await hear_whole(line, tts, f"Turn {number}.")
            assert len(line.server.connections) == (1 if is_patched else dials_unpatched(3))
            await tts.aclose()
    assert faults(caplog) == []


@EITHER
async def test_the_span_of_a_handshake_is_part_of_its_turn(is_patched: bool) -> None:
    """Five turns that dial: none of the handshakes begins a trace of its own."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer(__name__)
    handshakes: list[int] = []
    turns: list[int] = []

    def hook() -> None:
        handshakes.append(trace.get_current_span().get_span_context().trace_id)

    with installed(is_patched):
        async with traced_by(hook) as line:
            for voice in ("ara", "eve", "rex", "sal", "leo"):
                tts = line.tts(voice=voice)
                with tracer.start_as_current_span("turn") as span:
                    await hear_whole(line, tts, f"Said by {voice}.")
                turns.append(span.get_span_context().trace_id)
                await tts.aclose()
    assert 0 not in turns
    assert handshakes == turns


@EITHER
async def test_a_slow_hook_is_part_of_the_dial(is_patched: bool) -> None:
    """A turn that ends meanwhile leaves nothing behind."""

    async def slow(session: Any, context: Any, params: Any) -> None:
        await asyncio.sleep(10.0)

    config = aiohttp.TraceConfig()
    config.on_request_start.append(slow)
    with installed(is_patched):
        async with (
            as_far_as_xai() as line,
            line.server.client_session(trace_configs=[config]) as http,
        ):
            tts = line.tts(http_session=http)
            heard = await speak(tts, "Too slow.")
            assert isinstance(heard.error, APIConnectionError)
            await tts.aclose()
