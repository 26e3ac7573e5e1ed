"""The end of a LiveKit job, run by LiveKit's own job process code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from livekit import api
from livekit.agents import Agent, JobContext, JobExecutorType
from livekit.agents.ipc import job_proc_lazy_main, proto
from livekit.agents.job import JobAcceptArguments, RunningJobInfo
from livekit.agents.utils import aio, http_context
from livekit.plugins import xai
from livekit.protocol import agent

import xai_pool_patch
from tests.kit import API_KEY, Heard, line_to, quick, speak
from tests.live.never_worse import EITHER, installed
from tests.session.test_session import session_of
from xai_pool_patch.pool.pool import CLOSE_TIMEOUT, Pool
from xai_pool_patch.testing import End, FakeServer

Entrypoint = Callable[[JobContext], Awaitable[None]]


class Worker:
    """The other end of a job process's pipe."""

    async def send(self, message: Any) -> None: ...


async def run_job(
    entrypoint: Entrypoint, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its start to its end, with an HTTP session of the job's own that leads to the server."""

    def new_session_context() -> Callable[[], Any]:
        session = server.client_session()
        http_context._ContextVar.set(lambda: session)
        return lambda: session

    monkeypatch.setattr(http_context, "_new_session_ctx", new_session_context)
    failures: list[Exception] = []

    async def noted(job: JobContext) -> None:
        try:
            await entrypoint(job)
        except Exception as failure:  # LiveKit would only log it
            failures.append(failure)
            raise

    thread = JobExecutorType.THREAD
    process = job_proc_lazy_main._JobProc(
        lambda _: None, noted, None, session_end_timeout=1.0, executor_type=thread
    )
    process.initialize(proto.InitializeRequest(), Worker())  # type: ignore[arg-type]
    pipe = aio.Chan[Any]()
    start = proto.StartJobRequest()
    start.running_job = job_info()
    pipe.send_nowait(start)
    await process.entrypoint(pipe)
    pipe.close()
    assert failures == []


def job_info() -> RunningJobInfo:
    arguments = JobAcceptArguments(name="agent", identity="agent", metadata="")
    return RunningJobInfo(
        accept_arguments=arguments,
        job=agent.Job(id="job", room=api.Room(name="room")),
        url="ws://127.0.0.1",
        token="",
        worker_id="worker",
        fake_job=True,
    )


async def converse(**voices: int) -> None:
    """Some turns with each voice, by TTS instances that nobody closes."""
    for voice, turns in voices.items():
        tts = xai.TTS(api_key=API_KEY, voice=voice)
        kept.append(tts)
        for number in range(turns):
            assert (await speak(tts, f"Turn {number}.")).error is None


kept: list[xai.TTS] = []


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    yield
    kept.clear()


async def test_every_connection_gets_a_close_frame(
    patched: None, no_tasks_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it xAI might count the sessions for ten more minutes."""
    async with line_to(round_trip=0.01) as line:

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=2, eve=2)
            assert len(job._shutdown_callbacks) == 1, "once a job"
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE] * 2
        assert [c.close_code for c in line.server.connections] == [1000] * 2
        assert xai_pool_patch.stats()["pools"] == 0


async def test_a_prewarmed_connection_gets_a_close_frame(
    patched: None, no_tasks_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may end before its agent has said anything."""
    async with line_to(round_trip=0.01) as line:

        async def entrypoint(job: JobContext) -> None:
            tts = xai.TTS(api_key=API_KEY)
            kept.append(tts)
            tts.prewarm()
            await line.server.wait_for(lambda s: s.network.accepted == 1)
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE]


async def test_a_peer_that_does_not_answer_does_not_hold_up_the_job(
    no_tasks_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: the timeout is for all connections together. The worker would wait ten seconds."""
    xai_pool_patch.install(xai_pool_patch.PoolOptions())
    async with line_to(quick(answer_close=False)) as line:

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1, eve=1, rex=1)
            job.shutdown()

        began = asyncio.get_running_loop().time()
        await run_job(entrypoint, line.server, monkeypatch)
        assert asyncio.get_running_loop().time() - began < CLOSE_TIMEOUT + 1.0
        assert [c.close_code for c in line.server.connections] == [1000] * 3
    xai_pool_patch.uninstall()


def pools() -> set[Pool[Any]]:
    """Those that something keeps; of a test that broke the code, something may."""
    gc.collect()
    return {each for each in gc.get_objects() if isinstance(each, Pool)}


async def test_two_jobs_on_one_loop_share_nothing(
    patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a console: the second job dials its own connections, and closes them."""
    before = pools()
    async with line_to() as line:

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1)
            job.shutdown()

        for _ in range(2):
            await run_job(entrypoint, line.server, monkeypatch)
            kept.clear()
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE] * 2
        assert pools() - before == set()


async def test_uninstall_before_the_end_of_a_job_leaves_nothing_to_do(
    patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown callback does nothing."""
    async with line_to() as line:

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1)
            xai_pool_patch.uninstall()
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE]


async def test_a_tts_collected_just_before_the_end_is_closed(
    patched: None, no_tasks_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local variable of the entrypoint: its pool has ended, and its connection is closing."""
    async with line_to(round_trip=0.01) as line:

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1)
            kept.clear()
            gc.collect()
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE]


async def test_outside_of_a_job_connections_stay_open(patched: None) -> None:
    """Until their TTS is closed."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        with contextlib.suppress(TimeoutError):
            await line.server.wait_for(lambda s: s.open_count == 0, timeout=0.05)
        assert line.server.open_count == 1
        await tts.aclose()


# Shutdown callbacks run side by side, ours among them. What others say while it runs, or after it,
# is all the job's own affair, and has to end as properly.


def our_own_has_run(server: FakeServer) -> bool:
    """It closes what is idle first of all."""
    return not server.connections[0].is_open


@dataclass
class LastWords:
    """A shutdown callback that speaks when ours has run."""

    server: FakeServer
    has_spoken_before: bool
    heard: list[Heard] = field(default_factory=list)

    def tts(self) -> xai.TTS:
        if not self.has_spoken_before:
            kept.append(xai.TTS(api_key=API_KEY, voice="eve"))
        return kept[-1]

    async def to_the_end(self) -> None:
        await self.server.wait_for(our_own_has_run)
        for text in ("Thank you for calling.", "Goodbye."):
            self.heard.append(await speak(self.tts(), text))

    async def interrupted(self) -> None:
        await self.server.wait_for(our_own_has_run)
        self.server.behaviour.pace = 10.0
        async with self.tts().stream() as stream:
            stream.push_text("Thank you for calling. Goodbye.")
            stream.end_input()
            await stream.__anext__()

    async def never_heard(self) -> None:
        await self.server.wait_for(our_own_has_run)
        self.server.behaviour.handshake_delay = 0.05
        accepted = self.server.network.accepted
        async with self.tts().stream() as stream:
            stream.push_text("Goodbye.")
            stream.end_input()
            await self.server.wait_for(lambda s: s.network.accepted > accepted)

    async def prewarmed(self) -> None:
        await self.server.wait_for(our_own_has_run)
        self.tts().prewarm()


@pytest.mark.parametrize("has_spoken_before", [True, False], ids=["its TTS", "a new TTS"])
@pytest.mark.parametrize("words", ["to_the_end", "interrupted", "never_heard", "prewarmed"])
async def test_turns_in_a_shutdown_callback_leave_nothing_open(
    words: str,
    has_spoken_before: bool,
    patched: None,
    no_tasks_left: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Spoken to the end, they are heard. Each connection gets a Close frame, and no standby is
    dialled."""
    async with line_to(round_trip=0.01) as line:
        last = LastWords(line.server, has_spoken_before)

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1)
            job.add_shutdown_callback(getattr(last, words))
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        spoken = [{utterance.number} for utterance in line.server.utterances[1:]]
        assert words != "to_the_end" or [heard.samples for heard in last.heard] == spoken
        await line.server.wait_for(lambda s: s.open_count == 0)
        ended = [connection.ended for connection in line.server.connections]
        assert ended == [End.CLIENT_CLOSE] * len(ended)
        assert line.server.network.accepted <= 2 + (words == "to_the_end")
        stats = xai_pool_patch.stats()
        assert (stats["pools"], stats["idle"], stats["connecting"]) == (0, 0, 0)


async def to_its_end(speech: asyncio.Task[Any]) -> None:
    await asyncio.wait([speech])


async def interrupt(speech: asyncio.Task[Any]) -> None:
    speech.cancel()
    await asyncio.wait([speech])


@pytest.mark.parametrize("deal_with", [to_its_end, interrupt])
async def test_turns_under_way_at_the_end_of_a_job_may_finish(
    deal_with: Callable[[asyncio.Task[Any]], Awaitable[None]],
    patched: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as anybody waits for them. Then their connection gets a Close frame."""
    async with line_to(quick(generation=0.1), round_trip=0.01) as line:
        speeches: list[asyncio.Task[Heard]] = []

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1, eve=1)
            speech = asyncio.create_task(speak(kept[-1], "Goodbye."))
            speeches.append(speech)

            async def deal_with_it() -> None:
                await line.server.wait_for(our_own_has_run)
                await deal_with(speech)

            await line.server.wait_for(lambda s: len(s.utterances) == 3)
            job.add_shutdown_callback(deal_with_it)
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        accepted = line.server.network.accepted
        await line.server.wait_for(lambda s: s.open_count == 0)
        await interrupt(speeches[0])
        if deal_with is to_its_end:
            assert speeches[0].result().samples == {line.server.utterances[2].number}
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE] * 2
        assert line.server.network.accepted == accepted
        assert xai_pool_patch.stats()["pools"] == 0


# Hung up in the middle of a sentence.

LIKE_SPEECH = {"pace": 5.0, "speech_per_character": 0.06}
LONG = "This is a sentence that goes on for as long as nobody hangs up. " * 20
UNTIL_THE_JOB_ENDS = 0.6
"""Seconds between the end of the call and that of its job."""


@EITHER
async def test_a_call_hung_up_in_mid_sentence_dials_nothing_more(
    is_patched: bool, no_tasks_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is to speak after the session was closed."""
    dials: list[int] = []
    with installed(is_patched):
        async with line_to(quick(**LIKE_SPEECH), round_trip=0.1) as line:

            async def entrypoint(job: JobContext) -> None:
                tts = xai.TTS(api_key=API_KEY)
                kept.append(tts)
                async with session_of(Agent(instructions=""), tts=tts) as (session, _):
                    await line.server.wait_for(lambda s: s.open_count or not is_patched)
                    session.say(LONG)
                    await line.server.wait_for(
                        lambda s: s.utterances and s.utterances[0].first_audio_at is not None
                    )
                    await asyncio.sleep(0.5)
                    dials.append(line.server.network.accepted)
                await asyncio.sleep(UNTIL_THE_JOB_ENDS)
                job.shutdown()

            await run_job(entrypoint, line.server, monkeypatch)
            assert dials == [1]
            assert line.server.network.accepted == 1
            if is_patched:
                assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE]


async def test_a_turn_in_a_task_of_the_applications_own_gets_a_close_frame(
    patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for that task when the job ends, and the HTTP session goes with the job."""
    async with line_to(quick(**LIKE_SPEECH), round_trip=0.01) as line:
        speeches: list[asyncio.Task[Heard]] = []

        async def entrypoint(job: JobContext) -> None:
            await converse(ara=1)
            speeches.append(asyncio.create_task(speak(kept[-1], LONG)))
            await line.server.wait_for(
                lambda s: len(s.utterances) == 2 and s.utterances[1].first_audio_at is not None
            )
            job.shutdown()

        await run_job(entrypoint, line.server, monkeypatch)
        accepted = line.server.network.accepted
        await line.server.wait_for(lambda s: s.open_count == 0)
        await interrupt(speeches[0])
        assert [c.ended for c in line.server.connections] == [End.CLIENT_CLOSE]
        assert [c.close_code for c in line.server.connections] == [1000]
        assert line.server.network.accepted == accepted == 1
