"""Holds a conversation: a real AgentSession with the real plugin speaks turn after turn.

There is no room and no model. The agent says given sentences, and a `Loudspeaker` plays them. Some
are interrupted, the voice changes now and then, and the fake server closes connections that are
idle. All times are in seconds.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from livekit import rtc
from livekit.agents import Agent, AgentSession, APIConnectionError, APIError, APIStatusError
from livekit.agents.log import logger
from livekit.agents.metrics import TTSMetrics
from livekit.agents.tts import TTSError
from livekit.agents.voice import SpeechHandle, io
from livekit.plugins import xai

import xai_pool_patch

from ..testing import Behaviour, FakeServer

SENTENCES = (
    "Good morning, how can I help you today?",
    "Sure, let me look that up for you.",
    "Your order left the warehouse last night.",
    "It should be with you on Thursday.",
    "May I have your postcode, please?",
    "Thank you, that is what I have here.",
    "Would you like it left with a neighbour?",
    "No problem, I have made a note of that.",
    "You will get a message an hour before.",
    "Is there anything else I can do for you?",
    "Yes, you can send it back free of charge.",
    "Thanks for calling, and have a good day.",
)

VOICES = ("ara", "rex")
"""Two of xAI's; `ara` is the plugin's own choice."""

HANDSHAKE_ROUND_TRIPS = 3
"""TCP, TLS 1.3, and the upgrade to a WebSocket."""

TYPICAL_ROUND_TRIP = 0.15
"""To xAI: a third of the shortest handshake, 0.45 s, in livekit/agents issue 6078."""

INTERRUPT_AFTER = 0.2
"""Time from a turn's first audio to its interruption. Audio is still coming at that moment."""

TURN_TIMEOUT = 30.0
"""Longest time from `say()` to the end of a turn."""


class TurnFailedError(Exception):
    """A turn could not be spoken. The message says which and why."""


def sufficient_pause(round_trip: float) -> float:
    """A pause in which a handshake fits, as it does while a user speaks."""
    return max(Plan.pause, (HANDSHAKE_ROUND_TRIPS + 1) * round_trip)


class Situation(enum.Enum):
    """What happened just before a turn."""

    STEADY = "steady"
    INTERRUPTED = "after interruption"
    NEW_VOICE = "change of voice"
    DEAD = "dead connection"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the agent says, and how."""

    turns: int
    interrupted_share: float = 0.0
    """Part of the turns that are interrupted, from 0 to 1. They are spread evenly."""
    pause: float = 0.8
    """Silence before every turn, in which the user would speak. Before the first, it is the time
    in which an agent's session has started and no greeting has been spoken yet."""
    speed: float = 3.0
    """How much faster than real time the audio is played."""
    connections_die: bool = True
    """Whether the server closes idle connections; only the fake one can be told to."""

    def sentence(self, number: int) -> str:
        return SENTENCES[(number - 1) % len(SENTENCES)]

    def situation(self, number: int) -> Situation:
        """What the turn is to be measured in: one thing at a time, and by turns."""
        if number > 1 and self.is_interrupted(number - 1):
            return Situation.INTERRUPTED
        if number % 4 == 0:
            return Situation.NEW_VOICE
        if number % 4 == 1 and number > 1 and self.connections_die:
            return Situation.DEAD
        return Situation.STEADY

    def situations(self) -> list[Situation]:
        """Those of all turns, in order."""
        return [self.situation(number) for number in range(1, self.turns + 1)]

    def is_interrupted(self, number: int) -> bool:
        return self._interruptions_up_to(number) > self._interruptions_up_to(number - 1)

    def _interruptions_up_to(self, number: int) -> int:
        return int(number * self.interrupted_share + 0.5)


@dataclass(frozen=True)
class Setting:
    """What the agent says, and how far away the server is."""

    plan: Plan
    round_trip: float | None
    """That of the fake server; None for xAI's server, where it is not known."""

    @property
    def floor(self) -> float | None:
        """Time to first audio over a connection that is ready; None if it is not known."""
        return None if self.round_trip is None else self.round_trip + Behaviour().generation

    @property
    def expected_duration(self) -> float:
        """Time that both conversations will take together."""
        round_trip = TYPICAL_ROUND_TRIP if self.round_trip is None else self.round_trip
        numbers = range(1, self.plan.turns + 1)
        speech = sum(self._speaking_time(number) for number in numbers)
        silence = self.plan.turns * (self.plan.pause + round_trip + Behaviour().generation)
        handshakes = self.plan.turns * HANDSHAKE_ROUND_TRIPS * round_trip
        return 2 * (speech + silence) + handshakes

    def _speaking_time(self, number: int) -> float:
        if self.plan.is_interrupted(number):
            return INTERRUPT_AFTER
        characters = len(self.plan.sentence(number))
        return characters * Behaviour().speech_per_character / self.plan.speed


@dataclass(frozen=True)
class Turn:
    """One turn as it was heard."""

    number: int
    situation: Situation
    interrupted: bool
    retried: bool
    """Whether it failed at first, and LiveKit tried again."""
    time_to_first_audio: float
    """From `say()` to the first frame that reached the audio output."""
    connection_reused: bool | None
    """From the plugin's TTSMetrics; None if there were none, as after an interruption."""
    acquire_time: float | None
    """From the plugin's TTSMetrics; None if there were none."""


@dataclass(frozen=True)
class Run:
    """One conversation. What only the server knows is None for xAI's server."""

    turns: list[Turn]
    connections_made: int | None
    peak_open: int | None
    """The highest number of connections open at a time."""


@dataclass(frozen=True)
class Comparison:
    """The same conversation twice: with the plugin as it is, and patched."""

    unpatched: Run
    patched: Run


class Observer(Protocol):
    """Receives the progress of the conversations."""

    def run_begins(self, *, patched: bool) -> None: ...
    def turn_begins(self, number: int) -> None: ...
    def turn_ended(self, turn: Turn) -> None: ...


@dataclass(frozen=True)
class Endpoint:
    """A server to speak to, and the session and key for it."""

    http: aiohttp.ClientSession
    api_key: str = field(repr=False)
    server: FakeServer | None = None
    """None for xAI's server."""


OpenEndpoint = Callable[[], AbstractAsyncContextManager[Endpoint]]


@contextlib.asynccontextmanager
async def fake_endpoint(round_trip: float) -> AsyncIterator[Endpoint]:
    """Start a fake server that is `round_trip` seconds away."""
    async with (
        FakeServer(round_trip=round_trip) as server,
        server.client_session() as http,
    ):
        yield Endpoint(http, server.behaviour.api_key, server)


@contextlib.asynccontextmanager
async def xai_endpoint(api_key: str) -> AsyncIterator[Endpoint]:
    """Use api.x.ai itself."""
    async with aiohttp.ClientSession() as http:
        yield Endpoint(http, api_key)


async def compare(plan: Plan, open_endpoint: OpenEndpoint, observer: Observer) -> Comparison:
    """Hold the conversation with the plugin as it is, then patched, then uninstall the patch.

    Raises:
        TurnFailedError: a turn could not be spoken.
        UnsupportedPluginError: the plugin cannot be patched.
    """
    observer.run_begins(patched=False)
    async with open_endpoint() as endpoint:
        unpatched = await hold(plan, endpoint, observer)
    xai_pool_patch.install()
    try:
        observer.run_begins(patched=True)
        async with open_endpoint() as endpoint:
            patched = await hold(plan, endpoint, observer)
    finally:
        xai_pool_patch.uninstall()
    return Comparison(unpatched, patched)


async def hold(plan: Plan, endpoint: Endpoint, observer: Observer) -> Run:
    """Hold one conversation.

    Raises:
        TurnFailedError: a turn could not be spoken.
    """
    turns = []
    async with _session(plan, endpoint) as speaker:
        for number in range(1, plan.turns + 1):
            observer.turn_begins(number)
            turns.append(await speaker.speak(number))
            observer.turn_ended(turns[-1])
    if endpoint.server is None:
        return Run(turns, connections_made=None, peak_open=None)
    return Run(turns, len(endpoint.server.connections), endpoint.server.peak_open)


@contextlib.asynccontextmanager
async def _session(plan: Plan, endpoint: Endpoint) -> AsyncIterator[_Speaker]:
    asyncio.get_running_loop().set_exception_handler(ignore_reported)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_retries_unlogged())
        tts = xai.TTS(api_key=endpoint.api_key, http_session=endpoint.http)
        stack.push_async_callback(tts.aclose)
        session: AgentSession[None] = AgentSession(
            tts=tts,
            # There is no speech input, and the loudspeaker cannot pause.
            turn_handling={"interruption": {"resume_false_interruption": False}},
        )
        stack.push_async_callback(session.aclose)
        loudspeaker = Loudspeaker(speed=plan.speed)
        session.output.audio = loudspeaker
        speaker = _Speaker(plan, endpoint, tts, session, loudspeaker)
        tts.on("metrics_collected", speaker.on_metrics)
        tts.on("error", speaker.on_error)
        await session.start(Agent(instructions=""))  # which calls tts.prewarm()
        yield speaker


@contextlib.contextmanager
def _retries_unlogged() -> Iterator[None]:
    """Keeps LiveKit's warning for each retry, which `Turn.retried` reports, off the terminal."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("failed to synthesize speech")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def ignore_reported(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ignore the error of a failed turn: LiveKit never awaits its task, and has sent a TTSError."""
    if not isinstance(context.get("exception"), APIError):
        loop.default_exception_handler(context)


class _Speaker:
    """Speaks the turns of one session, and keeps what the plugin reports about them."""

    def __init__(
        self,
        plan: Plan,
        endpoint: Endpoint,
        tts: xai.TTS,
        session: AgentSession[None],
        loudspeaker: Loudspeaker,
    ) -> None:
        self._plan = plan
        self._endpoint = endpoint
        self._tts = tts
        self._session = session
        self._loudspeaker = loudspeaker
        self._voices = itertools.cycle(VOICES[::-1])
        self._loop = asyncio.get_running_loop()
        self._metrics: TTSMetrics | None = None
        self._error: Exception | None = None
        self._retried = False

    def on_metrics(self, metrics: TTSMetrics) -> None:
        self._metrics = metrics

    def on_error(self, event: TTSError) -> None:
        if event.recoverable:
            self._retried = True
        else:
            self._error = event.error

    async def speak(self, number: int) -> Turn:
        await self._bring_about(self._plan.situation(number))
        await asyncio.sleep(self._plan.pause)
        self._metrics, self._retried = None, False
        playback = self._loudspeaker.next_playback()
        asked_at = self._loop.time()
        handle = self._session.say(self._plan.sentence(number))
        if self._plan.is_interrupted(number):
            playback.add_done_callback(
                lambda _: self._loop.call_later(INTERRUPT_AFTER, handle.interrupt)
            )
        await self._wait_until_over(number, handle)
        if self._error is not None:
            raise TurnFailedError(f"turn {number} failed: {_description(self._error)}")
        if not playback.done():
            raise TurnFailedError(f"turn {number} failed: it ended without any audio")
        return Turn(
            number=number,
            situation=self._plan.situation(number),
            interrupted=handle.interrupted,
            retried=self._retried,
            time_to_first_audio=playback.result().began_at - asked_at,
            connection_reused=self._metrics.connection_reused if self._metrics else None,
            acquire_time=self._metrics.acquire_time if self._metrics else None,
        )

    async def _bring_about(self, situation: Situation) -> None:
        """Does what comes before the turn. The turn before has been interrupted by itself."""
        if situation is Situation.NEW_VOICE:
            self._tts.update_options(voice=next(self._voices))
        elif situation is Situation.DEAD and self._endpoint.server is not None:
            await self._endpoint.server.close_all()

    async def _wait_until_over(self, number: int, handle: SpeechHandle) -> None:
        try:
            await asyncio.wait_for(handle.wait_for_playout(), TURN_TIMEOUT)
        except asyncio.TimeoutError:
            raise TurnFailedError(
                f"turn {number} failed: not over after {TURN_TIMEOUT:.0f} s"
            ) from None


def _description(error: BaseException) -> str:
    # From 1.8.0 on the plugin wraps the error of its handshake in one that says nothing.
    if isinstance(error, APIConnectionError) and error.__cause__ is not None:
        return _description(error.__cause__)
    kind = type(error).__name__
    if isinstance(error, APIStatusError) and error.status_code > 0:
        kind += f", HTTP status {error.status_code}"
    return f"{error.message if isinstance(error, APIError) else error} ({kind})"


@dataclass(eq=False)
class Playback:
    """One utterance that a `Loudspeaker` played. Moments are loop times."""

    began_at: float
    """When its first frame came."""
    ends_at: float
    """When everything that has come so far will have been played."""
    captured: float = 0.0
    """Seconds of audio that came."""
    played: float = 0.0
    """Seconds of audio that were played; set at the end of the playback."""
    interrupted: bool = False
    samples: array.array[int] = field(default_factory=lambda: array.array("h"), repr=False)
    """Every sample that came, if the loudspeaker keeps them."""


class Loudspeaker(io.AudioOutput):
    """An audio output that takes its time, in the background, and makes no sound.

    Args:
        speed: how much faster than real time it plays.
        keep_samples: whether `Playback.samples` is filled.

    Attributes:
        playbacks: every utterance, in order, the current one included.
    """

    def __init__(self, *, speed: float = 1.0, keep_samples: bool = False) -> None:
        super().__init__(label="loudspeaker", capabilities=io.AudioOutputCapabilities(pause=False))
        self.playbacks: list[Playback] = []
        self._speed = speed
        self._keep_samples = keep_samples
        self._loop = asyncio.get_running_loop()
        self._current: Playback | None = None
        self._end: asyncio.TimerHandle | None = None
        self._expecting: list[asyncio.Future[Playback]] = []

    def next_playback(self) -> asyncio.Future[Playback]:
        """A future that is done at the first frame of the next utterance."""
        expected: asyncio.Future[Playback] = self._loop.create_future()
        self._expecting.append(expected)
        return expected

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        now = self._loop.time()
        playback = self._current or self._begin(now)
        playback.captured += frame.duration
        playback.ends_at = max(playback.ends_at, now) + frame.duration / self._speed
        if self._keep_samples:
            playback.samples.extend(frame.data)

    def flush(self) -> None:
        super().flush()
        if self._current is not None and self._end is None:
            self._end = self._loop.call_at(self._current.ends_at, self._finish)

    def clear_buffer(self) -> None:
        if self._current is not None:
            self._current.interrupted = True
            self._finish()

    def _begin(self, now: float) -> Playback:
        playback = self._current = Playback(began_at=now, ends_at=now)
        self.playbacks.append(playback)
        self.on_playback_started(created_at=time.time())
        for expected in self._expecting:
            if not expected.done():
                expected.set_result(playback)
        self._expecting.clear()
        return playback

    def _finish(self) -> None:
        playback, self._current = self._current, None
        if self._end is not None:
            self._end.cancel()
            self._end = None
        if playback is None:
            return
        unplayed = max(0.0, playback.ends_at - self._loop.time()) * self._speed
        playback.played = playback.captured - unplayed
        self.on_playback_finished(
            playback_position=playback.played, interrupted=playback.interrupted
        )
