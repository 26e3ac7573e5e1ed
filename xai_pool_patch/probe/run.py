"""Asks the questions, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import aiohttp

from . import by_name
from .question import Finding, Question
from .quick import QUICK
from .service import HOST, VOICE, DialError, RefusedError, Service, Timing, tracing

EVERY = (*QUICK, by_name.idle(600.0), by_name.DEADLINE, by_name.sessions(50))
"""All questions, those by name with an example of what they may be asked with."""

FAKE_ROUND_TRIP = 0.15

OpenService = Callable[[], AbstractAsyncContextManager[Service]]


def chosen(*, idle: float | None, deadline: bool, sessions: int | None) -> list[Question]:
    """The questions to ask. Those by name come last, the one that takes sessions at the very end.

    The others are always asked: the advice of one may depend on the answer to another.
    """
    questions = list(QUICK)
    if idle is not None:
        questions.append(by_name.idle(idle))
    if deadline:
        questions.append(by_name.DEADLINE)
    if sessions is not None:
        questions.append(by_name.sessions(sessions))
    return questions


class Audience(Protocol):
    """Follows the questions as they are asked."""

    def question_begins(self, question: Question) -> None: ...
    def answered(self, finding: Finding, characters: int) -> None:
        """So many characters have been spoken by now."""


async def ask(questions: Sequence[Question], open_service: OpenService, audience: Audience) -> None:
    """Asks the questions.

    SIGINT and SIGTERM cancel it, so that it closes what it has opened.

    Raises:
        DialError: the service cannot be reached, or refuses. What was found so far stands.
        CancelledError: as said.
    """
    _cancel_at_signals()
    async with open_service() as service:
        async with await service.dial_settled():
            pass  # no question is worth asking where this fails
        for question in questions:
            audience.question_begins(question)
            finding = Finding(question, await question.ask(service))
            audience.answered(finding, service.characters)


def explain(error: DialError) -> str:
    """Why the service could not be asked."""
    match error:
        case RefusedError(status=400 | 401 | 403):
            return f"{HOST} refuses the API key: {error}"
        case RefusedError(status=429):
            return f"no session is free, so try again when fewer calls are in progress: {error}"
        case RefusedError():
            return f"{HOST} refuses a connection: {error}"
    return f"{HOST} cannot be reached: {error}"


def _cancel_at_signals() -> None:
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError):  # on Windows, where asyncio.run() does it
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


@contextlib.asynccontextmanager
async def live_service(api_key: str) -> AsyncIterator[Service]:
    """api.x.ai itself."""
    connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False)  # so that DNS is measured
    async with (
        aiohttp.ClientSession(connector=connector, trace_configs=[tracing()]) as http,
        Service(http, api_key, Timing()) as service,
    ):
        yield service


@contextlib.asynccontextmanager
async def fake_service() -> AsyncIterator[Service]:
    """A fake server on this machine that behaves as documented."""
    from ..testing import Behaviour, FakeServer, Wordless

    behaviour = Behaviour(
        voices={VOICE}, wordless=Wordless.DONE, max_sessions=50, deadline=Timing.deadline
    )
    async with (
        FakeServer(round_trip=FAKE_ROUND_TRIP, behaviour=behaviour) as server,
        server.client_session(trace_configs=[tracing()]) as http,
        Service(http, behaviour.api_key, Timing()) as service,
    ):
        yield service
