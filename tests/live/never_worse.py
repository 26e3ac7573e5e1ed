"""What the tests share that compare a turn with the patch to one without it.

The server is as far away as xAI's, and as quick: a turn on a connection that is there takes 0.46 s
to its first audio, a turn that dials 0.92 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from livekit.agents import APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import HAS_NATIVE_POOL, Heard, Line, line_to, quick, speak
from xai_pool_patch.testing import Behaviour, FakeServer, ServedConnection

ROUND_TRIP = 0.15
GENERATION = 0.31
SLACK = 0.02
"""Seconds that the loop's clock counts for the work of a turn."""
WARM = GENERATION + ROUND_TRIP + SLACK
COLD = WARM + 3 * ROUND_TRIP + SLACK
ANSWER_TIMEOUT = 20.0
"""Seconds: the default of the option for how long a connection is given that answers only PINGs."""
FOR_EVER = 600.0
"""Seconds: an agent that says nothing for so long has fallen silent."""
LIVEKITS_OWN = APIConnectOptions()
"""Three retries, as an agent has them."""

EITHER = pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
"""The same assertions with the patch and without it."""
needs_native_pool = pytest.mark.skipif(not HAS_NATIVE_POOL, reason="this plugin has no native pool")
needs_own_connect = pytest.mark.skipif(HAS_NATIVE_POOL, reason="this plugin has a native pool")


@contextlib.contextmanager
def installed(is_patched: bool = True) -> Iterator[None]:
    if is_patched:
        xai_pool_patch.install()
    try:
        yield
    finally:
        xai_pool_patch.uninstall()


def as_far_as_xai(**behaviour: Any) -> contextlib.AbstractAsyncContextManager[Line]:
    return line_to(far(**behaviour), ROUND_TRIP)


def far(**behaviour: Any) -> Behaviour:
    return quick(**{"generation": GENERATION, **behaviour})


class ByHost(AbstractResolver):
    """Sends each host name to the server that is its own."""

    def __init__(self, servers: dict[str, FakeServer]) -> None:
        self._servers = servers

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        port = self._servers[host].network.port
        address = {"hostname": host, "host": "127.0.0.1", "port": port}
        return [ResolveResult(**address, family=socket.AF_INET, proto=0, flags=0)]  # type: ignore[typeddict-item]

    async def close(self) -> None:
        """Holds nothing."""


GATEWAY = "wss://localhost/v1/tts"
"""The second of two servers, by which an application may go instead of api.x.ai."""
GATEWAY_KEY = "gateway-key"


@contextlib.asynccontextmanager
async def xai_and_gateway(**behaviour: Any) -> AsyncIterator[tuple[Line, Line]]:
    """Two servers, and one HTTP session that leads to both."""
    async with (
        FakeServer(round_trip=ROUND_TRIP, behaviour=far()) as xai_server,
        FakeServer(round_trip=ROUND_TRIP, behaviour=far(**behaviour)) as gateway,
    ):
        resolver = ByHost({"api.x.ai": xai_server, "localhost": gateway})
        connector = aiohttp.TCPConnector(resolver=resolver, ssl=gateway.ssl_context)
        async with aiohttp.ClientSession(connector=connector) as http:
            yield Line(xai_server, http), Line(gateway, http)


def served(line: Line, text: str) -> ServedConnection:
    """The connection that the text came on last."""
    return line.server.connections[line.server.utterance_for(text).connection - 1]


def check_whole(line: Line, text: str, heard: Heard) -> None:
    """Every sample is its own, none is missing, and none of another utterance is among them."""
    assert heard.error is None
    assert heard.samples == {line.server.utterance_for(text).number}
    behaviour = line.server.behaviour
    wanted = len("".join(text.split())) * behaviour.speech_per_character
    # The framework may end a sentence with a hundredth of a second of silence.
    assert heard.seconds == pytest.approx(wanted, abs=0.011)


async def timed(
    tts: xai.TTS, text: str, options: APIConnectOptions, longest: float = FOR_EVER
) -> tuple[Heard, float]:
    """A turn, and the seconds that it took to its end, be that an error."""
    began = asyncio.get_running_loop().time()
    heard = await asyncio.wait_for(speak(tts, text, options), longest)
    return heard, asyncio.get_running_loop().time() - began


def dials_unpatched(turns: int) -> int:
    """Of one TTS: one for all turns where the plugin has a pool of its own, else one each."""
    return 1 if HAS_NATIVE_POOL else turns


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the patch reported as a fault of its own, after which it is off for the process."""
    records = [r for r in caplog.records if r.name.startswith("xai_pool_patch")]
    return [repr(vars(r)) for r in records if r.levelno >= logging.ERROR]
