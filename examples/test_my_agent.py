"""Tests an agent's speech without a key and without xAI. Copy it and use your own agent.

`pip install "xai_pool_patch[testing]" pytest pytest-asyncio`, then `pytest test_my_agent.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from livekit.agents import APIConnectOptions, APIError
from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.testing import End, FakeServer, isolated, pool_is_ready
from xai_pool_patch.testing.fixtures import fake_xai_server as fake_xai_server

pytestmark = pytest.mark.asyncio


ONCE = APIConnectOptions(max_retry=0)
"""An error ends the turn. LiveKit does not retry."""


def my_tts(**options: Any) -> xai.TTS:
    """Replace this with the function that makes your agent's TTS."""
    return xai.TTS(voice="ara", **options)


async def say(tts: xai.TTS, text: str) -> set[int]:
    """Speak one turn, and return the values of all samples that were heard."""
    samples: set[int] = set()
    async with tts.stream(conn_options=ONCE) as stream:
        stream.push_text(text)
        stream.end_input()
        async for event in stream:
            samples.update(event.frame.data)
    return samples


@pytest.fixture
def patched() -> Iterator[None]:
    xai_pool_patch.install()
    yield
    xai_pool_patch.uninstall()


@pytest.fixture
def quick_server(fake_xai_server: FakeServer) -> FakeServer:
    """A server that answers at once and sends audio a hundred times faster than real time."""
    fake_xai_server.behaviour.generation = 0.01
    fake_xai_server.behaviour.pace = 100.0
    return fake_xai_server


@pytest.mark.usefixtures("patched")
async def test_every_turn_is_spoken_over_one_connection(quick_server: FakeServer) -> None:
    """In each turn, the audio of its own text is heard, and no other."""
    async with quick_server.client_session() as http:
        tts = my_tts(api_key=quick_server.behaviour.api_key, http_session=http)
        for text in ("Good morning.", "How can I help you?"):
            heard = await say(tts, text)
            utterance = quick_server.utterance_for(text)
            assert utterance.finished
            assert heard - {0} == {utterance.number}  # zeros: LiveKit's own silence
        assert len(quick_server.connections) == 1
        assert quick_server.connections[0].query["voice"] == "ara"
        await tts.aclose()


@pytest.mark.usefixtures("patched")
async def test_a_connection_that_the_server_drops_costs_no_turn(quick_server: FakeServer) -> None:
    """The next turn is spoken, whether or not the pool has noticed the drop."""
    async with quick_server.client_session() as http:
        tts = my_tts(api_key=quick_server.behaviour.api_key, http_session=http)
        await say(tts, "Good morning.")
        quick_server.reset_all()
        heard = await say(tts, "How can I help you?")
        assert heard - {0} == {quick_server.utterance_for("How can I help you?").number}
        assert quick_server.connections[0].ended is End.SERVER_RESET
        await tts.aclose()


async def test_a_wrong_key_is_an_error(quick_server: FakeServer) -> None:
    """This test is not patched: the server serves the plugin either way."""
    async with quick_server.client_session() as http:
        tts = my_tts(api_key="wrong", http_session=http)
        with pytest.raises(APIError):
            await say(tts, "Good morning.")
        assert quick_server.handshakes[-1].status == 401
        await tts.aclose()


@pytest.mark.usefixtures("patched")
async def test_a_server_far_away() -> None:
    """A server of its own, 150 ms away. The handshake takes place before the turn."""
    with isolated():  # as the fixture does
        async with FakeServer(round_trip=0.15) as server, server.client_session() as http:
            tts = my_tts(api_key=server.behaviour.api_key, http_session=http)
            tts.prewarm()  # as AgentSession does at its start
            await pool_is_ready()
            await say(tts, "Good morning.")
            assert len(server.handshakes) == 1
            await tts.aclose()
