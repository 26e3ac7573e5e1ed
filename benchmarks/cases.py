"""The cases of the bench: conversations with the real plugin, timed to their first audio.

What runs here knows of one subject only, the plugin as it is or patched; `bench` runs one process
of each side by side. All times are in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from livekit.agents import DEFAULT_API_CONNECT_OPTIONS, APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.demo.conversation import (
    HANDSHAKE_ROUND_TRIPS,
    INTERRUPT_AFTER,
    TYPICAL_ROUND_TRIP,
)
from xai_pool_patch.errors import UnsupportedPluginError
from xai_pool_patch.installation import OFF_SWITCH
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.pool.pool import ROTATION_LEAD
from xai_pool_patch.telemetry.log import describe
from xai_pool_patch.testing import Behaviour, Ending

from .calls import Call
from .servers import Address, client_session, connect

SENTENCE = "Your order is on its way."

PAUSE = 0.8
"""Silence in which a user speaks."""

INTERRUPTED = {2, 5, 8}
"""Which of ten turns are interrupted: 30 %, spread evenly."""

CUT_EARLY_AFTER = (0.1, 0.25)
"""Times from asking to the end of a turn that is not to be heard at all, in turn. Both are
shorter than the generation: without a warm connection such a turn still waits for its handshake,
with one it waits for its audio."""

MAX_AGE = 1.1 * HANDSHAKE_ROUND_TRIPS * TYPICAL_ROUND_TRIP / ROTATION_LEAD
"""For the case of the long silence: ten seconds instead of nine minutes. Shorter, and a handshake
would not fit into the part of it in which an idle connection is replaced, as it does by far in
production."""

LEAST_PAUSE_OVER_HANDSHAKE = 0.1
"""By how much a gap must exceed the handshake for the next turn to find its connection ready."""

ONCE = APIConnectOptions(max_retry=0)
"""A turn that fails is to be counted, not spoken again."""

LONGEST_WAIT = 10.0
"""After which a caller hangs up. A turn that nothing is heard of until then counts as this long."""

IDLE_LIMIT = 6.0
"""Seconds of idleness after which the server of two cases ends a connection."""

GAP_OVER_IDLE_LIMIT = 1.0
"""Time from that end to the next turn, in which a handshake fits."""


class Talk:
    """One conversation of a case.

    Args:
        tts: the plugin's, used by this conversation alone.
        numbers: the turns, counted from 1.
        gap: seconds of silence before each turn.

    Attributes:
        times: the time to first audio of each turn that was spoken to its end.
        failures: what the others failed with.
    """

    def __init__(self, tts: xai.TTS, numbers: range, gap: float) -> None:
        self.tts = tts
        self.numbers = numbers
        self.times: list[float] = []
        self.failures: list[str] = []
        self._gap = gap
        self._silent_since = _now()

    async def pause(self) -> None:
        """The gap, counted from the end of the last turn, be it an interruption."""
        await asyncio.sleep(max(0.0, self._silent_since + self._gap - _now()))

    async def turn(self) -> None:
        """A turn that is spoken to its end, and timed."""
        with self._failure_noted():
            async with self._asked() as stream:
                asked_at = _now()
                await stream.__anext__()
                heard_at = _now()
                async for _ in stream:
                    pass
                self._silent_since = _now()
            self.times.append(heard_at - asked_at)

    async def patient_turn(self) -> None:
        """A turn that LiveKit may try again, as it does by default. The caller waits for it."""
        with self._failure_noted():
            async with self._asked(DEFAULT_API_CONNECT_OPTIONS) as stream:
                asked_at = _now()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stream.__anext__(), LONGEST_WAIT)
                self.times.append(min(_now() - asked_at, LONGEST_WAIT))

    async def interrupted_turn(self) -> None:
        """A turn that is interrupted while its audio comes."""
        with self._failure_noted():
            async with self._asked() as stream:
                await stream.__anext__()
                await asyncio.sleep(INTERRUPT_AFTER)
                self._silent_since = _now()

    async def unheard_turn(self, duration: float) -> None:
        """A turn that is interrupted before its first audio."""
        async with self._asked():
            await asyncio.sleep(duration)
            self._silent_since = _now()

    async def greeting(self) -> None:
        """The first words of an AgentSession, which an agent says when it is entered."""
        with self._failure_noted():
            call = Call(self.tts)
            try:
                self.times.append(await call.hear_greeting(SENTENCE))
            finally:
                await call.session.aclose()

    @contextlib.asynccontextmanager
    async def _asked(self, conn_options: APIConnectOptions = ONCE) -> AsyncIterator[Any]:
        async with self.tts.stream(conn_options=conn_options) as stream:
            stream.push_text(SENTENCE)
            stream.end_input()
            yield stream

    @contextlib.contextmanager
    def _failure_noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failures.append(describe(error))


async def _steady(talk: Talk) -> None:
    for _ in talk.numbers:
        await talk.pause()
        await talk.turn()


async def _interrupted(talk: Talk) -> None:
    for number in talk.numbers:
        await talk.pause()
        await (talk.interrupted_turn() if number % 10 in INTERRUPTED else talk.turn())


async def _voices(talk: Talk) -> None:
    for number in talk.numbers:
        talk.tts.update_options(voice=("ara", "rex")[number % 2])
        await talk.pause()
        await talk.turn()


async def _ten_cold(talk: Talk) -> None:
    await asyncio.gather(*(talk.turn() for _ in talk.numbers))


async def _cut_early(talk: Talk) -> None:
    for number in talk.numbers:
        await talk.pause()
        await talk.unheard_turn(CUT_EARLY_AFTER[number % 2])
        await talk.pause()
        await talk.turn()


async def _after_interruption(talk: Talk) -> None:
    for _ in talk.numbers:
        await talk.pause()
        await talk.interrupted_turn()
        await talk.pause()
        await talk.turn()


async def _after_idleness(talk: Talk) -> None:
    for _ in talk.numbers:
        await talk.pause()
        await talk.patient_turn()


async def _first_words(talk: Talk) -> None:
    await talk.greeting()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One situation, acted in some conversations that overlap."""

    name: str
    shows: str
    play: Callable[[Talk], Awaitable[None]]
    gap: float = PAUSE
    """Silence before a turn, in which the user speaks. Without any, nothing is prewarmed."""
    most_turns: int | None = None
    """Turns of the whole case at the most, if each takes much time of the processor."""
    turns_each: int = 5
    """Turns of one conversation."""
    stagger: float = 0.2
    """Time from the start of one conversation to that of the next."""
    options: PoolOptions = field(default_factory=PoolOptions)
    behaviour: Behaviour | None = None
    """Of the servers; None for the usual one."""

    def has_goal(self, round_trip: float) -> bool:
        """Whether a connection can be ready for every turn."""
        if self.behaviour is not None and self.behaviour.ending is Ending.SILENT:
            return False
        return self.gap > HANDSHAKE_ROUND_TRIPS * round_trip + LEAST_PAUSE_OVER_HANDSHAKE

    def split(self, turns: int) -> list[int]:
        """The turns of each conversation, given those of all together."""
        turns = turns if self.most_turns is None else min(turns, self.most_turns)
        return [min(self.turns_each, turns - start) for start in range(0, turns, self.turns_each)]


CASES = (
    Case(name="steady", shows="nothing happens to any turn", play=_steady),
    Case(
        name="interrupted-0.8s",
        shows="30 % are interrupted, the next comes 0.8 s later",
        play=_interrupted,
        turns_each=10,
    ),
    Case(
        name="interrupted-0.1s",
        shows="30 % are interrupted, the next comes 0.1 s later",
        play=_interrupted,
        gap=0.1,
        turns_each=10,
    ),
    Case(
        name="cleared-0.1s",
        shows='the same with interruption="clear"',
        play=_interrupted,
        gap=0.1,
        turns_each=10,
        options=PoolOptions(interruption="clear"),
    ),
    Case(name="voices", shows="the voice is switched before every turn", play=_voices),
    Case(
        name="ten-cold",
        shows="ten at once, and no connection yet",
        play=_ten_cold,
        gap=0.0,
        turns_each=10,
        stagger=2.0,
    ),
    Case(
        name="long-silence",
        shows=f"silence of 1.2 max_age before every turn (max_age is {MAX_AGE:.1f} s here)",
        play=_steady,
        gap=1.2 * MAX_AGE,
        turns_each=1,
        stagger=0.1,
        options=PoolOptions(max_age=MAX_AGE),
    ),
    Case(
        name="cut-early",
        shows="before every turn another is interrupted before its first audio",
        play=_cut_early,
        turns_each=3,
    ),
    Case(
        name="after-interrupt",
        shows="each follows an interrupted one, 0.8 s later",
        play=_after_interruption,
    ),
    Case(
        name="closed",
        shows="the server has closed the idle connection a second before; LiveKit may retry",
        play=_after_idleness,
        gap=IDLE_LIMIT + GAP_OVER_IDLE_LIMIT,
        most_turns=10,
        turns_each=1,
        behaviour=Behaviour(idle_limit=IDLE_LIMIT),
    ),
    Case(
        name="half-open",
        shows=f"the same, but no Close arrives; nothing within {LONGEST_WAIT:.0f} s counts as that",
        play=_after_idleness,
        gap=IDLE_LIMIT + GAP_OVER_IDLE_LIMIT,
        most_turns=10,
        turns_each=1,
        behaviour=Behaviour(idle_limit=IDLE_LIMIT, ending=Ending.SILENT),
    ),
    Case(
        name="first-words",
        shows="say() in on_enter, 0.8 s after the application has called tts.prewarm()",
        play=_first_words,
        most_turns=10,
        turns_each=1,
        stagger=0.4,
    ),
    Case(
        name="first-words-late",
        shows="say() in on_enter, and only AgentSession.start() prewarms",
        play=_first_words,
        gap=0.0,
        most_turns=10,
        turns_each=1,
        stagger=0.4,
    ),
)


@dataclass
class Figures:
    """What one subject did in one case."""

    times: list[float] = field(default_factory=list)
    """To first audio, of the turns that were spoken to their end."""
    failures: list[str] = field(default_factory=list)
    """What the failed turns failed with."""
    floor_times: list[float] = field(default_factory=list)
    """To first audio over an open connection without the plugin, measured all the while."""
    connections_made: int = 0
    """Of all conversations, as their servers counted."""
    peak_open: int = 0
    """The highest number open at a time in one conversation."""


@dataclass(frozen=True)
class Plugin:
    """What is installed."""

    has_native_pool: bool
    refusal: str | None
    """Why it cannot be patched."""


def inspect_plugin() -> Plugin:
    """Looks at the installed plugin, and tries to patch it."""
    return asyncio.run(_inspect_plugin())


async def _inspect_plugin() -> Plugin:
    has_native_pool = hasattr(xai.TTS(api_key=Behaviour().api_key), "_pool")
    try:
        xai_pool_patch.install()
    except UnsupportedPluginError as error:
        return Plugin(has_native_pool, str(error))
    if not xai_pool_patch.is_installed():
        return Plugin(has_native_pool, f"{OFF_SWITCH}=off keeps the patch out")
    xai_pool_patch.uninstall()
    return Plugin(has_native_pool, None)


def run_case(name: str, *, patched: bool, turns: int, addresses: list[Address]) -> Figures:
    """Runs a case with one subject.

    Args:
        name: of the case.
        patched: whether the plugin is patched meanwhile.
        turns: of all conversations together.
        addresses: of one server for each conversation, and of one for the floor.
    """
    case = next(case for case in CASES if case.name == name)
    if patched:
        xai_pool_patch.install(case.options)
    try:
        return asyncio.run(_run_case(case, turns, addresses))
    finally:
        xai_pool_patch.uninstall()


async def _run_case(case: Case, turns: int, addresses: list[Address]) -> Figures:
    figures = Figures()
    *servers, server_of_floor = addresses
    conversations = asyncio.gather(
        *(
            _converse(case, server, turns=each, delay=number * case.stagger, figures=figures)
            for number, (each, server) in enumerate(zip(case.split(turns), servers, strict=True))
        )
    )
    figures.floor_times = await _measure_floor(server_of_floor, conversations)
    await conversations
    return figures


async def _converse(
    case: Case, server: Address, *, turns: int, delay: float, figures: Figures
) -> None:
    """One conversation, on a server of its own: nothing is shared with another."""
    await asyncio.sleep(delay)
    async with client_session(server) as http:
        tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        _scale_native_pool(tts, case.options)
        if case.gap:
            tts.prewarm()
            await asyncio.sleep(PAUSE)  # before the agent speaks for the first time
        talk = Talk(tts, range(1, turns + 1), case.gap)
        await case.play(talk)
        figures.times += talk.times
        figures.failures += talk.failures
        await tts.aclose()


def _scale_native_pool(tts: xai.TTS, options: PoolOptions) -> None:
    """Gives the native pool the same age limit, which it has no option for."""
    pool: Any = getattr(tts, "_pool", None)
    if hasattr(pool, "_max_session_duration"):
        pool._max_session_duration = options.max_age


async def _measure_floor(server: Address, until: asyncio.Future[Any]) -> list[float]:
    """Speaks over one open connection, again and again, once at least."""
    times: list[float] = []
    async with client_session(server) as http, connect(http) as ws:
        while not times or not until.done():
            times.append(await _speak_bare(ws))
            await asyncio.sleep(0.1)
    return times


async def _speak_bare(ws: aiohttp.ClientWebSocketResponse) -> float:
    """The time to first audio of one sentence."""
    asked_at = _now()
    await ws.send_json({"type": "text.delta", "delta": SENTENCE})
    await ws.send_json({"type": "text.done"})
    await ws.receive()
    heard_at = _now()
    while json.loads((await ws.receive()).data)["type"] != "audio.done":
        pass
    return heard_at - asked_at


def _now() -> float:
    return asyncio.get_running_loop().time()
