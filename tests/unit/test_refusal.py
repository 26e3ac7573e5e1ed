"""S3a: what counts as a refusal for want of a session."""

from __future__ import annotations

from typing import Any, cast

import aiohttp
import pytest

from xai_pool_patch.sessions.refusal import is_refusal, says_refused

NO_REQUEST = cast("Any", None)


@pytest.mark.parametrize("status", [403, 429, 500, 502, 503, 504, 599])
def test_a_handshake_that_the_server_refused(status: int) -> None:
    """Whoever dialled."""
    assert is_refusal(aiohttp.WSServerHandshakeError(NO_REQUEST, (), status=status))


@pytest.mark.parametrize("status", [0, 200, 302, 400, 401, 404, 407, 426, 428, 499, 600])
def test_a_handshake_that_failed_for_another_reason(status: int) -> None:
    """The request is wrong, or something that is no server of WebSockets answered."""
    assert not is_refusal(aiohttp.WSServerHandshakeError(NO_REQUEST, (), status=status))


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientHttpProxyError(NO_REQUEST, (), status=503),
        aiohttp.ClientResponseError(NO_REQUEST, (), status=429),
        aiohttp.ServerDisconnectedError(),
        ConnectionResetError(),
        TimeoutError(),
    ],
)
def test_a_handshake_that_failed_on_the_way(error: Exception) -> None:
    """One machine's bad line, or its proxy, must not cost a fleet."""
    assert not is_refusal(error)


@pytest.mark.parametrize("code", [1008, 1013])
def test_a_close_that_is_a_refusal(code: int) -> None:
    """Policy violation, try again later."""
    assert says_refused(code)


@pytest.mark.parametrize("code", [None, 1000, 1001, 1002, 1006, 1009, 1011, 1012, 4000])
def test_any_other_close(code: int | None) -> None:
    """It says nothing of sessions."""
    assert not says_refused(code)


@pytest.mark.parametrize(
    "message",
    [
        "Too many concurrent sessions.",
        "too many concurrent requests",
        "Concurrent session limit reached",
        "Maximum number of concurrent sessions reached",
        "You have exceeded the limit of 50 concurrent streams.",
        "Concurrency limit exceeded for team 7; retry in 5 seconds",
        "Rate limit exceeded: too many open connections",
        "Connection limit (50) reached.",
        "session quota exhausted",
        "The number of streams exceeds your plan.",
        "Maximum of 100 simultaneous WebSocket connections reached",
        "Your team has reached its session limit. Try again in 30 seconds.",
        "No more sessions available",
        "max_sessions: too many sessions",
        "RESOURCE_EXHAUSTED: no capacity for new sessions",
        "Too many text-to-speech sessions for this token",
        "The team's limit of sessions is reached; it's full",
        "The team's sessions' limit is reached",
    ],
)
def test_an_error_that_names_the_limit(message: str) -> None:
    """Sessions, streams, connections or concurrency, and a word for the limit beside it."""
    assert says_refused(error_message=message)


@pytest.mark.parametrize(
    "message",
    [
        "character limit exceeded",
        "Text exceeds the limit of 15000 characters.",
        "The text stream exceeds the limit of 15000 characters",
        "max length of a stream is 15000",
        "TTS pipeline timed out after 2101s. Deadline expired",
        "Stream exceeded its maximum duration",
        "Rate limit exceeded",
        "session not found",
        "Connection reset by peer",
        "stream closed",
        "Invalid session. Voice limits apply to other requests of this kind",
        "there are too many people",
        "Cannot speak: too many people in the room, said the man on the stream",
        'Cannot speak "there are too many sessions"',
        "Cannot speak 'there are too many sessions'",
        "Cannot speak “too many connections”",
        "Cannot speak `too many connections`",
        "The progression exceeded expectations",
        "unlimited sessions",
        "",
        None,
        17,
        {"limit": "sessions"},
        ["too many sessions"],
    ],
)
def test_an_error_of_another_kind(message: object) -> None:
    """A limit of something else, something else of a session, or the spoken text."""
    assert not says_refused(error_message=message)


def test_a_message_without_end() -> None:
    """It is judged in no time."""
    assert not says_refused(error_message="limit \"' " * 200_000)
