"""Pipecat's `XAITTSService` as a client, in a pipeline of its own."""

# Pipecat is not installed where types are checked.
# mypy: disable-error-code="import-not-found, misc"

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from loguru import logger
from pipecat.frames.frames import (
    EndFrame,
    Frame,
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.xai.tts import XAITTSService
from pipecat.workers.runner import WorkerRunner

from .conversation import Client, Task, main

SAMPLE_RATE = 24_000


class _Ear(FrameProcessor):
    """The end of the pipeline: hears the audio, and notices its end or its interruption."""

    def __init__(self) -> None:
        super().__init__()
        self.hear: Callable[[bytes], None] = lambda _: None
        self.stopped = asyncio.Event()
        self.interrupted = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.hear(frame.audio)
        elif isinstance(frame, TTSStoppedFrame):
            self.stopped.set()
        elif isinstance(frame, InterruptionFrame):
            self.interrupted.set()
        await self.push_frame(frame, direction)


class PipecatClient:
    """Speaks through the pipeline."""

    def __init__(self, worker: PipelineWorker, ear: _Ear) -> None:
        self._worker = worker
        self._ear = ear

    async def use_voice(self, voice: str) -> None:
        settings = XAITTSService.Settings(voice=voice)
        await self._worker.queue_frame(TTSUpdateSettingsFrame(delta=settings))

    async def speak(self, text: str, hear: Callable[[bytes], None]) -> None:
        self._ear.hear = hear
        self._ear.stopped.clear()
        await self._worker.queue_frame(TTSSpeakFrame(text))

    async def finish(self) -> None:
        await self._ear.stopped.wait()

    async def interrupt(self) -> None:
        self._ear.interrupted.clear()
        await self._worker.queue_frame(InterruptionFrame())
        await self._ear.interrupted.wait()


@contextlib.asynccontextmanager
async def _open(task: Task) -> AsyncIterator[Client]:
    tts = XAITTSService(
        api_key=task.api_key,
        base_url=f"wss://localhost:{task.port}/v1/tts",
        settings=XAITTSService.Settings(voice="ara"),
    )
    ear = _Ear()
    worker = PipelineWorker(
        Pipeline([tts, ear]),
        params=PipelineParams(audio_out_sample_rate=SAMPLE_RATE),
        cancel_on_idle_timeout=False,
    )
    started = asyncio.Event()
    worker.add_event_handler("on_pipeline_started", lambda *_: started.set())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    await started.wait()
    yield PipecatClient(worker, ear)
    await worker.queue_frame(EndFrame())
    await running


if __name__ == "__main__":
    logger.remove()
    main(_open)
