"""Many calls that share the sessions of one team, in virtual time, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.clock import VirtualLoop
from xai_pool_patch.demo.report import percentile
from xai_pool_patch.options import PoolOptions, Warm

from .agents import Agent, Board, PatchedAgent, UnpatchedAgent
from .calls import Call, Habits, Outcome, Reply
from .server import Server

REFUSED_SHARE = 0.001
"""Part of the replies that may be refused when calls are said to fit."""
FIT_AT_MOST, FIT_WITHIN = 6, 1.04

NEXT_CALL = 5.0
"""Mean of the seconds between the end of one call and the next one's start."""


class Hearing(enum.Enum):
    """Who hears of a refusal."""

    ONE = 1
    """The process that met it."""
    TEN = 10
    """The processes of one machine."""
    ALL = 1_000_000


@dataclass(frozen=True)
class Subject:
    """The plugin as it is, or patched."""

    name: str
    warm: Warm | None = None
    """None: as it is."""
    hearing: Hearing = Hearing.ONE
    dials_at_speech: bool = False


SUBJECTS = (
    Subject("unpatched"),
    Subject("always", "always"),
    Subject("reply", "reply"),
    Subject("auto, one", "auto"),
    Subject("auto, ten", "auto", Hearing.TEN),
    Subject("auto, all", "auto", Hearing.ALL),
)
AT_SPEECH = Subject("at speech", "reply", dials_at_speech=True)
"""Dials when the user begins to speak. Not an option of the package."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How many calls, on how many sessions, for how long. Times in seconds."""

    sessions: int
    calls: int
    """At a time. Each that ends is followed by another."""
    duration: float = 1800.0
    ramp: float = 120.0
    """Within which the first calls start; 0.0 for a deploy that starts all at once."""
    habits: Habits = field(default_factory=Habits)


@dataclass(frozen=True)
class Figures:
    """What the callers heard, and what the server saw."""

    replies: list[Reply]
    refused: int
    """Handshakes."""
    peak: int
    """Sessions."""
    mean_sessions: float
    """Sessions in use, on average after the ramp."""

    def share(self, *outcomes: Outcome) -> float:
        """Part of the replies, from 0 to 1."""
        return sum(reply.outcome in outcomes for reply in self.replies) / len(self.replies)

    def wait(self, share: float) -> float:
        """A percentile of the waits of what was heard; 0.0 if nothing was."""
        waits = [reply.wait for reply in self.replies if reply.outcome is not Outcome.FAILED]
        return percentile(waits, share) if waits else 0.0


def simulate(scenario: Scenario, subject: Subject) -> Figures:
    """Hold the calls of a scenario."""
    loop = VirtualLoop()
    try:
        with _quiet():
            return loop.run_until_complete(_simulate(scenario, subject))
    finally:
        loop.close()


def calls_that_fit(scenario: Scenario, subject: Subject) -> int:
    """The most calls of which 0.1 % of the replies are refused, within two percent or so."""
    fit, too_many = 1, FIT_AT_MOST * scenario.sessions
    while too_many > max(fit + 1, FIT_WITHIN * fit):
        calls = max(fit + 1, round(math.sqrt(fit * too_many)))
        figures = simulate(dataclasses.replace(scenario, calls=calls), subject)
        if figures.share(Outcome.RETRIED, Outcome.FAILED) > REFUSED_SHARE:
            too_many = calls
        else:
            fit = calls
    return fit


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep thousands of processes' log records from one terminal."""
    logger = logging.getLogger("xai_pool_patch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


async def _simulate(scenario: Scenario, subject: Subject) -> Figures:
    server = Server(scenario.sessions)
    replies: list[Reply] = []
    boards = [Board() for _ in range(-(-scenario.calls // subject.hearing.value))]

    def agent_of(line: int, jitter: random.Random) -> Agent:
        if subject.warm is None:
            return UnpatchedAgent(server)
        return PatchedAgent(
            server,
            PoolOptions(warm=subject.warm),
            boards[line // subject.hearing.value]
            if subject.hearing is not Hearing.ONE
            else Board(),
            dials_at_speech=subject.dials_at_speech,
            jitter=jitter,
        )

    lines = [
        asyncio.ensure_future(_hold_calls(line, scenario, agent_of, replies))
        for line in range(scenario.calls)
    ]
    await asyncio.sleep(scenario.ramp)
    used_before = server.used
    await asyncio.sleep(scenario.duration - scenario.ramp)
    mean_sessions = (server.used - used_before) / (scenario.duration - scenario.ramp)
    for line in lines:
        line.cancel()
    await asyncio.wait(lines)
    return Figures(replies, server.refused, server.peak, mean_sessions)


async def _hold_calls(
    line: int,
    scenario: Scenario,
    agent_of: Callable[[int, random.Random], Agent],
    replies: list[Reply],
) -> None:
    """One call after another, a process each."""
    chance = random.Random(line)
    await asyncio.sleep(chance.uniform(0.0, scenario.ramp))
    for number in itertools.count():
        agent = agent_of(line, random.Random(f"jitter {line} {number}"))
        plan = random.Random(f"call {line} {number}")
        await Call(agent, scenario.habits, plan, replies).hold()
        await asyncio.sleep(chance.expovariate(1.0 / NEXT_CALL))
