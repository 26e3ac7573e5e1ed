"""Models without a network: each does what a test says, when the test says so."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

from livekit.agents import llm, stt
from livekit.agents.llm import ChatChunk, ChoiceDelta, FunctionToolCall
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS


class FakeLLM(llm.LLM):
    """Gives its replies in order, each after `release()`.

    Args:
        replies: a text, or the name of a tool to call.

    Attributes:
        asked: how many replies it was asked for.
    """

    def __init__(self, *replies: str | ToolCall) -> None:
        super().__init__()
        self.asked = 0
        self._replies = list(replies)
        self._released = asyncio.Semaphore(0)

    def release(self) -> None:
        """Let the next reply begin."""
        self._released.release()

    def chat(self, *, chat_ctx: Any, tools: Any = None, **kwargs: Any) -> Any:
        self.asked += 1
        options = kwargs.get("conn_options", DEFAULT_API_CONNECT_OPTIONS)
        return _Reply(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=options)

    async def next_reply(self) -> str | ToolCall:
        await self._released.acquire()
        return self._replies.pop(0)


class ToolCall(str):
    """The name of a tool that the LLM calls."""


class _Reply(llm.LLMStream):
    async def _run(self) -> None:
        assert isinstance(self._llm, FakeLLM)
        reply = await self._llm.next_reply()
        if isinstance(reply, ToolCall):
            call = FunctionToolCall(name=str(reply), arguments="{}", call_id=f"call-{reply}")
            delta = ChoiceDelta(role="assistant", tool_calls=[call])
        else:
            delta = ChoiceDelta(role="assistant", content=reply)
        self._event_ch.send_nowait(ChatChunk(id="reply", delta=delta))


class FakeSTT(stt.STT):
    """Hears what a test says for the user."""

    def __init__(self) -> None:
        super().__init__(capabilities=stt.STTCapabilities(streaming=True, interim_results=False))
        self.events: asyncio.Queue[Any] = asyncio.Queue()

    def hear(self, text: str) -> None:
        """The user has said that."""
        heard = stt.SpeechData(language="en", text=text, confidence=1.0)
        kind = stt.SpeechEventType.FINAL_TRANSCRIPT
        self.events.put_nowait(stt.SpeechEvent(type=kind, alternatives=[heard]))

    def stream(self, **kwargs: Any) -> Any:
        options = kwargs.get("conn_options", DEFAULT_API_CONNECT_OPTIONS)
        return _Hearing(stt=self, conn_options=options)

    async def _recognize_impl(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Hearing(stt.RecognizeStream):
    async def _run(self) -> None:
        assert isinstance(self._stt, FakeSTT)
        while True:
            self._event_ch.send_nowait(await self._stt.events.get())


class HoldingTurnDetector:
    """Is never sure that the user has finished."""

    model = provider = "fake"

    async def unlikely_threshold(self, language: Any) -> float:
        return 0.5

    async def supports_language(self, language: Any) -> bool:
        return True

    async def predict_end_of_turn(self, chat_ctx: Any, **kwargs: Any) -> float:
        return 0.0


def _inert(base: type) -> Any:
    """A class with every abstract method of its base, which do nothing."""

    async def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def at_once(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    abstract = {
        name: method
        for name in dir(base)
        if getattr(method := getattr(base, name), "__isabstractmethod__", False)
    }
    methods = {
        name: nothing if inspect.iscoroutinefunction(method) else at_once
        for name, method in abstract.items()
    }
    return type(f"Inert{base.__name__}", (base,), methods)


class FakeRealtimeModel(_inert(llm.RealtimeModel)):  # type: ignore[misc]
    """A realtime model that hears and writes, or speaks itself.

    Attributes:
        sessions: those that were begun.
    """

    def __init__(self, *, speaks: bool) -> None:
        flags = dict.fromkeys(llm.RealtimeCapabilities.__dataclass_fields__, False)
        given = {**flags, "turn_detection": True, "audio_output": speaks}
        super().__init__(capabilities=llm.RealtimeCapabilities(**given))
        self.sessions: list[FakeRealtimeSession] = []

    def session(self, **kwargs: Any) -> Any:
        self.sessions.append(FakeRealtimeSession(self))
        return self.sessions[-1]


class FakeRealtimeSession(_inert(llm.RealtimeSession)):  # type: ignore[misc]
    chat_ctx = llm.ChatContext.empty()
    tools = llm.ToolContext.empty()

    def generate_reply(self, **kwargs: Any) -> asyncio.Future[Any]:
        """A reply that does not come."""
        return asyncio.get_running_loop().create_future()

    def user_speaks(self) -> None:
        self.emit("input_speech_started", llm.InputSpeechStartedEvent())

    def user_stops(self) -> None:
        stopped = llm.InputSpeechStoppedEvent(user_transcription_enabled=False)
        self.emit("input_speech_stopped", stopped)

    def reply(self, text: str) -> None:
        """The model writes that."""
        modalities = asyncio.get_running_loop().create_future()
        modalities.set_result(["text"])
        message = llm.MessageGeneration(
            message_id="message",
            text_stream=_each(text),
            audio_stream=_each(),
            modalities=modalities,
        )
        self.emit(
            "generation_created",
            llm.GenerationCreatedEvent(
                message_stream=_each(message), function_stream=_each(), user_initiated=False
            ),
        )


async def _each(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item
