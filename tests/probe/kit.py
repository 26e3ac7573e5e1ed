"""A fake server, and the probe's way to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.kit import quick
from xai_pool_patch.probe.question import Answer, Finding, Question
from xai_pool_patch.probe.service import VOICE, Service, Timing, tracing
from xai_pool_patch.testing import FakeServer, Wordless

SHORT = Timing(
    dial=10.0, settle=5.0, answer=5.0, quiet=0.1, gap=0.1, close=5.0, heartbeat=0.05, frees=20.0
)
"""Waits long for what comes in the end, and listens shortly for what does not."""

HASTY = Timing(settle=0.2, answer=0.5, quiet=0.1, gap=0.1, close=0.5, heartbeat=0.05)
"""For servers that do not answer."""


@asynccontextmanager
async def serving(
    timing: Timing = SHORT, *, round_trip: float = 0.0, **behaviour: Any
) -> AsyncIterator[Service]:
    """The way to a fake server that behaves as documented, but for `behaviour`."""
    async with serving_both(timing, round_trip=round_trip, **behaviour) as (service, _):
        yield service


@asynccontextmanager
async def serving_both(
    timing: Timing = SHORT, *, round_trip: float = 0.0, **behaviour: Any
) -> AsyncIterator[tuple[Service, FakeServer]]:
    """The same, and the server itself. None of its connections ends but by a Close frame."""
    documented = {"voices": {VOICE}, "wordless": Wordless.DONE, "pace": 5.0}
    made = quick(**{**documented, **behaviour})
    async with (
        FakeServer(round_trip=round_trip, behaviour=made) as server,
        server.client_session(trace_configs=[tracing()]) as http,
    ):
        async with Service(http, made.api_key, timing) as service:
            yield service, server
        await server.wait_for(lambda server: server.open_count == 0)


class Listener:
    """An audience that keeps what it hears."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.characters = 0

    def question_begins(self, question: Question) -> None:
        pass

    def answered(self, finding: Finding, characters: int) -> None:
        self.findings.append(finding)
        self.characters = characters


async def ask(question: Question, timing: Timing = SHORT, **behaviour: Any) -> Answer:
    """What a server of that behaviour makes the probe answer."""
    async with serving(timing, **behaviour) as service:
        return await question.ask(service)
