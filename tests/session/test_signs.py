"""S2: a connection is dialled at the first sign of a reply, before there is any text to speak.

The pools are lean: nothing is open between two replies. The LLM gives its first token only when a
test lets it, so a handshake that comes before has been called for by a sign.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from livekit.agents import (
    Agent,
    AgentSession,
    AgentStateChangedEvent,
    AgentTask,
    UserStateChangedEvent,
    function_tool,
    tokenize,
)
from livekit.agents.tts import FallbackAdapter, StreamAdapter
from livekit.agents.voice import SpeechHandle
from livekit.agents.voice.agent_session import SessionConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Line, all_closed, event_of, line_to, registry
from tests.session.fakes import (
    FakeLLM,
    FakeRealtimeModel,
    FakeSTT,
    HoldingTurnDetector,
    ToolCall,
)
from tests.session.test_adapters import ONE_TURN, OTHER_KEY, two_lines
from tests.session.test_session import Speaker, session_of
from xai_pool_patch import PoolOptions
from xai_pool_patch.demo.conversation import Loudspeaker
from xai_pool_patch.plugin import conversation
from xai_pool_patch.plugin.conversation import current_conversation
from xai_pool_patch.pool import pool

LEAN = PoolOptions(warm="reply")
UNPATCHED_EMIT, UNPATCHED_START = vars(AgentSession)["emit"], vars(AgentSession)["start"]


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The patch in the mode that keeps nothing between replies, not even from session.start()."""
    monkeypatch.setattr(pool, "PREWARM_LASTS", 0.05)
    xai_pool_patch.install(LEAN)
    yield
    xai_pool_patch.uninstall()


@dataclass
class Call:
    """A session, and the server that its TTS speaks through."""

    line: Line
    session: Any
    loudspeaker: Loudspeaker

    @property
    def handshakes(self) -> int:
        return len(self.line.server.handshakes)

    async def dialled(self, count: int = 1) -> None:
        """So many handshakes since the session began, one of which is open."""
        await self.line.server.wait_for(lambda s: len(s.handshakes) == count and s.open_count)

    async def quiet(self) -> None:
        await all_closed(self.line.server)


@contextlib.asynccontextmanager
async def call_of(
    line: Line, tts: Any, model: Any, *, agent: Agent | None = None, **options: Any
) -> AsyncIterator[Call]:
    """A session that was prewarmed. That connection has been closed, and is not counted."""
    turns = {"turn_detection": "manual", **options.pop("turns", {})}
    session: Any = AgentSession(
        tts=tts,
        llm=model,
        vad=None,
        turn_handling={"interruption": {"resume_false_interruption": False}, **turns},
        conn_options=SessionConnectOptions(tts_conn_options=ONE_TURN),
        **options,
    )
    loudspeaker = Loudspeaker(speed=100.0, keep_samples=True)
    session.output.audio = loudspeaker
    await session.start(agent or Agent(instructions=""))
    each = Call(line, session, loudspeaker)
    try:
        await line.server.wait_for(lambda s: s.handshakes)
        await each.quiet()
        line.server.handshakes.clear()
        yield each
    finally:
        await session.aclose()


@contextlib.asynccontextmanager
async def call(
    model: Any, *, arrange: Callable[[xai.TTS], Any] = lambda tts: tts, **kwargs: Any
) -> AsyncIterator[Call]:
    async with line_to() as line:
        tts = line.tts()
        async with call_of(line, arrange(tts), model, **kwargs) as each:
            yield each
        await tts.aclose()
        await all_closed(line.server)


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 10.0)


def is_expected() -> bool:
    """Whether a reply is expected of the session that emitted last in this context."""
    session = current_conversation()
    return session is not None and session.is_expected


async def reply(each: Call, model: FakeLLM, dials: int = 1) -> SpeechHandle:
    """A reply that is dialled for before its first token, once."""
    before = each.handshakes
    handle = each.session.generate_reply()
    await each.dialled(before + dials)
    assert each.line.server.utterances == [] or each.line.server.utterances[-1].finished
    model.release()
    await handle.wait_for_playout()
    assert each.handshakes == before + dials
    return handle


def stream_adapter(tts: xai.TTS) -> Any:
    return StreamAdapter(tts=tts, sentence_tokenizer=tokenize.basic.SentenceTokenizer())


@pytest.mark.usefixtures("lean")
async def test_dials_before_the_first_token() -> None:
    """Once for each reply, from the first on; in between nothing is open."""
    model = FakeLLM("First.", "Second.", "Third.")
    async with call(model) as each:
        for _ in range(3):
            await reply(each, model)
            assert each.line.metrics[-1].connection_reused
            await each.quiet()
        assert xai_pool_patch.stats()["signs_used"] == 3


# Arrangements of TTS instances.


def in_stream_adapter(tts: xai.TTS) -> Any:
    return StreamAdapter(tts=tts, sentence_tokenizer=tokenize.basic.SentenceTokenizer())


def in_fallback_adapter(tts: xai.TTS) -> Any:
    return FallbackAdapter([tts])


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("arrange", [in_stream_adapter, in_fallback_adapter])
async def test_an_adapter(arrange: Callable[[xai.TTS], Any]) -> None:
    """Which TTS is inside it is known once that has spoken."""
    model = FakeLLM("First.", "Second.")
    async with call(model, arrange=arrange) as each:
        model.release()
        await each.session.generate_reply().wait_for_playout()
        await each.quiet()
        heard = len(each.line.metrics)
        await reply(each, model)
        assert each.line.metrics[heard].connection_reused


class OtherVoice(Agent):
    """Speaks with a TTS that the session does not know of."""

    def __init__(self, own: xai.TTS) -> None:
        super().__init__(instructions="")
        self._own = own

    async def tts_node(self, text: Any, model_settings: Any) -> Any:
        async with self._own.stream() as stream:
            async for piece in text:
                stream.push_text(piece)
            stream.end_input()
            async for event in stream:
                yield event.frame


@pytest.mark.usefixtures("lean")
async def test_a_tts_node_of_the_application() -> None:
    """What counts is the TTS that spoke last, not the one that the session has."""
    model = FakeLLM("First.", "Second.")
    async with line_to() as line:
        tts, own = line.tts(voice="ara"), line.tts(voice="eve")
        async with call_of(line, tts, model, agent=OtherVoice(own)) as each:
            model.release()
            await each.session.generate_reply().wait_for_playout()
            await each.quiet()
            line.server.handshakes.clear()
            await reply(each, model)
            assert [shake.query["voice"] for shake in line.server.handshakes] == ["eve"]
        for each_tts in (tts, own):
            await each_tts.aclose()
        await all_closed(line.server)


@pytest.mark.usefixtures("lean")
async def test_the_second_of_a_fallback_adapter() -> None:
    """It is dialled for only once it has spoken, and then the first is not."""
    model = FakeLLM("First.", "Second.", "Third.")
    async with two_lines() as (ours, other):
        ttss = ours.tts(), other.tts(api_key=OTHER_KEY)
        adapter: Any = FallbackAdapter([*ttss], max_retry_per_tts=0)
        async with call_of(ours, adapter, model) as each:
            model.release()
            await each.session.generate_reply().wait_for_playout()
            await each.quiet()
            assert other.server.handshakes == []
            ours.server.behaviour.api_key = "the key has changed"
            model.release()
            await each.session.generate_reply().wait_for_playout()
            assert other.server.utterances[-1].text == "Second."
            await all_closed(other.server)
            ours.server.handshakes.clear()
            other.server.handshakes.clear()
            handle = each.session.generate_reply()
            await other.server.wait_for(lambda s: s.open_count)
            assert ours.server.handshakes == []
            model.release()
            await handle.wait_for_playout()
            assert len(other.server.handshakes) == 1
        await adapter.aclose()
        for tts in ttss:
            await tts.aclose()


# What replies are made of.


@dataclass
class Tool:
    """A tool that takes as long as a test wants."""

    began: asyncio.Event
    may_end: asyncio.Event

    @classmethod
    def make(cls) -> tuple[Tool, Any]:
        tool = cls(asyncio.Event(), asyncio.Event())

        @function_tool(name="look_up")
        async def look_up() -> str:
            """Look something up."""
            tool.began.set()
            await tool.may_end.wait()
            return "found"

        return tool, look_up


@pytest.mark.usefixtures("lean")
async def test_a_tool_that_takes_longer_than_a_sign_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept open for it. Its end is a sign of its own."""
    monkeypatch.setattr(conversation, "SIGN_LASTS", 0.2)
    tool, look_up = Tool.make()
    model = FakeLLM(ToolCall("look_up"), "Here it is.")
    async with call(model, agent=Agent(instructions="", tools=[look_up])) as each:
        handle = each.session.generate_reply()
        await each.dialled(1)
        model.release()
        await tool.began.wait()
        await each.quiet()
        thinking = AgentStateChangedEvent(old_state="listening", new_state="thinking")
        each.session.emit(thinking.type, thinking)
        assert not is_expected()
        monkeypatch.setattr(conversation, "SIGN_LASTS", 10.0)
        tool.may_end.set()
        await each.dialled(2)
        model.release()
        await handle.wait_for_playout()
        assert each.handshakes == 2
        assert each.line.server.utterances[-1].text == "Hereitis."


@pytest.mark.usefixtures("lean")
async def test_a_tool_that_is_quick() -> None:
    """The connection that the reply's first sign called for is the one that speaks the answer."""
    tool, look_up = Tool.make()
    model = FakeLLM(ToolCall("look_up"), "Here it is.")
    async with call(model, agent=Agent(instructions="", tools=[look_up])) as each:
        handle = each.session.generate_reply()
        await each.dialled(1)
        tool.may_end.set()
        model.release()
        model.release()
        await handle.wait_for_playout()
        assert each.handshakes == 1


@pytest.mark.usefixtures("lean")
async def test_replies_in_a_queue() -> None:
    """What waits for its turn keeps the connection, longer than a lean pool keeps any."""
    texts = [f"This is number {number}." for number in range(3)]
    async with call(FakeLLM()) as each:
        each.loudspeaker._speed = 1.0
        handles = [each.session.say(text) for text in texts]
        for handle in handles:
            await handle.wait_for_playout()
        assert each.handshakes == 1
        assert len(each.line.server.utterances) == 3
        await each.quiet()


@pytest.mark.usefixtures("lean")
async def test_interrupted_before_the_first_text() -> None:
    """The connection is not kept for ten seconds."""
    model = FakeLLM("First.")
    async with call(model) as each:
        before = xai_pool_patch.stats()["signs_unused"]
        handle = each.session.generate_reply()
        await each.dialled()
        handle.interrupt()
        await each.quiet()
        assert xai_pool_patch.stats()["signs_unused"] == before + 1


@pytest.mark.usefixtures("lean")
async def test_one_of_two_replies_is_interrupted() -> None:
    """The other still comes: it is spoken over the one connection."""
    model = FakeLLM("First.")
    async with call(model) as each:
        first = each.session.generate_reply()
        await each.dialled()
        second = each.session.say("Second.")
        first.interrupt()
        await second.wait_for_playout()
        assert each.handshakes == 1


@pytest.mark.usefixtures("lean")
async def test_a_reply_without_text() -> None:
    """Costs one connection for as long as it takes."""
    model = FakeLLM("")
    async with call(model) as each:
        handle = each.session.generate_reply()
        await each.dialled()
        model.release()
        await handle.wait_for_playout()
        await each.quiet()
        assert each.handshakes == 1
        assert each.line.server.utterances == []


@pytest.mark.usefixtures("lean")
async def test_a_reply_that_a_listener_interrupts() -> None:
    """The listener runs first, so nothing is dialled for that reply."""
    async with call(FakeLLM("First.")) as each:
        each.session.on("speech_created", lambda event: event.speech_handle.interrupt())
        handle = each.session.generate_reply()
        assert not is_expected()
        await handle.wait_for_playout()
        assert each.handshakes == 0


@pytest.mark.usefixtures("lean")
async def test_thinking_only_prolongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it is no sign: a tool may begin that takes any time."""
    thinking = AgentStateChangedEvent(old_state="listening", new_state="thinking")
    user_listens = UserStateChangedEvent(old_state="speaking", new_state="listening")
    model = FakeLLM("First.")
    async with call(model) as each:
        for event in (thinking, user_listens):
            each.session.emit(event.type, event)
            assert not is_expected()
        monkeypatch.setattr(conversation, "SIGN_LASTS", 0.5)
        handle = each.session.generate_reply()
        monkeypatch.setattr(conversation, "SIGN_LASTS", 10.0)
        each.session.emit(thinking.type, thinking)
        await asyncio.sleep(0.6)
        assert is_expected()
        handle.interrupt()
        await each.quiet()


@pytest.mark.usefixtures("lean")
async def test_a_session_that_only_writes() -> None:
    """Without an audio output there is nothing to dial for."""
    model = FakeLLM("First.")
    async with call(model) as each:
        each.session.output.set_audio_enabled(False)
        handle = each.session.generate_reply()
        model.release()
        await handle.wait_for_playout()
        assert each.handshakes == 0


# How turns begin.


@pytest.mark.usefixtures("lean")
async def test_preemptive_generation() -> None:
    """The turn detector holds the reply back, which has begun with the transcript."""
    model, ears = FakeLLM("First.", "Never said."), FakeSTT()
    turns = {
        "turn_detection": HoldingTurnDetector(),
        "endpointing": {"min_delay": 0.05, "max_delay": 0.5},
    }
    async with call(model, stt=ears, turns=turns) as each:
        ears.hear("What is the time?")
        await each.dialled()
        assert model.asked == 1
        assert each.session.agent_state != "thinking"  # it may not speak yet
        model.release()
        await each.line.server.wait_for(lambda s: s.utterances and s.utterances[-1].finished)
        await until(lambda: each.line.metrics)
        assert (each.handshakes, model.asked) == (1, 1)
        assert each.line.metrics[-1].connection_reused


@pytest.mark.usefixtures("lean")
async def test_a_user_who_goes_on_speaking() -> None:
    """The preemptive reply is given up for another one: both are one caller."""
    model, ears = FakeLLM("First.", "Second."), FakeSTT()
    turns = {
        "turn_detection": HoldingTurnDetector(),
        "endpointing": {"min_delay": 0.05, "max_delay": 0.3},
    }
    async with call(model, stt=ears, turns=turns) as each:
        ears.hear("What is")
        await until(lambda: model.asked == 1)
        ears.hear("the time?")
        await until(lambda: model.asked == 2)
        await each.dialled()
        model.release()
        await each.line.server.wait_for(lambda s: s.utterances and s.utterances[-1].finished)
        assert each.handshakes == 1


@pytest.mark.usefixtures("lean")
async def test_manual_turn_detection() -> None:
    """The reply begins when the application commits the user's turn."""
    model, ears = FakeLLM("First."), FakeSTT()
    async with call(model, stt=ears) as each:
        ears.hear("What is the time?")
        await until(lambda: ears.events.empty())
        each.session.commit_user_turn(transcript_timeout=0.1)
        await each.dialled()
        model.release()
        await each.line.server.wait_for(lambda s: s.utterances and s.utterances[-1].finished)
        assert each.handshakes == 1


@pytest.mark.usefixtures("lean")
async def test_a_realtime_model_that_writes() -> None:
    """Its first sign is the end of what the user says."""
    model = FakeRealtimeModel(speaks=False)
    async with call(model, turns={"turn_detection": "realtime_llm"}) as each:
        [realtime] = model.sessions
        realtime.user_speaks()
        assert each.handshakes == 0
        realtime.user_stops()
        await each.dialled()
        realtime.reply("First.")
        await each.line.server.wait_for(lambda s: s.utterances and s.utterances[-1].finished)
        assert each.handshakes == 1


@pytest.mark.usefixtures("lean")
async def test_a_realtime_model_that_speaks_itself() -> None:
    """It needs the TTS only for what the application says."""
    model = FakeRealtimeModel(speaks=True)
    async with call(model, turns={"turn_detection": "realtime_llm"}) as each:
        [realtime] = model.sessions
        realtime.user_speaks()
        realtime.user_stops()
        assert not is_expected()
        handle = each.session.generate_reply()
        assert not is_expected()
        handle.interrupt()
        await each.session.say("By the TTS.").wait_for_playout()
        assert each.handshakes == 1


# Several agents, several sessions.


@pytest.mark.usefixtures("lean")
async def test_a_handover() -> None:
    """The agent that has taken over is dialled for before it has said a word."""
    model = FakeLLM("First.", "Second.")
    async with line_to() as line:
        ara, eve = line.tts(voice="ara"), line.tts(voice="eve")
        successor = Speaker(eve)
        async with call_of(line, ara, model) as each:
            await reply(each, model)
            await successor.take_over(each.session)
            await until(lambda: line.server.handshakes[-1].query["voice"] == "eve")
            await each.quiet()
            line.server.handshakes.clear()
            await reply(each, model)
            assert [shake.query["voice"] for shake in line.server.handshakes] == ["eve"]
        for tts in (ara, eve):
            await tts.aclose()


class Question(AgentTask[str]):
    """Asks with the model, and is answered by itself."""

    def __init__(self) -> None:
        super().__init__(instructions="")

    async def on_enter(self) -> None:
        await self.session.generate_reply()
        self.complete("answered")


@pytest.mark.usefixtures("lean")
async def test_an_agent_task() -> None:
    """Its replies have signs like any other, and so has the one that follows it."""

    @function_tool(name="ask")
    async def ask() -> str:
        """Ask the user."""
        return await Question()

    model = FakeLLM(ToolCall("ask"), "May I ask you something?", "Thank you.")
    async with call(model, agent=Agent(instructions="", tools=[ask])) as each:
        handle = each.session.generate_reply()
        await each.dialled(1)
        model.release()
        await until(lambda: model.asked == 2)
        await each.dialled(1)
        model.release()
        await until(lambda: model.asked == 3)
        await each.line.server.wait_for(lambda s: s.open_count)
        dials = each.handshakes
        model.release()
        await handle.wait_for_playout()
        assert each.handshakes == dials
        assert len(each.line.server.utterances) == 2
        assert [m.connection_reused for m in each.line.metrics] == [True, True]


@pytest.mark.usefixtures("lean")
async def test_several_sessions_in_one_loop() -> None:
    """One dial for each that is about to reply, and none for one that is not."""
    models = [FakeLLM(f"Number {number}.") for number in range(3)]
    async with contextlib.AsyncExitStack() as stack, line_to() as line:
        ttss = [line.tts() for _ in models]
        calls = [
            await stack.enter_async_context(call_of(line, tts, model))
            for tts, model in zip(ttss, models, strict=True)
        ]
        first, second, _ = calls
        handles = [first.session.generate_reply(), second.session.generate_reply()]
        await line.server.wait_for(lambda s: s.open_count == 2)
        models[0].release()
        models[1].release()
        for handle in handles:
            await handle.wait_for_playout()
        assert len(line.server.handshakes) == 2
        assert [metric.connection_reused for metric in line.metrics] == [True, True]
        await stack.aclose()
        for tts in ttss:
            await tts.aclose()


@pytest.mark.usefixtures("lean")
def test_sessions_in_threads() -> None:
    """Each has a loop of its own, and its dials are made there."""
    problems: list[BaseException] = []

    async def hold() -> None:
        model = FakeLLM("First.", "Second.")
        async with call(model) as each:
            for _ in range(2):
                await reply(each, model)
                await each.quiet()

    def run() -> None:
        try:
            asyncio.run(hold())
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


async def stays_closed(line: Line) -> None:
    """For an hour, in which nothing is dialled either."""
    await all_closed(line.server)
    seen = line.server.network.accepted
    await asyncio.sleep(3600.0)
    assert (line.server.network.accepted, line.server.open_count) == (seen, 0)
    assert xai_pool_patch.stats()["pools"] == 0


@pytest.mark.parametrize("says", ["Hello.", ""], ids=["heard", "silent"])
async def test_the_end_of_a_session_with_four_agents(says: str, patched: None) -> None:
    """S6a: each has a voice of its own, and perhaps never said a word."""
    async with line_to(round_trip=0.02) as line:
        agents = [Speaker(line.tts(voice=f"voice {number}")) for number in range(4)]
        own = line.tts(voice="own")
        async with session_of(Agent(instructions=""), tts=own) as (session, _):
            for agent in (*agents, agents[0]):
                await agent.take_over(session)
                await (session.say(says).wait_for_playout() if says else asyncio.sleep(1.0))
        await stays_closed(line)


@pytest.mark.parametrize("says", ["Hello. And again.", ""], ids=["heard", "silent"])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda tts, other: tts,
        lambda tts, other: FallbackAdapter([tts, other]),
        lambda tts, other: StreamAdapter(
            tts=tts, sentence_tokenizer=tokenize.basic.SentenceTokenizer()
        ),
    ],
    ids=["itself", "fallback", "sentences"],
)
async def test_the_end_of_a_session_with_an_adapter(
    arrange: Callable[[xai.TTS, xai.TTS], Any], says: str, patched: None
) -> None:
    """S6a: a call that is hung up before its first word, too."""
    async with line_to() as line:
        ttss = line.tts(voice="ara"), line.tts(voice="eve")
        async with session_of(Agent(instructions=""), tts=arrange(*ttss)) as (session, _):
            await (session.say(says).wait_for_playout() if says else asyncio.sleep(1.0))
            assert line.server.open_count
        await stays_closed(line)


# The wrappers themselves.


def test_uninstall_restores_the_session() -> None:
    """Exactly."""
    xai_pool_patch.install()
    assert vars(AgentSession)["emit"] is not UNPATCHED_EMIT
    assert vars(AgentSession)["start"] is not UNPATCHED_START
    xai_pool_patch.uninstall()
    assert vars(AgentSession)["emit"] is UNPATCHED_EMIT
    assert vars(AgentSession)["start"] is UNPATCHED_START


async def test_an_emit_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left alone, with one record in the log; the pools work without signs."""

    def emit(self: Any, event: str, *args: Any) -> None:
        self._recorded_events.extend(args)
        super(AgentSession, self).emit(event, *args)  # type: ignore[misc]

    monkeypatch.setattr(AgentSession, "emit", emit)
    with caplog.at_level(logging.WARNING, "xai_pool_patch"):
        xai_pool_patch.install(LEAN)
    try:
        assert vars(AgentSession)["emit"] is emit
        [record] = caplog.records
        assert event_of(record) == "no signs of replies"
        async with line_to() as line:
            tts = line.tts()
            session: Any = AgentSession(tts=tts)
            session.output.audio = Loudspeaker(speed=100.0)
            await session.start(Agent(instructions=""))
            await session.say("Hello.").wait_for_playout()
            assert line.server.utterance_for("Hello.").finished
            await session.aclose()
            await tts.aclose()
    finally:
        xai_pool_patch.uninstall()


@pytest.mark.usefixtures("lean")
async def test_a_session_with_an_emit_of_its_own() -> None:
    """A subclass may override it, and gets everything that it would get without the patch."""
    seen: list[str] = []

    class Overriding(AgentSession[None]):
        def emit(self, event: Any, arg: Any) -> None:
            seen.append(event)
            super().emit(event, arg)

    async with line_to() as line:
        tts = line.tts()
        session: Any = Overriding(tts=tts)
        session.output.audio = Loudspeaker(speed=100.0)
        await session.start(Agent(instructions=""))
        await session.say("Hello.").wait_for_playout()
        await session.aclose()
        await tts.aclose()
    assert "speech_created" in seen
    assert xai_pool_patch.stats()["signs_used"] >= 1


@pytest.mark.usefixtures("lean")
async def test_events_of_the_application_and_of_other_threads() -> None:
    """They are passed on, and nothing else happens."""
    async with call(FakeLLM()) as each:
        heard: list[Any] = []
        for event in ("mine", "speech_created"):
            each.session.on(event, heard.append)
        each.session.emit("mine", 1)
        await asyncio.to_thread(each.session.emit, "speech_created", 2)
        assert heard == [1, 2]
        assert each.handshakes == 0
        assert not registry().has_failed


@pytest.mark.usefixtures("lean")
async def test_a_listener_that_raises() -> None:
    """Its error is the application's, as without the patch."""
    async with call(FakeLLM()) as each:

        def listener(event: Any) -> None:
            raise TypeError("of the application")

        each.session.on("mine", listener)
        with pytest.raises(TypeError, match="of the application"):
            each.session.emit("mine", 1)


@pytest.mark.usefixtures("lean")
async def test_nothing_keeps_a_session() -> None:
    """The context in which it emitted something goes on without it."""
    session: Any = AgentSession()
    session.emit("agent_state_changed", AgentStateChangedEvent(old_state="idle", new_state="idle"))
    assert current_conversation() is not None
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
