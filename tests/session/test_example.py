"""`examples/agent.py`: a job of it, run by LiveKit's own job process code, without a room."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from livekit.agents import AgentSession, JobContext
from livekit.plugins.xai import tts as plugin_module

import xai_pool_patch
from tests.kit import API_KEY, all_closed, line_to
from tests.live.test_job import run_job
from xai_pool_patch.demo.conversation import Loudspeaker

SOURCE = Path(__file__).parents[2] / "examples/agent.py"
GREETING = "Hello, how can I help you?"
ANSWER = "That is done for you."


class Mouth(AgentSession[None]):
    """A session that only speaks: the example's other models would need keys of their own."""

    def __init__(self, *, tts: Any, **_: Any) -> None:
        super().__init__(tts=tts)
        self.loudspeaker = Loudspeaker(speed=100.0, keep_samples=True)
        self.output.audio = self.loudspeaker


@pytest.fixture
def example() -> Iterator[Any]:
    """The example as a fresh job process imports it."""
    spec = importlib.util.spec_from_file_location("example", SOURCE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    xai_pool_patch.uninstall()


def test_importing_the_example_patches_the_plugin(example: Any) -> None:
    """Before any job. It has the entrypoint that the worker will call."""
    assert xai_pool_patch.is_installed()
    assert hasattr(plugin_module.SynthesizeStream._run_ws, "__wrapped__")
    assert example.server._entrypoint_fnc is example.entrypoint


async def test_a_job_of_the_example_greets_the_caller(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dials before it connects to the room. Both turns find that connection, and are whole."""
    monkeypatch.setenv("XAI_API_KEY", API_KEY)
    sessions: list[Mouth] = []
    metrics: list[Any] = []

    def session(**models: Any) -> Mouth:
        models["tts"].on("metrics_collected", metrics.append)
        sessions.append(Mouth(**models))
        return sessions[-1]

    monkeypatch.setattr(example, "AgentSession", session)

    async def job_of_two_turns(job: JobContext) -> None:
        await example.entrypoint(job)
        await sessions[0].say(ANSWER).wait_for_playout()
        job.shutdown()

    async with line_to() as line:

        async def connect_slowly(_: JobContext) -> None:
            await line.server.wait_for(lambda server: server.open_count == 1)
            while not xai_pool_patch.stats()["idle"]:
                await asyncio.sleep(0)

        monkeypatch.setattr(JobContext, "connect", connect_slowly)
        await run_job(job_of_two_turns, line.server, monkeypatch)
        heard = [set(playback.samples) - {0} for playback in sessions[0].loudspeaker.playbacks]
        spoken = [line.server.utterance_for(text).number for text in (GREETING, ANSWER)]
        assert heard == [{number} for number in spoken]
        assert [metric.connection_reused for metric in metrics] == [True, True]
        assert len(line.server.connections) == 1
        await all_closed(line.server)
