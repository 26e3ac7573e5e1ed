"""P8: what goes wrong on the way to the server reaches the application as without the patch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from livekit.agents import APIConnectionError, APIConnectOptions, APIError, APIStatusError

import xai_pool_patch
from tests.kit import Line, line_to, quick, speak

SHORT_TIMEOUT = APIConnectOptions(max_retry=0, timeout=0.2)
RETRYING = APIConnectOptions(max_retry=1, retry_interval=0.01, timeout=0.2)


@dataclass
class Outcome:
    """All that an application can see of a turn that failed, and what the server saw."""

    error: str
    status: int | None
    retryable: bool | None
    cause: str
    events: list[tuple[str, bool]]
    dials: int

    @classmethod
    def of(cls, line: Line, error: Exception | None) -> Outcome:
        return cls(
            error=f"{type(error).__name__}: {getattr(error, 'message', error)}",
            status=error.status_code if isinstance(error, APIStatusError) else None,
            retryable=error.retryable if isinstance(error, APIError) else None,
            cause=type(error.__cause__).__name__ if error is not None else "",
            events=[(type(event.error).__name__, event.recoverable) for event in line.errors],
            # One TCP connection may carry several attempts, and another none.
            dials=max(line.server.network.accepted, len(line.server.handshakes)),
        )


Prepare = Callable[[Line], dict[str, Any]]
"""Makes the dial fail. Returns what the TTS is made with."""


def refuse(status: int) -> Prepare:
    def prepare(line: Line) -> dict[str, Any]:
        line.server.behaviour.refuse = status
        return {}

    return prepare


def wrong_key(line: Line) -> dict[str, Any]:
    return {"api_key": "wrong"}


def unknown_voice(line: Line) -> dict[str, Any]:
    line.server.behaviour.voices = {"ara"}
    return {"voice": "nobody"}


def refused_connection(line: Line) -> dict[str, Any]:
    line.server.network.refuse = True
    return {}


def stalled_dial(line: Line) -> dict[str, Any]:
    line.server.network.stall_new = True
    return {}


REFUSALS = {
    400: unknown_voice,
    401: wrong_key,
    403: refuse(403),
    404: refuse(404),
    429: refuse(429),
}
FAILURES = {
    "503": refuse(503),
    "connection refused": refused_connection,
    "the caller's timeout": stalled_dial,
}
with_and_without_a_retry = pytest.mark.parametrize(
    "options", [SHORT_TIMEOUT, RETRYING], ids=["once", "with a retry"]
)


async def outcome(prepare: Prepare, options: APIConnectOptions) -> Outcome:
    async with line_to() as line:
        tts = line.tts(**prepare(line))
        heard = await speak(tts, "Hello.", options)
        seen = Outcome.of(line, heard.error)
        await tts.aclose()
        return seen


@with_and_without_a_retry
@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refused_handshake_is_a_status_error(
    patched: None, status: int, options: APIConnectOptions
) -> None:
    """A6: with its status, on every version of the plugin. Only if the framework takes that status
    for a passing one is there another dial."""
    is_tried_again = APIStatusError("", status_code=status).retryable and options.max_retry > 0
    assert await outcome(REFUSALS[status], options) == Outcome(
        error="APIStatusError: Invalid response status",
        status=status,
        retryable=APIStatusError("", status_code=status).retryable,
        cause="NoneType",
        events=[*[("APIStatusError", True)] * is_tried_again, ("APIStatusError", False)],
        dials=1 + is_tried_again,
    )


@with_and_without_a_retry
@pytest.mark.parametrize("case", FAILURES)
async def test_errors_are_the_same_as_without_the_patch(
    case: str, options: APIConnectOptions
) -> None:
    """The same exception, status, events and number of dials, with and without retries."""
    before = await outcome(FAILURES[case], options)
    assert before.error != "NoneType: None", "nothing went wrong"
    xai_pool_patch.install()
    try:
        after = await outcome(FAILURES[case], options)
    finally:
        xai_pool_patch.uninstall()
    assert after == before


@pytest.mark.parametrize("patched", [None], indirect=True)
async def test_the_timeout_covers_the_wait_for_a_standby(patched: None) -> None:
    """A caller that relies on a hanging standby fails at its own timeout."""
    async with line_to() as line:
        line.server.network.stall_new = True
        tts = line.tts()
        tts.prewarm()
        await line.server.wait_for(lambda server: server.network.accepted == 1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        heard = await speak(tts, "Hello.", SHORT_TIMEOUT)
        assert loop.time() - began < 5.0
        assert isinstance(heard.error, APIConnectionError)
        await tts.aclose()


@pytest.mark.parametrize(
    "fault",
    [{"error_on_text": "no such thing"}, {"raw_before_audio": ["{not json"]}],
    ids=["error frame", "malformed JSON"],
)
async def test_errors_of_a_fresh_connection_reach_the_plugin_unchanged(
    fault: dict[str, Any],
) -> None:
    """As the server sent them."""

    async def once() -> Outcome:
        async with line_to(quick(**fault)) as line:
            tts = line.tts()
            heard = await speak(tts, "Hello.")
            seen = Outcome.of(line, heard.error)
            await tts.aclose()
            seen.dials = len(line.server.utterances)
            return seen

    before = await once()
    assert before.error != "NoneType: None", "nothing went wrong"
    xai_pool_patch.install()
    try:
        after = await once()
    finally:
        xai_pool_patch.uninstall()
    assert after == before


async def test_no_utterance_follows_a_failed_one_on_its_connection(patched: None) -> None:
    """L2: after an error frame nobody knows what may still come."""
    async with line_to(quick(error_on_text="no")) as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.server.behaviour.error_on_text = None
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.server.utterances[0].connection != line.server.utterances[-1].connection
        await tts.aclose()
