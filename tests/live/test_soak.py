"""Thousands of turns with faults and interruptions at random, the same ones at every run."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import linecache
import logging
import random
import tracemalloc
from dataclasses import dataclass, field

import pytest
from livekit.agents import APIConnectOptions, APIStatusError
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Heard, Line, all_closed, line_to, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import Clearing, Ending

CONVERSATIONS = 4
OPTIONS = PoolOptions(
    heartbeat=0.3, answer_timeout=0.3, max_age=3.0, max_idle_time=0.5, warm="always"
)
LEAN = dataclasses.replace(OPTIONS, warm="auto")
CLEARING = dataclasses.replace(OPTIONS, interruption="clear")
FLAT = 1_500_000
"""Bytes: what caches hold, however many turns there were. 2,000 leases would be several times
that."""
ENOUGH = 400
"""Turns in which a session is refused."""
RETRYING = APIConnectOptions(max_retry=2, retry_interval=0.01, timeout=2.0)
ENDINGS = [Ending.CLOSE, Ending.RESET]
ACKNOWLEDGED = [Clearing.ACKNOWLEDGED, Clearing.CROSSED, Clearing.LATE]


@dataclass
class Conversation:
    """One agent, and what chance has in store for it."""

    line: Line
    tts: xai.TTS
    chance: random.Random
    turns: int
    is_limited: bool
    """The server may have no second session, and the TTS may be prewarmed, at any moment."""
    silent: list[str] = field(default_factory=list)

    async def hold(self) -> None:
        for number in range(self.turns):
            self._inject_fault()
            behaviour = self.line.server.behaviour
            behaviour.clearing = self.chance.choice(ACKNOWLEDGED)
            # In time for the framework's retries, by which the unpatched plugin would speak too.
            relenting = asyncio.get_running_loop().call_later(0.03, self._relent)
            await self._turn(f"This is turn {number}.")
            relenting.cancel()
            self._relent()

    def _inject_fault(self) -> None:
        """One turn in three meets a fault."""
        server, behaviour = self.line.server, self.line.server.behaviour
        faults = [
            server.reset_all,
            server.freeze_all,
            lambda: setattr(behaviour, "end_before_audio", self.chance.choice(ENDINGS)),
            lambda: setattr(behaviour, "end_after_audio", self.chance.choice(ENDINGS)),
            lambda: setattr(behaviour, "refuse_next", [503]),
            lambda: setattr(behaviour, "raw_before_audio", ["{not json"]),
            # At once: after the first text of the next utterance it could be that one's audio.
            lambda: setattr(behaviour, "late_audio", 0.0),
            lambda: setattr(behaviour, "answer_close", False),
            lambda: self.tts.update_options(voice=self.chance.choice(["ara", "eve"])),
            *([lambda: setattr(behaviour, "max_sessions", 1), self.tts.prewarm] * self.is_limited),
        ]
        if self.chance.random() < 1 / 3:
            self.chance.choice(faults)()

    def _relent(self) -> None:
        behaviour = self.line.server.behaviour
        behaviour.end_before_audio = behaviour.end_after_audio = behaviour.late_audio = None
        behaviour.refuse_next, behaviour.raw_before_audio = [], []
        behaviour.answer_close, behaviour.max_sessions = True, None

    async def _turn(self, text: str) -> None:
        heard = Heard()
        turn = asyncio.create_task(speak(self.tts, text, RETRYING, heard=heard))
        timeout = self.chance.choice([None, None, self.chance.uniform(0, 0.05)])
        await asyncio.wait([turn], timeout=timeout)
        interrupted = not turn.done()
        turn.cancel()
        await asyncio.wait([turn])
        self._check(text, heard, interrupted)

    def _check(self, text: str, heard: Heard, interrupted: bool) -> None:
        wanted = "".join(text.split())
        spoken = {u.number for u in self.line.server.utterances if u.text and wanted in u.text}
        wrong = heard.samples - spoken
        assert not wrong, f"{text} heard {wrong}, not {spoken}"
        if not interrupted and not heard.samples and not _gives_up_at_once(heard.error):
            self.silent.append(f"{text} {heard.error!r}")


def _gives_up_at_once(error: Exception | None) -> bool:
    """After a 429, livekit-agents 1.5.2 does not try again, with or without the patch."""
    return isinstance(error, APIStatusError) and error.status_code == 429 and not error.retryable


@pytest.mark.parametrize(("options", "share"), [(OPTIONS, 1), (CLEARING, 4), (LEAN, 4)])
async def test_thousands_of_turns_with_faults_leave_no_wrong_sample_and_no_leak(
    options: PoolOptions, share: int, pytestconfig: pytest.Config, no_tasks_left: None
) -> None:
    """No turn stays silent after the framework's retries."""
    turns: int = pytestconfig.getoption("--soak-turns") // share
    xai_pool_patch.install(options)
    logging.disable()  # pytest would keep every record, with the frames of its traceback
    try:
        # So that what is cached once is there before counting.
        await _converse(turns // 10, is_limited=options is LEAN)
        gc.collect()
        tracemalloc.start()
        await _converse(turns, is_limited=options is LEAN)
        gc.collect()
        linecache.clearcache()  # the source of every file that was in a traceback
        leaked, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        stats = xai_pool_patch.stats()
        assert (stats["idle"], stats["leased"], stats["connecting"]) == (0, 0, 0)
        assert stats["clearing"] == 0
        assert (stats["connections_cleared"] > 0) == (options is CLEARING), stats
        assert stats["rate_limited"] or turns < ENOUGH, stats  # a 503 is a refusal, too
        assert leaked < FLAT, f"{leaked} bytes kept after {turns} turns"
    finally:
        logging.disable(logging.NOTSET)
        xai_pool_patch.uninstall()


async def _converse(turns: int, *, is_limited: bool) -> None:
    each = turns // CONVERSATIONS
    conversations = [_conversation(seed, each, is_limited) for seed in range(CONVERSATIONS)]
    for outcome in await asyncio.gather(*conversations, return_exceptions=True):
        if outcome is not None:
            raise outcome


async def _conversation(seed: int, turns: int, is_limited: bool) -> None:
    async with line_to(quick(generation=0.005, clear_delay=0.01), round_trip=0.002) as line:
        tts = line.tts()
        conversation = Conversation(line, tts, random.Random(seed), turns, is_limited)
        await conversation.hold()
        assert conversation.silent == []
        # An utterance on a connection that still owed another one.
        assert all(not connection.violations for connection in line.server.connections)
        line.server.network.unfreeze()
        await tts.aclose()
        await all_closed(line.server)
