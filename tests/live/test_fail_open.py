"""A4: a fault of the patch itself never silences the agent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

from tests.kit import (
    API_KEY,
    HAS_NATIVE_POOL,
    ONCE,
    all_closed,
    event_of,
    line_to,
    quick,
    registry,
    speak,
)
from xai_pool_patch.plugin.conversation import Conversation, enter_conversation
from xai_pool_patch.pool.pool import OVERLAP

pytestmark = pytest.mark.usefixtures("patched")

RETRYING = APIConnectOptions(max_retry=1, retry_interval=0.01, timeout=2.0)

BEFORE_THE_UTTERANCE = [
    "protocol.exchange.Exchange._begin",
    "registry.Registry.here",
    "manager.PoolManager.register",
    "plugin.asking.Asking.request_of",
    "plugin.provider.Turn.end",
    "plugin.provider.Turn.acquired",
    "plugin.provider._job",
    "telemetry.pool_metrics.PoolMetrics.reused",
    "pool.pool.Pool.acquire",
    "pool.pool.Pool._take_idle",
    "protocol.exchange.Exchange.__post_init__",
    "protocol.lease.Lease.__init__",
]
DURING_THE_UTTERANCE = [
    "protocol.connection.Connection._take",
    "protocol.utterance.UtteranceTracker.received",
    "protocol.exchange.Exchange._hear",
]
AFTER_THE_UTTERANCE = [
    "protocol.lease.Lease.end",
    "pool.pool.Pool.give_back",
    "pool.pool.Pool._offer",
]


class BugError(Exception):
    def __init__(self) -> None:
        super().__init__("a bug of ours, with a secret in its message")


class Session:
    """All that a conversation asks of one."""


def break_(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise BugError

    monkeypatch.setattr(f"xai_pool_patch.{part}", broken)


def check_log(caplog: pytest.LogCaptureFixture, part: str) -> None:
    """Once, at ERROR, with the place and without the message."""
    [record] = [r for r in caplog.records if r.name == "xai_pool_patch" and r.levelname == "ERROR"]
    assert event_of(record) == "failed open"
    assert record.xai_pool_error.startswith("BugError at broken:")  # type: ignore[attr-defined]
    assert "secret" not in str(vars(record))


async def two_turns_with_a_fault(
    part: str,
    options: APIConnectOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> list[Any]:
    """Both are spoken, and the fault is logged once. Returns the error events."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Zero.")
        break_(monkeypatch, part)
        for text in ("First.", "Second."):
            heard = await speak(tts, text, options)
            assert heard.error is None
            assert heard.samples == {line.server.utterance_for(text).number}
        check_log(caplog, part)
        monkeypatch.undo()
        await tts.aclose()
        return line.errors


@pytest.mark.parametrize("part", [*BEFORE_THE_UTTERANCE, *AFTER_THE_UTTERANCE])
async def test_after_a_fault_around_an_utterance_the_turn_is_spoken(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no error event."""
    assert await two_turns_with_a_fault(part, ONCE, monkeypatch, caplog) == []


@pytest.mark.parametrize("part", DURING_THE_UTTERANCE)
async def test_after_a_fault_during_an_utterance_the_retry_is_spoken(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over the plugin's own connection."""
    await two_turns_with_a_fault(part, RETRYING, monkeypatch, caplog)


async def test_after_a_fault_in_the_dial_the_turn_is_spoken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The socket that was opened in vain is closed."""
    break_(monkeypatch, "manager.Connection")
    async with line_to() as line:
        tts = line.tts()
        heard = await speak(tts, "Hello.")
        assert heard.samples == {line.server.utterance_for("Hello.").number}
        assert line.errors == []
        check_log(caplog, "manager.Connection")
        await tts.aclose()
        await all_closed(line.server)


@pytest.mark.parametrize("later", [0.0, OVERLAP / 2])
async def test_a_fault_while_a_session_asks_twice(later: float) -> None:
    """Neither request waits for the other: both are spoken over the plugin's own connects."""
    async with line_to(quick(), round_trip=0.1) as line:
        session = Session()
        enter_conversation(Conversation(session))
        tts = line.tts()
        turns = [asyncio.create_task(speak(tts, f"Turn {number}.")) for number in range(2)]
        while not registry().stats()["connecting"]:
            await asyncio.sleep(0)
        await asyncio.sleep(later)
        registry().fail("a test", BugError())
        for heard in await asyncio.gather(*turns):
            assert heard.error is None
            assert heard.seconds > 0.0
        await tts.aclose()


async def test_a_closed_http_session_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """P9: turns may be under way when a job ends. The patch goes on working."""
    async with line_to(quick(generation=0.1)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        turn = asyncio.create_task(speak(tts, "Second."))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        await line.http.close()
        assert (await turn).error is not None
        assert [record.levelname for record in caplog.records].count("ERROR") == 0
        await tts.aclose()


@pytest.mark.skipif(HAS_NATIVE_POOL, reason="such a subclass keeps the native pool")
async def test_a_second_connection_of_a_subclass_is_closed() -> None:
    """It is not used, and must not be forgotten."""

    class Twice(xai.TTS):
        async def _connect_ws(self, *args: Any, **kwargs: Any) -> Any:
            await super()._connect_ws(*args, **kwargs)
            return await super()._connect_ws(*args, **kwargs)

    async with line_to() as line:
        tts = Twice(api_key=API_KEY, http_session=line.http)
        for text in ("First.", "Second."):
            heard = await speak(tts, text)
            assert heard.samples == {line.server.utterance_for(text).number}
        await tts.aclose()
        await all_closed(line.server)
