"""The comparison with other clients: how it holds a conversation, and what it counts."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.peers.command import (
    CASES,
    PLUGIN,
    Peer,
    PeerFailedError,
    _carry_out,
    figures_of,
    run_client,
)
from benchmarks.peers.conversation import Task, Turn, hold
from tests.demo.test_demo import refused
from xai_pool_patch.testing import FakeServer, Utterance

from .test_bench import bench

pytestmark = pytest.mark.real_time

PATCHED = Peer("patched", (sys.executable, "-m", PLUGIN, '{"interruption": "clear"}'))
INTERRUPTED = next(case for case in CASES if case.name == "interrupted-0.1s")


class Echo:
    """A client whose audio is what it was given, and that notes what it was asked."""

    def __init__(self, *audio: bytes) -> None:
        self.asked: list[str] = []
        self._audio = iter(audio)

    async def use_voice(self, voice: str) -> None:
        self.asked.append(f"voice {voice}")

    async def speak(self, text: str, hear: Callable[[bytes], None]) -> None:
        self.asked.append(text)
        if audio := next(self._audio):
            hear(audio)

    async def finish(self) -> None:
        self.asked.append("finish")

    async def interrupt(self) -> None:
        self.asked.append("interrupt")


def server_that_heard(*texts: str) -> FakeServer:
    server = FakeServer()
    server.utterances += [
        Utterance(number, connection=1, first_text_at=0.0, text=text)
        for number, text in enumerate(texts, 1)
    ]
    return server


async def test_a_conversation() -> None:
    """Turn after turn, with a switch of voice before and an interruption after the first audio."""
    client = Echo(b"\1\0", b"\2\0")
    turns = [Turn("One.", 0.0, interrupted=True), Turn("Two.", 0.0, voice="rex")]
    heard = await hold(client, turns)
    assert client.asked == ["One.", "interrupt", "voice rex", "Two.", "finish"]
    assert [each.samples for each in heard] == [{1: 1}, {2: 1}]
    assert all(each.first_audio is not None for each in heard)


async def test_audio_of_another_turn_is_wrong() -> None:
    """Sample by sample, wherever the audio was cut; a turn that was said twice may have both."""
    turns = [Turn(text, 0.0) for text in ("One.", "Two.", "Three.")]
    heard = await hold(Echo(b"\1\0\1", b"\0\1\0\2\0\2", b""), turns)
    server = server_that_heard("O n e. ", "Two.", "Three.")
    figures = figures_of(server, turns, [vars(each) for each in heard])
    assert (figures.wrong_samples, figures.silent, len(figures.times)) == (1, 1, 2)
    said_again = server_that_heard("Two.", "Two.", "Three.")
    assert figures_of(said_again, turns[1:], [vars(each) for each in heard[1:]]).wrong_samples == 0


async def test_the_plugin_is_a_client() -> None:
    """In a process of its own, patched: each turn is heard, with its own audio alone."""
    figures = await run_client(INTERRUPTED, PATCHED, 2)
    assert (figures.silent, figures.wrong_samples, figures.connections) == (0, 0, 1)
    assert len(figures.times) == 1


async def test_a_client_that_fails() -> None:
    """Its last words are the reason."""
    nobody = Peer("nobody", (sys.executable, "-c", "raise SystemExit('no such client')"))
    with pytest.raises(PeerFailedError, match="nobody failed: no such client"):
        await run_client(INTERRUPTED, nobody, 2)


async def test_a_client_that_is_stopped(tmp_path: Path) -> None:
    """As when another one fails: its process has ended, not only been killed."""
    started = tmp_path / "started"
    code = f"import os, time; os.symlink(str(os.getpid()), {str(started)!r}); time.sleep(600)"
    endless = Peer("endless", (sys.executable, "-c", code))
    client = asyncio.create_task(_carry_out(endless, Task(0, "fake-api-key", []), {}))
    while not started.is_symlink():
        assert not client.done()
        await asyncio.sleep(0.01)
    client.cancel()
    await asyncio.wait([client])
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(started.readlink())), 0)


def test_a_comparison_without_pipecat() -> None:
    """The command says in one line what is missing."""
    line = refused(bench("peers", "--pipecat", sys.executable, "--native-pool", sys.executable), 1)
    assert "pipecat failed: ModuleNotFoundError" in line
