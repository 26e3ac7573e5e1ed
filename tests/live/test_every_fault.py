"""A4: a fault in any function of the patch, at any call, costs one utterance at most.

The functions are not listed but found, and each is broken in its turn: at its first call, at its
second, and at every one. In a conversation with all that can happen in one, the utterance in
progress may then end in an error, after what was heard of it. All others are heard as they are
without the patch, and nothing is left open.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.plugins import xai

import xai_pool_patch
from tests import clock
from tests.instrument import Probes, instrumented
from tests.kit import Heard, Line, event_of, line_to, quick, speak
from tests.session.test_session import session_of
from xai_pool_patch import PoolOptions
from xai_pool_patch.telemetry import log, metrics

pytestmark = pytest.mark.filterwarnings(
    # Where it is the start of tasks that is broken.
    "ignore:coroutine .* was never awaited:RuntimeWarning"
)

DEFAULT = PoolOptions()
CLEARING = PoolOptions(interruption="clear")
GUARDS = {
    "protocol.lease._reports_faults.guarded",
    "plugin.native_pool.PoolAttribute.__get__",
    "plugin.native_pool.PoolAttribute.__set__",
    "plugin.patching.Patch._call",
    "plugin.signs.Signs.start",
    "plugin.wrappers.Wrappers.after.wrapper",
    "plugin.wrappers.Wrappers.run_ws",
    "plugin.wrappers.Wrappers.connect_ws",
    "plugin.wrappers.Wrappers.aclose",
    "plugin.wrappers.Wrappers._run_synthesis",
    "telemetry.log.flush",
    "installation.install",
    "installation.uninstall",
    "registry.Registry.attempt",
    "registry.Registry.is_open",
    "plugin.provider.ConnectionProvider.close",
    "plugin.provider.ConnectionProvider.close_if_over",
    "plugin.provider.ConnectionProvider.lease",
    "plugin.native_pool.PooledConnections.__getattr__",
    "plugin.native_pool.PooledConnections.__setattr__",
    "plugin.native_pool.PooledConnections._native",
    "plugin.native_pool.PooledConnections._return",
    "plugin.native_pool.PooledConnections.aclose",
    "plugin.native_pool.PooledConnections.get",
    "plugin.native_pool.PooledConnections.invalidate",
    "plugin.native_pool.PooledConnections.prewarm",
    "plugin.native_pool.PooledConnections.put",
    "plugin.native_pool.PooledConnections.remove",
    "protocol.lease.Lease.receive",
    "registry.Registry.fail",
    "pool.supervisor.Supervisor.run",
    "pool.supervisor.Supervisor._ended",
    "telemetry.log.harmless.guarded",
}
"""What others call, and what catches the faults of the rest: a `try` and a call, and no more."""

PATCHED = (xai.TTS, xai.tts.SynthesizeStream, AgentSession)
AS_IT_WAS = {owner: dict(vars(owner)) for owner in PATCHED}
"""The classes that are patched, as they are without."""

RETRYING = APIConnectOptions(max_retry=2, retry_interval=0.01, timeout=2.0)
"""The framework retries what ended in an error before anything was heard."""

PARTS = 12
"""A test breaks one part of the functions, so that the parts can run side by side."""


class Script(enum.Enum):
    """What happens in a play."""

    CONVERSATION = "_converse"
    SESSION = "_hold_a_session"
    LIMIT = "_meet_the_limit"


class Play:
    """One conversation, and what was wrong with it."""

    def __init__(self, probes: Probes, options: PoolOptions, script: Script) -> None:
        self.problems: list[str] = []
        self._cut_off: list[str] = []
        """The utterances that ended in an error."""
        self._probes = probes
        self._options = options
        self._script = getattr(self, script.value)

    def run(self) -> list[str]:
        _forget_what_is_cached()
        records = _Records()
        logger = logging.getLogger(xai_pool_patch.__name__)
        logger.addHandler(records)
        try:
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_RUNTIME_DIR", folder)
                self._folder = Path(folder)
                clock.run(self._whole())
        except Exception as error:
            self.problems.append(f"raised {error!r}")
        finally:
            self._probes.restore()
            xai_pool_patch.uninstall()
            self._put_the_plugin_right()
            log.flush()
            logger.removeHandler(records)
        self._check_log(records.messages)
        if len(self._cut_off) > (1 if self._probes.raised else 0):
            self.problems.append(f"cost more than one utterance: {self._cut_off}")
        return self.problems

    def _put_the_plugin_right(self) -> None:
        """What could not be taken out must pass calls through, and not meet the next play."""
        for owner, usual in AS_IT_WAS.items():
            for name in vars(owner).keys() - usual.keys():
                delattr(owner, name)
            for name, value in usual.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)

    def _check_log(self, messages: Counter[str]) -> None:
        faults = messages["ERROR failed open"]
        reports = messages["WARNING telemetry failed"]
        if faults > 1 or reports > 1 or (not faults and messages["DEBUG failed open"]):
            self.problems.append(f"said again and again: {messages}")
        dials = messages["WARNING standby failed"] + messages["WARNING replay failed"]
        alone = messages["WARNING left alone"]
        can_log = not (self._probes.broken or "").startswith("telemetry.log.")
        stores = messages["WARNING session store failed"]
        if self._probes.raised and can_log and not faults + reports + dials + stores + alone:
            self.problems.append(f"not a word of it in the log: {dict(messages)}")

    async def _whole(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: self.problems.append(f"the loop: {context['message']}")
        )
        xai_pool_patch.install(self._options)
        async with line_to(quick()) as line:
            await self._script(line, line.tts())
            try:
                xai_pool_patch.uninstall()
            except Exception as error:
                self.problems.append(f"uninstall() raised {error!r}")
            try:
                await line.server.wait_for(lambda s: s.open_count == 0, timeout=2.0)
            except TimeoutError:
                self.problems.append(f"left open: {line.server.open_count}")

    async def _converse(self, line: Line, tts: xai.TTS) -> None:
        tts.prewarm()
        await self._hear(line, tts, "Cold.")
        await self._hear(line, tts, "Over the same connection.")
        await self._interrupt(line, tts)
        await self._hear(line, tts, "After an interruption.")
        line.server.reset_all()
        await self._hear(line, tts, "Over a dead connection.")
        await self._lose(line, tts, "Lost on the way.")
        tts.update_options(voice="eve")
        await self._hear(line, tts, "In another voice.")
        if line.server.connections[-1].query["voice"] != "eve":
            self.problems.append("spoken in the old voice")
        await self._synthesize(line, tts, "In one piece.")
        await self._closing(tts)
        await self._hear(line, tts, "After the end.")
        await self._closing(tts)

    async def _hear(self, line: Line, tts: xai.TTS, text: str) -> None:
        heard = Heard()
        await self._in_time(text, speak(tts, text, RETRYING, heard=heard))
        self._check(line, text, heard)

    async def _in_time(self, what: str, doing: Coroutine[Any, Any, object]) -> None:
        try:
            await asyncio.wait_for(doing, 30.0)
        except asyncio.TimeoutError:
            self.problems.append(f"{what} hung")
        except Exception as error:
            self.problems.append(f"{what} raised {error!r}")

    def _check(self, line: Line, text: str, heard: Heard) -> None:
        wanted = "".join(text.split())
        spoken = [u for u in line.server.utterances if u.text == wanted]
        if heard.error is not None:
            self._cut_off.append(f"{text} {heard.error!r}")
        elif heard.samples != {spoken[-1].number} if spoken else True:
            self.problems.append(f"{text} heard {heard.samples}")
        elif heard.seconds < 0.95 * len(wanted) * line.server.behaviour.speech_per_character:
            self.problems.append(f"{text} heard {heard.seconds:.2f} s")

    async def _interrupt(self, line: Line, tts: xai.TTS) -> None:
        async def interrupt() -> None:
            line.server.behaviour.pace = 5.0
            async with tts.stream(conn_options=RETRYING) as stream:
                stream.push_text("Cut off in the middle of it.")
                stream.end_input()
                await stream.__anext__()

        await self._in_time("An interruption", self._utter("An interruption", interrupt()))
        line.server.behaviour.pace = 1000.0

    async def _lose(self, line: Line, tts: xai.TTS, text: str) -> None:
        """The connection is reset when the server has the text, and before it speaks."""
        behaviour, before = line.server.behaviour, len(line.server.utterances)
        behaviour.generation = 0.05
        heard = Heard()
        turn = asyncio.create_task(self._in_time(text, speak(tts, text, RETRYING, heard=heard)))
        await line.server.wait_for(lambda s: len(s.utterances) > before or turn.done())
        line.server.reset_all()
        await turn
        behaviour.generation = 0.01
        self._check(line, text, heard)

    async def _meet_the_limit(self, line: Line, tts: xai.TTS) -> None:
        """Another voice needs a session, and the last one's connection holds the only one."""
        await self._hear(line, tts, "Warm.")
        line.server.behaviour.max_sessions = 1
        tts.update_options(voice="eve")
        await self._hear(line, tts, "In another voice.")
        line.server.behaviour.max_sessions = None
        await self._hear(line, tts, "Beyond the limit.")
        with contextlib.suppress(asyncio.TimeoutError):  # where it is the store that is broken
            await asyncio.wait_for(self._is_told(), 0.5)
        await self._closing(tts)

    async def _is_told(self) -> None:
        while not any(path.is_file() for path in self._folder.rglob("*")):
            await asyncio.sleep(0.01)

    async def _hold_a_session(self, line: Line, tts: xai.TTS) -> None:
        await self._hear(line, tts, "Before the session.")
        await self._in_time("A session", self._speak_in_a_session(line, tts))
        await self._closing(tts)

    async def _speak_in_a_session(self, line: Line, tts: xai.TTS) -> None:
        """Its events reach its listeners, whatever is wrong with the wrapper around them."""
        created: list[Any] = []
        async with session_of(Agent(instructions=""), tts=tts) as (session, loudspeaker):
            session.on("speech_created", created.append)
            handles = [session.say(text) for text in ("By a session.", "And once more.")]
            for handle in handles:
                await handle.wait_for_playout()
        if [event.speech_handle for event in created] != handles:
            self.problems.append(f"heard of {len(created)} replies")
        spoken = [set(playback.samples) - {0} for playback in loudspeaker.playbacks]
        if spoken != [{utterance.number} for utterance in line.server.utterances[-2:]]:
            self.problems.append(f"the session said {spoken}")

    async def _synthesize(self, line: Line, tts: xai.TTS, text: str) -> None:
        heard = Heard()

        async def synthesize() -> None:
            async with tts.synthesize(text, conn_options=RETRYING) as stream:
                async for event in stream:
                    heard.samples.update(sample for sample in event.frame.data if sample)
                    heard.seconds += event.frame.duration

        await self._in_time(text, self._utter(text, synthesize(), heard))
        self._check(line, text, heard)

    async def _utter(
        self, what: str, doing: Coroutine[Any, Any, object], heard: Heard | None = None
    ) -> None:
        """Its error may be the one that a fault costs."""
        try:
            await doing
        except Exception as error:
            if heard is not None:
                heard.error = error
            else:
                self._cut_off.append(f"{what} {error!r}")

    async def _closing(self, tts: xai.TTS) -> None:
        await self._in_time("aclose", tts.aclose())


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[f"{record.levelname} {event_of(record)}"] += 1


def _forget_what_is_cached() -> None:
    """A function that is cached is called once in the life of a process, and else not broken."""
    log._has_complained = False
    metrics._has_warned = True  # the second registration in a process is refused
    modules = [each for name, each in sys.modules.items() if name.startswith("xai_pool_patch.")]
    for value in (value for module in modules for value in vars(module).values()):
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    xai_pool_patch.install()  # so that everything is imported
    xai_pool_patch.uninstall()
    with instrumented() as probes:
        yield probes


def _calls(
    probes: Probes, options: PoolOptions, script: Script = Script.CONVERSATION
) -> dict[str, int]:
    """The functions that a conversation calls, and how often."""
    probes.watch()
    play = Play(probes, options, script)
    assert play.run() == [], "nothing is broken yet"
    found = {name: n for name, n in probes.calls.items() if name not in GUARDS}
    assert len(found) > 150
    return found


def _part_of(name: str) -> int:
    """The same in every process, whatever else is called there."""
    return zlib.crc32(name.encode()) % PARTS


def _problems(
    probes: Probes,
    options: PoolOptions,
    calls: dict[str, int],
    script: Script = Script.CONVERSATION,
) -> list[str]:
    """What went wrong when each of these functions was broken, at one call or at all."""
    problems, plays = [], 0
    for name, count in sorted(calls.items()):
        for nth in (1, 2, None) if count > 1 else (1,):
            probes.watch(name, nth)
            found = Play(probes, options, script).run()
            plays += 1
            assert probes.raised, f"{name} was not called"
            problems += [f"{name}, call {nth or 'each'}: {problem}" for problem in found]
    print(f"{len(calls)} functions, {plays} plays, {len(problems)} problems")
    return problems


@pytest.mark.parametrize("part", range(PARTS))
def test_a_fault_in_any_function_silences_nobody(probes: Probes, part: int) -> None:
    """It costs one utterance at most, and is logged once."""
    calls = {name: n for name, n in _calls(probes, DEFAULT).items() if _part_of(name) == part}
    assert _problems(probes, DEFAULT, calls) == []


def test_a_fault_in_clearing_silences_nobody(probes: Probes) -> None:
    """In the functions that only `interruption="clear"` calls."""
    usual = _calls(probes, DEFAULT)
    calls = {name: n for name, n in _calls(probes, CLEARING).items() if name not in usual}
    assert _problems(probes, CLEARING, calls) == []


@pytest.mark.parametrize("script", [Script.SESSION, Script.LIMIT], ids=lambda script: script.name)
def test_a_fault_in_what_a_conversation_rarely_calls_silences_nobody(
    probes: Probes, script: Script
) -> None:
    """In the functions that only an AgentSession, or a refusal for the limit, calls."""
    usual = _calls(probes, DEFAULT)
    calls = {name: n for name, n in _calls(probes, DEFAULT, script).items() if name not in usual}
    assert _problems(probes, DEFAULT, calls, script) == []
