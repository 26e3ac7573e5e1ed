"""A conversation that any client can hold, turn after turn. All times are in seconds.

Each utterance of the fake server is PCM of one constant value below 256. So every byte of its audio
is either that value or zero, wherever the audio was cut into pieces.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Protocol

INTERRUPT_AFTER = 0.2
"""From the first audio of a turn to its interruption: audio is still on its way by then."""

TURN_TIMEOUT = 15.0


@dataclass(frozen=True)
class Turn:
    """Something to be said."""

    text: str
    pause: float
    """Silence before it, since the end of the last turn or its interruption."""
    interrupted: bool = False
    voice: str | None = None
    """The voice to switch to before the pause; None for the one that is in use."""


@dataclass(frozen=True)
class Task:
    """What a client has to do."""

    port: int
    """Of the server, which is `localhost`; the environment says whose certificates to trust."""
    api_key: str
    turns: list[Turn]

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        fields = json.loads(text)
        return cls(**{**fields, "turns": [Turn(**turn) for turn in fields["turns"]]})


@dataclass
class Heard:
    """What a caller heard of one turn."""

    first_audio: float | None = None
    """From the text to the first audio. None: it was silent."""
    samples: Counter[int] = field(default_factory=Counter)
    """How many samples there were of each value but zero."""


class Client(Protocol):
    """One client of the TTS, connected."""

    async def use_voice(self, voice: str) -> None:
        """Switches to another voice."""

    async def speak(self, text: str, hear: Callable[[bytes], None]) -> None:
        """Begins to speak; `hear` gets the audio, until the next turn begins."""

    async def finish(self) -> None:
        """Waits for the end of what is spoken."""

    async def interrupt(self) -> None:
        """Stops what is spoken."""


class Listener:
    """Hears one turn."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.began = asyncio.Event()
        self._asked_at = asyncio.get_running_loop().time()

    def hear(self, audio: bytes) -> None:
        if not self.began.is_set():
            self.began.set()
            self.heard.first_audio = asyncio.get_running_loop().time() - self._asked_at
        self.heard.samples.update(byte for byte in audio if byte)


async def hold(client: Client, turns: list[Turn]) -> list[Heard]:
    """Takes one turn after another."""
    results = []
    for turn in turns:
        if turn.voice is not None:
            await client.use_voice(turn.voice)
        await asyncio.sleep(turn.pause)
        listener = Listener()
        try:
            await asyncio.wait_for(_take(client, turn, listener), TURN_TIMEOUT)
        except Exception:
            # A turn that failed is one that was not heard.
            listener.heard.first_audio = None
        results.append(listener.heard)
    return results


async def _take(client: Client, turn: Turn, listener: Listener) -> None:
    await client.speak(turn.text, listener.hear)
    if turn.interrupted:
        await listener.began.wait()
        await asyncio.sleep(INTERRUPT_AFTER)
        await client.interrupt()
    else:
        await client.finish()


def main(open_client: Callable[[Task], AbstractAsyncContextManager[Client]]) -> None:
    """Carries out the task on stdin, and prints the turns as JSON on the last line of stdout."""

    async def run(task: Task) -> list[Heard]:
        async with open_client(task) as client:
            return await hold(client, task.turns)

    heard = asyncio.run(run(Task.from_json(sys.stdin.read())))
    sys.stdout.write("\n" + json.dumps([vars(each) for each in heard]) + "\n")
