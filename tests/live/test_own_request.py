"""A connection is dialled as the TTS that speaks on it would dial it, or by that TTS itself."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from livekit.agents import Agent
from livekit.agents.utils import ConnectionPool, connection_pool
from livekit.plugins import xai

from tests.kit import (
    API_KEY,
    HAS_NATIVE_POOL,
    Line,
    all_closed,
    hear_whole,
    interrupted,
    speak,
)
from tests.live.never_worse import (
    COLD,
    EITHER,
    GATEWAY,
    GATEWAY_KEY,
    WARM,
    as_far_as_xai,
    check_whole,
    dials_unpatched,
    faults,
    installed,
    needs_native_pool,
    served,
    xai_and_gateway,
)
from tests.session.test_session import session_of

# What the plugin's connect reads of its module.


@EITHER
async def test_a_sample_rate_changed_between_two_tts(
    is_patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server speaks to each TTS in the rate that its frames have."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            ttss = []
            for rate in (24_000, 8_000, 24_000):
                monkeypatch.setattr(xai.tts, "SAMPLE_RATE", rate)
                ttss.append(line.tts())
                text = f"This is number {len(ttss)}."
                assert (await speak(ttss[-1], text)).error is None
                assert served(line, text).query["sample_rate"] == str(rate)
            for tts in ttss:
                await tts.aclose()


@EITHER
async def test_a_url_changed_between_two_tts(
    is_patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new server speaks, as soon as unpatched, though the old one is mute by now."""
    with installed(is_patched):
        async with xai_and_gateway() as (here, gateway):
            first = here.tts()
            await hear_whole(here, first, "The first server.")
            here.server.mute_all()
            monkeypatch.setattr(xai.tts, "XAI_WEBSOCKET_URL", GATEWAY)
            second = gateway.tts()
            heard = await hear_whole(gateway, second, "The second server.")
            assert heard.first_audio is not None
            assert heard.first_audio < COLD
            assert len(here.server.utterances) == 1
            for tts in (first, second):
                await tts.aclose()


# A connect of the application's own.


async def connect_to_gateway(self: xai.TTS, timeout: float, *opts: Any) -> Any:
    """As a subclass does it that knows nothing of xAI's URL."""
    connect = self._ensure_session().ws_connect(
        f"{GATEWAY}?voice={self._opts.voice}", headers={"Authorization": f"Bearer {self._api_key}"}
    )
    return await asyncio.wait_for(connect, timeout)


class ByGateway(xai.TTS):
    _connect_ws = connect_to_gateway


def of_a_subclass(gateway: Line) -> xai.TTS:
    return ByGateway(api_key=GATEWAY_KEY, http_session=gateway.http)


def of_an_instance(gateway: Line) -> xai.TTS:
    tts: Any = xai.TTS(api_key=GATEWAY_KEY, http_session=gateway.http)
    tts._connect_ws = types.MethodType(connect_to_gateway, tts)
    return tts


def of_a_pool_callback(gateway: Line) -> xai.TTS:
    tts: Any = xai.TTS(api_key=GATEWAY_KEY, http_session=gateway.http)
    tts._pool._connect_cb = types.MethodType(connect_to_gateway, tts)
    return tts


class WithOwnPool(xai.TTS):
    """Replaces the plugin's pool by one with a callback of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pool: Any = ConnectionPool(
            connect_cb=self._to_gateway, close_cb=lambda ws: ws.close(), max_session_duration=300.0
        )

    async def _to_gateway(self, timeout: float) -> Any:
        return await connect_to_gateway(self, timeout)


def of_a_pool_of_its_own(gateway: Line) -> xai.TTS:
    return WithOwnPool(api_key=GATEWAY_KEY, http_session=gateway.http)


class Elsewhere(xai.TTS):
    """Wraps the plugin's connect, so that it goes to the gateway."""

    async def _connect_ws(self, *args: Any) -> Any:
        with mock.patch.object(xai.tts, "XAI_WEBSOCKET_URL", GATEWAY):
            return await super()._connect_ws(*args)


def of_a_subclass_around_the_plugins(gateway: Line) -> xai.TTS:
    return Elsewhere(api_key=GATEWAY_KEY, http_session=gateway.http)


Make = Callable[[Line], xai.TTS]
OWN_CONNECTS: list[Any] = [of_a_subclass, of_a_subclass_around_the_plugins, of_an_instance]
OWN_CONNECTS += [
    pytest.param(each, marks=needs_native_pool)
    for each in (of_a_pool_callback, of_a_pool_of_its_own)
]


async def prewarmed(tts: xai.TTS, gateway: Line) -> None:
    tts.prewarm()
    await asyncio.sleep(1.0)


async def with_another_voice(tts: xai.TTS, gateway: Line) -> None:
    await prewarmed(tts, gateway)
    tts.update_options(voice="eve")
    await asyncio.sleep(1.0)


async def cut_off(tts: xai.TTS, gateway: Line) -> None:
    gateway.server.behaviour.pace = 1.0
    await interrupted(gateway, tts)
    gateway.server.behaviour.pace = 1000.0
    await asyncio.sleep(1.0)


async def in_a_session(tts: xai.TTS, gateway: Line) -> None:
    async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
        await session.say("Said by an agent.").wait_for_playout()
        heard = set(loudspeaker.playbacks[-1].samples) - {0}
        assert heard == {gateway.server.utterance_for("Said by an agent.").number}


async def nothing(tts: xai.TTS, gateway: Line) -> None:
    """Only the turns that follow."""


@EITHER
@pytest.mark.parametrize("make", OWN_CONNECTS)
@pytest.mark.parametrize("before", [nothing, prewarmed, with_another_voice, cut_off, in_a_session])
async def test_a_connect_of_the_applications_own_is_the_only_one(
    before: Callable[[xai.TTS, Line], Any],
    make: Make,
    is_patched: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody dials xAI: the gateway's key is sent to no other host, and no session stays open."""
    with installed(is_patched):
        async with xai_and_gateway(api_key=GATEWAY_KEY) as (here, gateway):
            tts = make(gateway)
            await before(tts, gateway)
            for number in range(3):
                await hear_whole(gateway, tts, f"Turn {number}.")
            assert here.server.network.accepted == 0
            assert {c.query["voice"] for c in gateway.server.connections} <= {"ara", "eve"}
            assert len(gateway.server.connections) <= dials_unpatched(5) + 1
            await tts.aclose()
            await all_closed(gateway.server)
    assert faults(caplog) == []


@EITHER
@needs_native_pool
async def test_a_callback_set_on_the_pool_is_called_as_often_as_unpatched(is_patched: bool) -> None:
    """Once for three turns."""
    calls: list[float] = []
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts: Any = line.tts()
            connect = tts._pool._connect_cb

            async def counted(timeout: float) -> Any:
                calls.append(timeout)
                return await connect(timeout)

            tts._pool._connect_cb = counted
            for number in range(3):
                await hear_whole(line, tts, f"Turn {number}.")
            assert (len(calls), len(line.server.connections)) == (1, 1)
            await tts.aclose()


@EITHER
@pytest.mark.parametrize("elsewhere_first", [False, True], ids=["plain first", "plain second"])
async def test_a_subclass_for_another_server_beside_a_plain_tts(
    elsewhere_first: bool, is_patched: bool
) -> None:
    """Each is heard where it connects, turn about, with the same key, voice and HTTP session."""
    with installed(is_patched):
        async with xai_and_gateway() as (here, gateway):
            plain = here.tts()
            other = Elsewhere(api_key=API_KEY, http_session=gateway.http)
            pairs = [(here, plain, "Plain"), (gateway, other, "Elsewhere")]
            for number in range(3):
                for line, tts, name in pairs[:: -1 if elsewhere_first else 1]:
                    await hear_whole(line, tts, f"{name} {number}.")
            for _, tts, _ in pairs:
                await tts.aclose()
            for line, _, _ in pairs:
                await all_closed(line.server)


# The native pool's callback and age limit.

LIMITS_OF_THE_PLUGIN = (3600, 1800)
"""Of earlier plugins, and of 1.8.9."""


@EITHER
@needs_native_pool
async def test_the_pools_callback_and_age_limit_are_the_plugins(is_patched: bool) -> None:
    """As an application reads them that restores later what it changes."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts: Any = line.tts()
            assert tts._pool._connect_cb == tts._connect_pooled_ws
            assert tts._pool._max_session_duration in LIMITS_OF_THE_PLUGIN
            tts._pool._max_session_duration = 60
            assert tts._pool._max_session_duration == 60
            await tts.aclose()


@EITHER
@needs_native_pool
@pytest.mark.parametrize(("limit", "dials"), [(0, 4), (30, 2)])
async def test_an_age_limit_set_on_the_pool_holds(
    limit: float, dials: int, is_patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 is never to reuse, 30 is to reuse for half a minute."""
    loop = asyncio.get_running_loop()
    clock = types.SimpleNamespace(time=loop.time, perf_counter=time.perf_counter)
    monkeypatch.setattr(connection_pool, "time", clock)
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts: Any = line.tts()
            tts._pool._max_session_duration = limit
            for number in range(4):
                if number == 2:
                    await asyncio.sleep(31.0)
                await hear_whole(line, tts, f"Turn {number}.")
            used = {utterance.connection for utterance in line.server.utterances}
            assert len(used) == dials
            assert len(line.server.connections) <= dials + (limit > 0)
            await tts.aclose()


# HTTP sessions of the application's own.


class Wrapper:
    """What an application gives out instead of its HTTP session."""

    def __init__(self, http: Any) -> None:
        self._http = http

    def __getattr__(self, name: str) -> Any:
        return getattr(self._http, name)


class NewWrapperEachTime(xai.TTS):
    def _ensure_session(self) -> Any:
        return Wrapper(super()._ensure_session())


@EITHER
async def test_an_http_session_that_is_a_new_object_at_each_call(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No more dials or sessions than unpatched, and no turn is later."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = NewWrapperEachTime(api_key=API_KEY, http_session=line.http)
            waits = []
            for number in range(8):
                heard = await hear_whole(line, tts, f"Turn {number}.")
                waits.append(heard.first_audio or 0.0)
            assert len(line.server.handshakes) <= dials_unpatched(8)
            assert line.server.peak_sessions <= (1 if HAS_NATIVE_POOL else 2)
            assert waits[0] < COLD
            assert max(waits[1:]) < (WARM if HAS_NATIVE_POOL else COLD)
            await tts.aclose()
            await all_closed(line.server)
    assert faults(caplog) == []


@EITHER
async def test_a_request_that_is_new_at_each_turn(is_patched: bool) -> None:
    """Where nothing says so beforehand, two turns show it, and the TTS is left to itself."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts: Any = line.tts()
            waits = []
            for number in range(8):
                tts._session = Wrapper(line.http)
                heard = await hear_whole(line, tts, f"Turn {number}.")
                waits.append(heard.first_audio or 0.0)
            assert len(line.server.handshakes) <= dials_unpatched(8) + (2 if is_patched else 0)
            assert max(waits) < COLD
            assert max(waits[4:]) < (WARM if HAS_NATIVE_POOL else COLD)
            await tts.aclose()
            await all_closed(line.server)


@EITHER
async def test_an_http_session_that_can_only_open_a_websocket(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The plugin needs no more of it."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            http = types.SimpleNamespace(ws_connect=line.http.ws_connect)
            tts = line.tts(http_session=http)
            tts.prewarm()
            await asyncio.sleep(1.0)
            for number in range(3):
                text = f"Turn {number}."
                check_whole(line, text, await speak(tts, text))
            assert len(line.server.handshakes) <= dials_unpatched(3)
            await tts.aclose()
            await all_closed(line.server)
    assert faults(caplog) == []
