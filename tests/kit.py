"""What the live tests share: the real plugin, spoken to over real sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

from xai_pool_patch import installation
from xai_pool_patch.plugin import releases
from xai_pool_patch.protocol.connection import Connection
from xai_pool_patch.registry import Registry
from xai_pool_patch.testing import Behaviour, FakeServer, ServedConnection

API_KEY = Behaviour.api_key
VERSION = releases.installed_version()
SHAPE = releases.detect(xai.tts, VERSION, allow_unverified=True)
HAS_NATIVE_POOL = SHAPE is releases.Shape.NATIVE_POOL
ONCE = APIConnectOptions(max_retry=0, timeout=5.0)


def quick(**faults: Any) -> Behaviour:
    """A server that speaks a sentence in a few hundredths of a second."""
    times = {"generation": 0.01, "pace": 1000.0, "speech_per_character": 0.01}
    return Behaviour(**{**times, **faults})


@dataclass
class Heard:
    """What one utterance sounded like to the caller."""

    samples: set[int] = field(default_factory=set)
    """Without zeros: with such silence livekit-agents ends a segment whose end comes late."""
    seconds: float = 0.0
    first_audio: float | None = None
    error: Exception | None = None


async def speak(
    tts: xai.TTS, text: str, conn_options: APIConnectOptions = ONCE, *, heard: Heard | None = None
) -> Heard:
    """One turn, as an agent takes it. An error ends it and is part of what is returned."""
    heard = heard if heard is not None else Heard()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with tts.stream(conn_options=conn_options) as stream:
        stream.push_text(text)
        stream.end_input()
        try:
            async for event in stream:
                if heard.first_audio is None:
                    heard.first_audio = loop.time() - began
                heard.samples.update(sample for sample in event.frame.data if sample)
                heard.seconds += event.frame.duration
        except Exception as error:
            heard.error = error
    return heard


async def hear_whole(line: Line, tts: xai.TTS, text: str) -> Heard:
    """A turn of which each sample is its own, from the first to the last."""
    heard = await speak(tts, text)
    assert heard.error is None
    assert heard.samples == {line.server.utterance_for(text).number}
    wanted = len("".join(text.split())) * line.server.behaviour.speech_per_character
    # The framework may end a sentence with a hundredth of a second of silence.
    assert heard.seconds == pytest.approx(wanted, abs=0.011)
    return heard


async def interrupted(
    line: Line, tts: xai.TTS, text: str = "This is a long sentence."
) -> ServedConnection:
    """A turn that is closed in the middle of its audio; the connection it spoke on."""
    async with tts.stream() as stream:
        stream.push_text(text)
        stream.end_input()
        await stream.__anext__()
    return line.server.connections[line.server.utterances[-1].connection - 1]


@dataclass
class Line:
    """A fake server, the HTTP session that leads to it, and what the TTS instances reported."""

    server: FakeServer
    http: aiohttp.ClientSession
    metrics: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)

    def tts(self, **kwargs: Any) -> xai.TTS:
        tts = xai.TTS(**{"api_key": API_KEY, "http_session": self.http, **kwargs})
        tts.on("metrics_collected", self.metrics.append)
        tts.on("error", self.errors.append)
        return tts


@asynccontextmanager
async def line_to(
    behaviour: Behaviour | None = None, round_trip: float = 0.0
) -> AsyncIterator[Line]:
    server = FakeServer(round_trip=round_trip, behaviour=behaviour or quick())
    async with server as server, server.client_session() as http:
        yield Line(server, http)


def event_of(record: logging.LogRecord) -> str:
    """The name of our event; of any other record, its message."""
    return str(vars(record).get("xai_pool_event") or record.getMessage())


def registry() -> Registry:
    """The pools of what is installed."""
    assert installation._installation is not None
    return installation._installation.registry


def connections() -> list[Connection]:
    """The connections that the pools of all event loops hold."""
    return [each for pool in registry()._pools() for each in pool.connections]


def round_trips_are_known() -> bool:
    """Whether each connection has received a PONG: only then does the pool probe it for life."""
    return all(each.round_trip is not None for each in connections())


async def all_closed(server: FakeServer) -> None:
    await server.wait_for(lambda s: s.open_count == 0)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
