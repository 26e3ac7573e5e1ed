"""What is said in a call and when, and what its caller hears. All times in seconds."""

from __future__ import annotations

import asyncio
import enum
import math
import random
from dataclasses import dataclass

from .agents import Agent
from .server import ROUND_TRIP, RefusedError

GENERATION = 0.31
"""From the server's receipt of the text to its first audio."""
SPEED = 5.0
"""Audio comes so many times faster than it is played."""
RETRY_PAUSES = (0.1, 2.0, 2.0)
"""LiveKit's, after an utterance that was refused. Then the reply stays silent."""


AT_ONCE = 1e-6
"""Seconds that are no wait: reading the clock takes them."""


class Outcome(enum.Enum):
    """What became of a reply."""

    FLOOR = "at the floor"
    """A connection was ready."""
    WAITED = "behind a handshake"
    """All of it, or a part."""
    RETRIED = "heard after a refusal"
    FAILED = "failed"


@dataclass(frozen=True)
class Lognormal:
    """A distribution of times."""

    median: float
    sigma: float

    def draw(self, chance: random.Random) -> float:
        return self.median * math.exp(chance.gauss(0.0, self.sigma))


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How calls go."""

    length: Lognormal = Lognormal(240.0, 0.6)
    silence: Lognormal = Lognormal(1.0, 0.5)
    """From the end of a reply to the user's first word."""
    speech: Lognormal = Lognormal(2.5, 0.6)
    """How long the user speaks."""
    transcription: float = 0.25
    """From the user's last word to the event `speech_created`."""
    llm: Lognormal = Lognormal(0.6, 0.4)
    """From then to the first text."""
    audio: Lognormal = Lognormal(5.0, 0.6)
    """How long a reply is."""
    interrupted_share: float = 0.1
    """Replies that the user cuts off, at any moment."""
    killed_share: float = 0.0
    """Calls whose process is killed, so that its connections end without a Close frame."""


@dataclass(frozen=True)
class Reply:
    """What became of one reply."""

    outcome: Outcome
    wait: float
    """From the first text to the connection; of a failed reply, to the last refusal."""


class Call:
    """One call, from its greeting to its end.

    Args:
        agent: speaks.
        habits: the distributions.
        chance: draws from them.
        replies: gets what became of each reply.
    """

    def __init__(
        self, agent: Agent, habits: Habits, chance: random.Random, replies: list[Reply]
    ) -> None:
        self._agent = agent
        self._habits = habits
        self._chance = chance
        self._replies = replies

    async def hold(self) -> None:
        """Talk to the end, and close everything."""
        length = self._habits.length.draw(self._chance)
        is_killed = self._chance.random() < self._habits.killed_share
        try:
            await (self._talk_until_killed(length) if is_killed else self._talk(length))
        finally:
            await self._agent.aclose()

    async def _talk_until_killed(self, length: float) -> None:
        talk = asyncio.ensure_future(self._talk(math.inf))
        try:
            await asyncio.wait([talk], timeout=length)
            self._agent.kill()
        finally:
            talk.cancel()
            await asyncio.wait([talk])

    async def _talk(self, length: float) -> None:
        end = _now() + length
        await self._reply()
        while _now() < end:
            await self._sleep(self._habits.silence)
            self._agent.user_begins_to_speak()
            await self._sleep(self._habits.speech)
            await asyncio.sleep(self._habits.transcription)
            await self._reply()

    async def _reply(self) -> None:
        self._agent.reply_begins()
        await self._sleep(self._habits.llm)
        reply = await self._connect()
        self._replies.append(reply)
        if reply.outcome is not Outcome.FAILED:
            await self._speak()
        self._agent.reply_ends()

    async def _connect(self) -> Reply:
        """Get a connection for the reply, as LiveKit does."""
        asked = _now()
        for pause in (*RETRY_PAUSES, None):
            is_first = pause == RETRY_PAUSES[0]
            try:
                await self._agent.acquire()
            except RefusedError:
                if pause is not None:
                    await asyncio.sleep(pause)
                continue
            wait = _now() - asked
            if not is_first:
                return Reply(Outcome.RETRIED, wait)
            return Reply(Outcome.FLOOR if wait < AT_ONCE else Outcome.WAITED, wait)
        return Reply(Outcome.FAILED, _now() - asked)

    async def _speak(self) -> None:
        audio = self._habits.audio.draw(self._chance)
        heard = audio
        if self._chance.random() < self._habits.interrupted_share:
            heard *= self._chance.random()
        received = audio / SPEED
        await asyncio.sleep(ROUND_TRIP + GENERATION + min(received, heard))
        await self._agent.release(cut_off=heard < received)
        await asyncio.sleep(max(0.0, heard - received))

    async def _sleep(self, time: Lognormal) -> None:
        await asyncio.sleep(time.draw(self._chance))


def _now() -> float:
    return asyncio.get_running_loop().time()
