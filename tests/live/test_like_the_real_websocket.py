"""Subclasses of the plugin's TTS that use more of their WebSocket than the plugin does.

What they get instead of one is to be as good: each turn is heard, the first one included.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from livekit.plugins import xai

from tests.kit import API_KEY, Line, all_closed, hear_whole, speak
from tests.live.never_worse import EITHER, as_far_as_xai, dials_unpatched, faults, installed
from xai_pool_patch.testing import Ending

TURNS = 7


class ReadsHeaders(xai.TTS):
    """Notes what the handshake was answered with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[str] = []

    async def _connect_ws(self, *args: Any) -> Any:
        ws = await super()._connect_ws(*args)
        self.seen.append(ws._response.headers["Upgrade"])
        return ws


@EITHER
async def test_a_subclass_that_reads_the_headers_of_the_handshake(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = ReadsHeaders(api_key=API_KEY, http_session=line.http)
            for number in range(TURNS):
                await hear_whole(line, tts, f"Turn {number}.")
            assert set(tts.seen) == {"websocket"}
            assert len(line.server.connections) <= dials_unpatched(TURNS)
            await tts.aclose()
            await all_closed(line.server)
    assert faults(caplog) == []


class SaysAnotherCode(aiohttp.ClientWebSocketResponse):
    """As an application's session may make them (`ws_response_class`)."""

    @property
    def close_code(self) -> int:
        return 4242


@EITHER
async def test_a_websocket_class_of_the_applications_own(is_patched: bool) -> None:
    """The plugin's error has the code that this class gives."""
    with installed(is_patched):
        async with (
            as_far_as_xai() as line,
            line.server.client_session(ws_response_class=SaysAnotherCode) as http,
        ):
            tts = xai.TTS(api_key=API_KEY, http_session=http)
            await hear_whole(line, tts, "Before.")
            line.server.behaviour.end_after_audio = Ending.CLOSE
            heard = await speak(tts, "This is a sentence that is cut.")
            assert heard.error is not None
            assert vars(heard.error.__cause__)["status_code"] == 4242
            await tts.aclose()


class KeepsItsSocket(xai.TTS):
    """Has a pool of one, of its own."""

    MAX_AGE = 300.0
    kept: Any = None
    made_at = 0.0

    async def _connect_ws(self, *args: Any) -> Any:
        now = asyncio.get_running_loop().time()
        if self.kept is None or now - self.made_at > self.MAX_AGE:
            self.kept = await super()._connect_ws(*args)
            self.made_at = now
        return self.kept

    async def _close_ws(self, ws: Any) -> None:
        """Stays open: the next turn takes it."""


@EITHER
async def test_a_subclass_that_keeps_its_socket(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the application's from its first turn on, and closes when the application says so."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = KeepsItsSocket(api_key=API_KEY, http_session=line.http)
            for number in range(TURNS):
                await hear_whole(line, tts, f"Turn {number}.")
                await asyncio.sleep(1.0)
            used = {utterance.connection for utterance in line.server.utterances}
            assert len(used) == 1
            await tts.kept.close()
            await tts.aclose()
            await all_closed(line.server)
    assert faults(caplog) == []


# The application's own session.update: a map of pronunciations.

REPLACE = {"Xai": "ex ay eye"}


class Pronounces(xai.TTS):
    """Sends its map on each WebSocket that it is given."""

    async def _connect_ws(self, *args: Any) -> Any:
        ws = await super()._connect_ws(*args)
        await ws.send_str(json.dumps({"type": "session.update", "replace": REPLACE}))
        return ws


def pronouncing(line: Line) -> xai.TTS:
    return Pronounces(api_key=API_KEY, http_session=line.http)


@EITHER
async def test_a_session_update_on_each_turn_costs_no_connection(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each text is spoken with the map that its TTS asked for."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = pronouncing(line)
            for number in range(TURNS):
                await hear_whole(line, tts, f"Turn {number}.")
            assert [u.replace for u in line.server.utterances] == [REPLACE] * TURNS
            assert len(line.server.connections) <= (2 if is_patched else dials_unpatched(TURNS))
            await tts.aclose()
            await all_closed(line.server)
    assert faults(caplog) == []


@EITHER
@pytest.mark.parametrize("pause", [0.0, 2.0], ids=["at once", "after a pause"])
@pytest.mark.parametrize("plain_first", [False, True], ids=["map first", "plain first"])
async def test_a_map_never_reaches_another_tts(
    plain_first: bool, pause: float, is_patched: bool
) -> None:
    """Turn about with the same key, voice and HTTP session."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            ttss = {"Mapped": pronouncing(line), "Plain": line.tts()}
            for number in range(4):
                for name in sorted(ttss, reverse=plain_first):
                    await hear_whole(line, ttss[name], f"{name} {number}.")
                    await asyncio.sleep(pause)
            for utterance in line.server.utterances:
                assert utterance.replace == ({} if "Plain" in utterance.text else REPLACE)
            for tts in ttss.values():
                await tts.aclose()
            await all_closed(line.server)
