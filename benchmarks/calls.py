"""Calls: real AgentSessions without a room, whose language model keeps a time of its own.

What runs here knows of one subject only, the plugin as it is or patched. All times are in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from livekit.agents import DEFAULT_API_CONNECT_OPTIONS, Agent, AgentSession, APIConnectOptions, llm
from livekit.agents.voice import SpeechHandle
from livekit.plugins import xai

import xai_pool_patch
from xai_pool_patch.demo.conversation import (
    INTERRUPT_AFTER,
    SENTENCES,
    TURN_TIMEOUT,
    Loudspeaker,
    Playback,
    TurnFailedError,
    ignore_reported,
)
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.testing import Behaviour

from .servers import Address, client_session

TOKEN_INTERVAL = 0.02
"""Between the words of the language model."""


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What is said in a call, and when."""

    replies: int = 5
    llm_delay: float = 0.5
    """From the request of a reply to its first token."""
    interrupted_share: float = 0.0
    """Part of the replies that are interrupted, from 0 to 1."""
    pauses: tuple[float, float] = (2.0, 4.0)
    """The shortest and the longest silence before a reply, in which the user speaks."""


@dataclass(frozen=True)
class Reply:
    """What the caller heard of one reply."""

    first_audio: float | None
    """From the first token of the language model to the first audio. None: it was silent."""
    errors: int
    """Errors of the TTS that the framework reported, those included that it recovered from."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The plugin as it is, or patched."""

    options: PoolOptions | None
    """None: as it is."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the environment of its process has beside what it inherits."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        os.environ.update(self.environment)
        if self.options is not None:
            xai_pool_patch.install(self.options)
        try:
            yield
        finally:
            xai_pool_patch.uninstall()


class TimedLLM(llm.LLM[str]):
    """A language model that says one sentence after another.

    Attributes:
        first_token_at: when the first token of the last reply came, in loop time.
    """

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.delay = delay
        self.sentence = ""
        self.first_token_at = 0.0

    def chat(
        self,
        *,
        chat_ctx: llm.ChatContext,
        tools: list[llm.Tool] | None = None,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
        **kwargs: Any,
    ) -> llm.LLMStream:
        return _TimedStream(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=conn_options)


class _TimedStream(llm.LLMStream):
    async def _run(self) -> None:
        model = self._llm
        assert isinstance(model, TimedLLM)
        await asyncio.sleep(model.delay)
        model.first_token_at = _now()
        for word in model.sentence.split():
            delta = llm.ChoiceDelta(role="assistant", content=f"{word} ")
            self._event_ch.send_nowait(llm.ChatChunk(id="reply", delta=delta))
            await asyncio.sleep(TOKEN_INTERVAL)


class Call:
    """One caller's call; the caller starts its `session`."""

    def __init__(self, tts: xai.TTS, llm_delay: float = 0.0) -> None:
        self.loudspeaker = Loudspeaker()
        self._model = TimedLLM(llm_delay)
        self._errors = 0
        self.session: AgentSession[None] = AgentSession(
            tts=tts,
            llm=self._model,
            # There is no STT, and the loudspeaker cannot pause.
            turn_handling={"interruption": {"resume_false_interruption": False}},
        )
        self.session.output.audio = self.loudspeaker
        tts.on("error", self._on_error)

    def _on_error(self, _: object) -> None:
        self._errors += 1

    async def hear_greeting(self, sentence: str) -> float:
        """Starts the session with an agent that speaks first: from `say()` to its first audio.

        Raises:
            TurnFailedError: nothing was heard.
        """
        playback = self.loudspeaker.next_playback()
        greeter = _Greeter(sentence)
        await self.session.start(greeter)
        said_at, handle = await greeter.said
        await handle.wait_for_playout()
        if not playback.done():
            raise TurnFailedError("the greeting ended without any audio")
        return playback.result().began_at - said_at

    async def hear_reply(self, sentence: str, *, interrupt: bool) -> Reply:
        """Asks for a reply, and listens to its end."""
        playback = self.loudspeaker.next_playback()
        errors_before = self._errors
        self._model.sentence = sentence
        try:
            handle = self.session.generate_reply(user_input="Go on.")
        except RuntimeError:  # the session has closed, as it does after some errors in a row
            return Reply(None, errors=1)
        if interrupt:
            _interrupt(handle, playback)
        # A reply that takes longer than the timeout is heard, or silent, by then.
        await asyncio.wait([asyncio.ensure_future(handle.wait_for_playout())], timeout=TURN_TIMEOUT)
        errors = self._errors - errors_before
        if not playback.done():
            return Reply(None, errors)
        return Reply(playback.result().began_at - self._model.first_token_at, errors)


class _Greeter(Agent):
    """Says something as soon as it is asked in."""

    def __init__(self, sentence: str) -> None:
        super().__init__(instructions="")
        self.said: asyncio.Future[tuple[float, SpeechHandle]] = (
            asyncio.get_running_loop().create_future()
        )
        self._sentence = sentence

    async def on_enter(self) -> None:
        said_at = _now()
        self.said.set_result((said_at, self.session.say(self._sentence)))


def _interrupt(handle: SpeechHandle, playback: asyncio.Future[Playback]) -> None:
    """Interrupts a reply soon after its first audio."""
    loop = asyncio.get_running_loop()
    playback.add_done_callback(lambda _: loop.call_later(INTERRUPT_AFTER, handle.interrupt))


@contextlib.asynccontextmanager
async def tts_of_call(http: aiohttp.ClientSession) -> AsyncIterator[xai.TTS]:
    """A TTS of the call's own; closed when the call ends."""
    tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
    try:
        yield tts
    finally:
        await tts.aclose()


def hold_calls(
    plan: CallPlan, address: Address, subject: Subject, numbers: range
) -> list[list[Reply]]:
    """Holds some calls at once in this process; the replies of each.

    Args:
        plan: what is said.
        address: of the server.
        subject: the plugin as it is, or patched.
        numbers: of the calls; the pauses and interruptions of a call depend on its number.
    """
    with subject.installed():
        return asyncio.run(_hold_calls(plan, address, numbers))


async def _hold_calls(plan: CallPlan, address: Address, numbers: range) -> list[list[Reply]]:
    asyncio.get_running_loop().set_exception_handler(ignore_reported)
    return await asyncio.gather(*(_hold_call(plan, address, number) for number in numbers))


async def _hold_call(plan: CallPlan, address: Address, number: int) -> list[Reply]:
    chance = random.Random(number)
    replies = []
    # Each call has an HTTP session of its own, as LiveKit's jobs have.
    async with client_session(address) as http, tts_of_call(http) as tts:
        call = Call(tts, plan.llm_delay)
        async with contextlib.AsyncExitStack() as stack:
            await call.session.start(Agent(instructions=""))
            stack.push_async_callback(call.session.aclose)
            for turn in range(plan.replies):
                await asyncio.sleep(chance.uniform(*plan.pauses))
                interrupt = chance.random() < plan.interrupted_share
                sentence = SENTENCES[turn % len(SENTENCES)]
                replies.append(await call.hear_reply(sentence, interrupt=interrupt))
    return replies


def _now() -> float:
    return asyncio.get_running_loop().time()
