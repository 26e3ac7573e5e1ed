"""LiveKit's adapters around the plugin: they do with the patch what they do without it, or sooner.

What goes wrong is done to `ours`. `other`, a TTS with another key and a server of its own, is what
a `FallbackAdapter` goes on to.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from livekit.agents import Agent, APIConnectOptions, tokenize
from livekit.agents.tts import FallbackAdapter, StreamAdapter
from livekit.agents.voice.agent_session import SessionConnectOptions

import xai_pool_patch
from tests.kit import HAS_NATIVE_POOL, Line, all_closed, line_to, quick
from tests.session.test_session import session_of
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import SAMPLE_RATE, End, Ending, FakeServer, Outcome, Utterance

SECONDS_PER_CHARACTER = 0.01
OTHER_KEY = "other-key"
FIRST_OF_OTHER = 20
"""Its utterances, and so its samples, have higher numbers than any of ours."""

OPTIONS = PoolOptions(heartbeat=0.4)
ONE_TURN = APIConnectOptions(max_retry=0, timeout=2.0, retry_interval=0.02)
SHORT_TIMEOUT = APIConnectOptions(max_retry=0, timeout=0.3, retry_interval=0.02)
"""For a server that accepts and says nothing. What the adapter tries again it does itself."""

WHILE = 10.0
"""Seconds: far more than any turn takes here."""

SLACK = 0.4
"""Seconds by which a busy machine may be late."""

GREETING = "Hello there."
REPLY = "This is the reply."
SENTENCES = ["This is the first sentence.", "Here comes the second.", "And the third ends it."]


@contextlib.contextmanager
def installed(is_patched: bool, options: PoolOptions = OPTIONS) -> Iterator[None]:
    if is_patched:
        xai_pool_patch.install(options)
    try:
        yield
    finally:
        xai_pool_patch.uninstall()


@dataclass
class Said:
    """What a caller heard of one turn."""

    numbers: list[int] = field(default_factory=list)
    """Of the utterances, in the order in which they were heard."""
    samples: int = 0
    """Without zeros, which are silence of the framework's own."""
    error: Exception | None = None

    def hear(self, frame: Any) -> None:
        for number, samples in itertools.groupby(sample for sample in frame.data if sample):
            self.samples += len(list(samples))
            if self.numbers[-1:] != [number]:
                self.numbers.append(number)


async def said(stream: Any, text: str | None = None) -> Said:
    """What the stream says, with that text for a stream that takes any."""
    return await asyncio.wait_for(_said(stream, text), WHILE)


async def _said(stream: Any, text: str | None) -> Said:
    heard = Said()
    async with stream:
        if text is not None:
            stream.push_text(text)
            stream.end_input()
        try:
            async for event in stream:
                heard.hear(event.frame)
        except Exception as error:
            heard.error = error
    return heard


async def turn(tts: Any, text: str = REPLY, options: APIConnectOptions = ONE_TURN) -> Said:
    return await said(tts.stream(conn_options=options), text)


def bare(text: str) -> str:
    """As it comes to the server: the plugin's tokenizer drops the white space."""
    return "".join(text.split())


def check_whole(heard: Said, server: FakeServer, *texts: str) -> None:
    """These texts, one after the other, all of each, and nothing else."""
    assert heard.error is None
    assert heard.numbers == [server.utterance_for(text).number for text in texts]
    characters = sum(len(bare(text)) for text in texts)
    assert heard.samples == round(characters * SECONDS_PER_CHARACTER * SAMPLE_RATE)


@contextlib.asynccontextmanager
async def two_lines() -> AsyncIterator[tuple[Line, Line]]:
    async with line_to() as ours, line_to(quick(api_key=OTHER_KEY)) as other:
        number_from(other.server, FIRST_OF_OTHER)
        yield ours, other


def number_from(server: FakeServer, first: int) -> None:
    server.utterances += [Utterance(number, 0, 0.0) for number in range(1, first)]


@contextlib.asynccontextmanager
async def closing(*adapters_and_ttss: Any, lines: tuple[Line, ...]) -> AsyncIterator[None]:
    """Closes the adapters, which do not close what is inside them, and then that."""
    try:
        yield
    finally:
        for each in adapters_and_ttss:
            await each.aclose()
    for line in lines:
        await all_closed(line.server)


class Watched:
    """Two TTS behind a `FallbackAdapter`, and what it made of the first.

    Attributes:
        available: what it said about ours, in order.
        on_switch: called when ours is given up.
    """

    def __init__(self, ours: Line, other: Line) -> None:
        self.ours = ours.tts()
        self.other = other.tts(api_key=OTHER_KEY)
        self.adapter: Any = FallbackAdapter([self.ours, self.other])
        self.available: list[bool] = []
        self.on_switch: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()
        self.adapter.on("tts_availability_changed", self._note)

    @property
    def all(self) -> tuple[Any, ...]:
        return self.adapter, self.ours, self.other

    def _note(self, event: Any) -> None:
        assert event.tts is self.ours
        self.available.append(event.available)
        self._changed.set()
        if not event.available:
            self.on_switch()

    async def comes_back(self) -> None:
        while self.available[-1:] != [True]:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), WHILE)


# A FallbackAdapter, and ours out of order.


@dataclass
class Outage:
    """Why ours cannot be had for a while."""

    begin: Callable[[FakeServer], None]
    end: Callable[[FakeServer], None]
    options: APIConnectOptions = ONE_TURN


def stall(server: FakeServer) -> None:
    server.network.stall_new = True
    server.freeze_all()


def flow(server: FakeServer) -> None:
    server.network.stall_new = False
    server.network.unfreeze()


def behaving(**faults: Any) -> Outage:
    usual = quick()

    def begin(server: FakeServer) -> None:
        for name, value in faults.items():
            setattr(server.behaviour, name, value)
        server.reset_all()

    def end(server: FakeServer) -> None:
        for name in faults:
            setattr(server.behaviour, name, getattr(usual, name))

    return Outage(begin, end)


OUTAGES = {
    "a wrong key": behaving(api_key="the key has changed"),
    "no session left": behaving(max_sessions=0),
    "accepts and stalls": Outage(stall, flow, SHORT_TIMEOUT),
}


@dataclass
class Switch:
    """What it took until the adapter switched to the other."""

    attempts: int
    """Error events of ours, including those before a retry."""
    dials: int
    """Handshakes that ours answered."""
    seconds: float


async def breakdown(
    outage: Outage, *, is_warm: bool, is_patched: bool, options: PoolOptions = OPTIONS
) -> Switch:
    """A turn while ours is out of order, until just after it was given up, and two more."""
    with installed(is_patched, options):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                if is_warm:
                    check_whole(await turn(watched.adapter, GREETING), ours.server, GREETING)
                outage.begin(ours.server)
                if is_warm and is_patched and outage.options is ONE_TURN:
                    # The pool has heard of it, and tried in vain to replace what it had.
                    await ours.server.wait_for(lambda s: len(s.handshakes) == 2)
                switch = await reply_by_other(watched, outage, ours, other)
                await watched.comes_back()
                for text in ("I am back.", "I stay."):
                    heard = await turn(watched.adapter, text)
                    check_whole(heard, ours.server, text)
                assert watched.available == [False, True]
                if is_patched and outage is not OUTAGES["no session left"]:  # after that it is lean
                    assert ours.metrics[-1].connection_reused
                    assert len(set(spoken_on(ours.server, "I am back.", "I stay."))) == 1
    return switch


async def reply_by_other(watched: Watched, outage: Outage, ours: Line, other: Line) -> Switch:
    loop = asyncio.get_running_loop()
    switches: list[Switch] = []
    dials, errors, began = len(ours.server.handshakes), len(ours.errors), loop.time()

    def note() -> None:
        outage.end(ours.server)  # plugin 1.6.0's adapter looks for its recovery only now
        answered = [dial for dial in ours.server.handshakes[dials:] if dial.status]
        seconds = loop.time() - began
        switches.append(Switch(len(ours.errors) - errors, len(answered), seconds))

    watched.on_switch = note
    heard = await turn(watched.adapter, REPLY, outage.options)
    check_whole(heard, other.server, REPLY)
    [switch] = switches
    return switch


def spoken_on(server: FakeServer, *texts: str) -> list[int]:
    """The numbers of the connections that spoke these texts."""
    return [server.utterance_for(text).connection for text in texts]


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", OUTAGES)
async def test_the_adapter_switches_as_soon_as_unpatched_and_back(name: str, is_warm: bool) -> None:
    """No more attempts, dials or seconds; when ours is back, it is pooled again."""
    outage = OUTAGES[name]
    patched = await breakdown(outage, is_warm=is_warm, is_patched=True)
    # The native pool would wait for a half-open connection for ever: no mark to be held to.
    hangs = is_warm and HAS_NATIVE_POOL and outage.begin is stall
    unpatched = await breakdown(outage, is_warm=is_warm and not hangs, is_patched=False)
    assert patched.attempts <= unpatched.attempts
    assert patched.dials <= patched.attempts
    assert patched.seconds <= 1.5 * unpatched.seconds + SLACK


async def test_a_dead_connection_does_not_delay_the_switch() -> None:
    """Without PONGs and without a replacement the pool does not wait, however long the options let
    it wait for a session that answers PINGs."""
    stalled = OUTAGES["accepts and stalls"]
    options = PoolOptions(heartbeat=20.0)
    patched = await breakdown(stalled, is_warm=True, is_patched=True, options=options)
    unpatched = await breakdown(stalled, is_warm=False, is_patched=False)
    assert patched.attempts <= unpatched.attempts
    assert patched.seconds <= 1.5 * unpatched.seconds + SLACK


async def later_recovery(*, is_patched: bool) -> list[str]:
    """Who spoke each turn: ours is given up in the first, and well again after the second."""
    speakers = []
    with installed(is_patched, dataclasses.replace(OPTIONS, warm="always")):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                outage = OUTAGES["no session left"]
                outage.begin(ours.server)
                for number in range(5):
                    text = f"This is turn {number}."
                    stream = watched.adapter.synthesize(text, conn_options=ONE_TURN)
                    heard = await said(stream)
                    speaker = other if heard.numbers > [FIRST_OF_OTHER - 1] else ours
                    speakers.append("other" if speaker is other else "ours")
                    check_whole(heard, speaker.server, text)
                    if number == 1:
                        outage.end(ours.server)
                    if number == 2:
                        await watched.comes_back()
                if is_patched:
                    assert ours.metrics[-1].connection_reused
    return speakers


async def test_a_probe_of_the_adapter_finds_ours_recovered() -> None:
    """By `synthesize()`: in a stream, livekit-agents 1.6.0 probes only once."""
    unpatched = await later_recovery(is_patched=False)
    assert unpatched == ["other"] * 3 + ["ours"] * 2
    assert await later_recovery(is_patched=True) == unpatched


async def test_a_failing_probe_does_not_delay_the_turns_of_the_other(patched: None) -> None:
    """And it dials at most once a turn."""
    async with two_lines() as (ours, other):
        watched = Watched(ours, other)
        async with closing(*watched.all, lines=(ours, other)):
            OUTAGES["a wrong key"].begin(ours.server)
            for number in range(4):
                text = f"This is turn {number}."
                check_whole(await turn(watched.adapter, text), other.server, text)
                assert len(ours.server.handshakes) <= 2 + number
            assert watched.available == [False]
            assert other.metrics[-1].connection_reused
            assert len(other.server.connections) == 1


# A FallbackAdapter, and ours silent.


async def mute(*, is_warm: bool, is_patched: bool) -> tuple[bool, int]:
    """Whether the adapter goes on within a moment, and how often the text was sent to ours."""
    with installed(is_patched, PoolOptions()):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                if is_warm:
                    check_whole(await turn(watched.adapter, GREETING), ours.server, GREETING)
                ours.server.behaviour.mute = True
                reply = asyncio.create_task(turn(watched.adapter))
                await asyncio.wait([reply], timeout=0.5)
                goes_on = bool(watched.available)
                reply.cancel()  # as a caller would who has waited long enough
                await asyncio.wait([reply])
                begun = sum(u.text == bare(REPLY) for u in ours.server.utterances)
                ours.server.behaviour.mute = False
                for text in ("I am back.", "I stay."):
                    heard = await turn(watched.adapter, text)
                    check_whole(heard, (other if goes_on else ours).server, text)
    return goes_on, begun


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
async def test_a_mute_server_is_asked_no_more_often_than_the_adapter_retries(
    is_warm: bool,
) -> None:
    """The plugin would wait for it for ever. L4b gives the adapter errors to retry after."""
    goes_on, begun = await mute(is_warm=is_warm, is_patched=False)
    assert begun >= 1
    goes_on_patched, begun_patched = await mute(is_warm=is_warm, is_patched=True)
    assert goes_on_patched >= goes_on
    retries_and_a_probe = 3
    assert begun_patched <= begun + is_warm * retries_and_a_probe


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
async def test_the_other_takes_over_from_a_server_that_vanishes(is_warm: bool) -> None:
    """The plugin would wait for ever; the heartbeat finds it."""
    with installed(True):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                if is_warm:
                    await turn(watched.adapter, GREETING)
                ours.server.behaviour.mute = True
                reply = asyncio.create_task(turn(watched.adapter, REPLY, SHORT_TIMEOUT))
                await ours.server.wait_for(lambda s: s.utterances[is_warm:])
                stall(ours.server)
                check_whole(await reply, other.server, REPLY)
                flow(
                    ours.server
                )  # otherwise the end of the test waits for the half-open connection


# A FallbackAdapter, and a connection of ours that has died.


async def reset_idle(server: FakeServer) -> None:
    server.reset_all()


async def close_idle(server: FakeServer) -> None:
    await server.close_all()


async def freeze_idle(server: FakeServer) -> None:
    server.freeze_all()


@pytest.mark.parametrize("die", [reset_idle, close_idle, freeze_idle])
async def test_a_connection_that_died_while_idle_causes_no_switch(
    die: Callable[[FakeServer], Any],
) -> None:
    """The utterance is replayed, ours speaks, and there is no error."""
    with installed(True):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                check_whole(await turn(watched.adapter, GREETING), ours.server, GREETING)
                await die(ours.server)
                check_whole(await turn(watched.adapter), ours.server, REPLY)
                assert spoken_on(ours.server, GREETING, REPLY) == [1, 2]
                assert xai_pool_patch.stats()["replays"] == 1
                assert ours.errors == []
                assert watched.available == []
                assert other.server.handshakes == []
                flow(ours.server)


async def test_a_dead_session_that_answers_pings_causes_no_switch() -> None:
    """L4b: LiveKit retries the utterance, on a fresh connection."""
    with installed(True, PoolOptions(answer_timeout=0.3)):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                await turn(watched.adapter, GREETING)
                ours.server.behaviour.mute = True
                reply = asyncio.create_task(turn(watched.adapter))
                await ours.server.wait_for(lambda s: len(s.utterances) == 2)
                ours.server.behaviour.mute = False
                heard = await reply
                assert (heard.error, heard.numbers) == (None, [3])
                assert [event.recoverable for event in ours.errors] == [True]
                assert spoken_on(ours.server, GREETING) != [ours.server.utterances[-1].connection]
                assert watched.available == []
                assert other.server.handshakes == []


# A FallbackAdapter, and ours failing when it has been heard.


@dataclass
class Partial:
    """What came of a reply that broke off."""

    numbers: list[int]
    samples: int
    error: type | None
    errors: list[bool]
    """Of ours; whether the framework was to try again."""
    available: list[bool]
    next_by_other: bool


async def break_off(ending: Ending, *, is_warm: bool, is_patched: bool) -> Partial:
    with installed(is_patched):
        async with two_lines() as (ours, other):
            watched = Watched(ours, other)
            async with closing(*watched.all, lines=(ours, other)):
                number_from(ours.server, 1 if is_warm else 2)  # either way the reply is the second
                if is_warm:
                    check_whole(await turn(watched.adapter, GREETING), ours.server, GREETING)
                ours.server.behaviour.end_after_audio = ending
                heard = await turn(watched.adapter)
                ours.server.behaviour.end_after_audio = None
                assert not other.server.handshakes
                await turn(watched.adapter, "And on.")
                return Partial(
                    heard.numbers,
                    heard.samples,
                    heard.error and type(heard.error),
                    [event.recoverable for event in ours.errors],
                    watched.available,
                    bool(other.server.handshakes),
                )


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("ending", [Ending.CLOSE, Ending.RESET], ids=["Close", "reset"])
async def test_a_failure_after_the_first_audio_goes_as_unpatched(
    ending: Ending, is_warm: bool
) -> None:
    """Audio that was heard is not repeated, and the adapter marks ours in the same way."""
    unpatched = await break_off(ending, is_warm=is_warm, is_patched=False)
    assert unpatched.numbers == [2]
    assert await break_off(ending, is_warm=is_warm, is_patched=True) == unpatched


# A FallbackAdapter, and ours as the second.


async def ours_second(*, is_patched: bool) -> list[int]:
    """TCP connections to ours after: prewarm, a turn, a turn in need."""
    dials = []
    with installed(is_patched):
        async with two_lines() as (ours, other):
            ttss = [other.tts(api_key=OTHER_KEY), ours.tts()]
            adapter: Any = FallbackAdapter(ttss)
            async with closing(adapter, *ttss, lines=(ours, other)):
                adapter.prewarm()
                if is_patched:
                    await other.server.wait_for(lambda s: s.connections)
                dials.append(ours.server.network.accepted)
                check_whole(await turn(adapter, GREETING), other.server, GREETING)
                dials.append(ours.server.network.accepted)
                OUTAGES["a wrong key"].begin(other.server)
                check_whole(await turn(adapter), ours.server, REPLY)
                dials.append(ours.server.network.accepted)
    return dials


@pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
async def test_ours_as_the_second_is_not_dialled_before_it_is_needed(is_patched: bool) -> None:
    """A reserve must not hold a session."""
    assert await ours_second(is_patched=is_patched) == [0, 0, 1]


# A StreamAdapter.


def adapted(tts: Any) -> Any:
    return StreamAdapter(
        tts=tts, sentence_tokenizer=tokenize.basic.SentenceTokenizer(min_sentence_len=5)
    )


@pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
async def test_each_sentence_is_heard_once_in_order(is_patched: bool) -> None:
    """Patched, over one connection."""
    with installed(is_patched):
        async with line_to(round_trip=0.01) as line:
            tts = line.tts()
            adapter = adapted(tts)
            async with closing(adapter, tts, lines=(line,)):
                heard = await turn(adapter, " ".join(SENTENCES))
                check_whole(heard, line.server, *SENTENCES)
                assert len(line.server.utterances) == len(SENTENCES)
                if is_patched:
                    assert len(line.server.connections) == 1
                    streamed = [m for m in line.metrics if m.streamed]
                    assert [m.connection_reused for m in streamed] == [False, True, True]


async def test_text_pushed_word_by_word_is_heard_whole(patched: None) -> None:
    """As an LLM writes it, into a stream that speaks already."""
    async with line_to() as line:
        tts = line.tts()
        adapter = adapted(tts)
        async with closing(adapter, tts, lines=(line,)):
            stream = adapter.stream(conn_options=ONE_TURN)
            reply = asyncio.create_task(said(stream))
            for word in " ".join(SENTENCES).split():
                stream.push_text(f"{word} ")
                await asyncio.sleep(0)
            await line.server.wait_for(lambda s: s.utterances and s.utterances[0].finished)
            stream.end_input()
            check_whole(await reply, line.server, *SENTENCES)
            assert len(line.server.connections) == 1


async def test_an_interruption_ends_the_remaining_sentences(patched: None) -> None:
    """Its connection gets a Close frame, and the next turn is heard whole."""
    async with line_to(quick(pace=10.0)) as line:
        tts = line.tts()
        adapter = adapted(tts)
        async with closing(adapter, tts, lines=(line,)):
            async with adapter.stream(conn_options=ONE_TURN) as stream:
                stream.push_text(" ".join(SENTENCES))
                stream.end_input()
                await line.server.wait_for(
                    lambda s: len(s.utterances) == 2 and s.utterances[1].first_audio_at
                )
            cut_off = line.server.connections[0]
            check_whole(await turn(adapter), line.server, REPLY)
            assert [u.outcome for u in line.server.utterances] == [
                Outcome.FINISHED,
                Outcome.CUT_OFF,
                Outcome.FINISHED,
            ]
            await line.server.wait_for(lambda _: cut_off.ended)
            assert cut_off.ended is End.CLIENT_CLOSE
            assert line.errors == []


@pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
async def test_a_failed_sentence_is_retried_by_itself(is_patched: bool) -> None:
    """The adapter repeats nothing of the sentence before."""
    with installed(is_patched):
        async with line_to() as line:
            tts = line.tts()
            adapter = adapted(tts)
            async with closing(adapter, tts, lines=(line,)):
                stream = adapter.stream(
                    conn_options=APIConnectOptions(max_retry=2, timeout=2.0, retry_interval=0.02)
                )
                reply = asyncio.create_task(said(stream))
                stream.push_text(" ".join(SENTENCES))
                stream.end_input()
                await line.server.wait_for(lambda s: s.utterances and s.utterances[0].finished)
                line.server.behaviour.end_before_audio = Ending.RESET
                await line.server.wait_for(lambda s: len(s.utterances) == 2)
                await line.server.wait_for(lambda s: s.utterances[1].cut_off)
                line.server.behaviour.end_before_audio = None
                check_whole(await reply, line.server, *SENTENCES)
                if is_patched:
                    assert line.errors == []


# One inside the other.


def fallback(ours: Any, other: Any) -> Any:
    return FallbackAdapter([ours, other])


def fallback_of_stream(ours: Any, other: Any) -> Any:
    return FallbackAdapter([adapted(ours), other])


def stream_of_fallback(ours: Any, other: Any) -> Any:
    return adapted(FallbackAdapter([ours, other]))


ARRANGEMENTS = [fallback, fallback_of_stream, stream_of_fallback]


def pieces(
    arrange: Callable[..., Any], sentences: Sequence[str], *, by_other: bool
) -> Sequence[str]:
    """How the text comes to the server that speaks it."""
    is_whole = arrange is fallback or (arrange is fallback_of_stream and by_other)
    return [" ".join(sentences)] if is_whole else sentences


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
async def test_nested_adapters_handle_turns_and_interruptions(
    arrange: Callable[..., Any], patched: None, no_tasks_left: None
) -> None:
    """When they are closed, each connection gets a Close frame."""
    async with two_lines() as (ours, other):
        ttss = ours.tts(), other.tts(api_key=OTHER_KEY)
        adapter = arrange(*ttss)
        async with closing(adapter, *ttss, lines=(ours, other)):
            texts = pieces(arrange, SENTENCES, by_other=False)
            check_whole(await turn(adapter, " ".join(SENTENCES)), ours.server, *texts)
            assert len(ours.server.connections) == 1
            ours.server.behaviour.pace = 10.0
            async with adapter.stream(conn_options=ONE_TURN) as stream:
                stream.push_text(REPLY)
                stream.end_input()
                await stream.__anext__()
            ours.server.behaviour.pace = 1000.0
            check_whole(await turn(adapter, GREETING), ours.server, GREETING)
            assert other.server.handshakes == []
            assert ours.errors == []
        assert {c.ended for c in ours.server.connections} == {End.CLIENT_CLOSE}


async def nested_breakdown(arrange: Callable[..., Any], *sentences: str, is_patched: bool) -> int:
    """The number of attempts; see `Switch`."""
    with installed(is_patched):
        async with two_lines() as (ours, other):
            ttss = ours.tts(), other.tts(api_key=OTHER_KEY)
            adapter = arrange(*ttss)
            async with closing(adapter, *ttss, lines=(ours, other)):
                OUTAGES["a wrong key"].begin(ours.server)
                heard = await turn(adapter, " ".join(sentences))
                texts = pieces(arrange, sentences, by_other=True)
                check_whole(heard, other.server, *texts)
    return len(ours.errors)


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
async def test_nested_adapters_switch_when_ours_fails(arrange: Callable[..., Any]) -> None:
    """All sentences are heard from the other, after no more attempts than unpatched.

    The adapter may try ours anew for each text. How often it does depends on the time it has.
    """
    of_one = await nested_breakdown(arrange, SENTENCES[0], is_patched=False)
    of_all = await nested_breakdown(arrange, *SENTENCES, is_patched=True)
    assert 0 < of_all <= len(pieces(arrange, SENTENCES, by_other=True)) * of_one


@pytest.mark.parametrize("is_patched", [False, True], ids=["unpatched", "patched"])
async def test_the_other_continues_after_the_sentence_that_ours_finished(is_patched: bool) -> None:
    """No sentence is missed, and none is heard twice."""
    with installed(is_patched):
        async with two_lines() as (ours, other):
            ttss = ours.tts(), other.tts(api_key=OTHER_KEY)
            adapter = stream_of_fallback(*ttss)
            async with closing(adapter, *ttss, lines=(ours, other)):
                reply = asyncio.create_task(turn(adapter, " ".join(SENTENCES)))
                await ours.server.wait_for(lambda s: s.utterances and s.utterances[0].finished)
                ours.server.behaviour.api_key = "the key has changed"
                await ours.server.close_all()  # behind the audio.done of the first
                heard = await reply
                assert heard.error is None
                assert heard.numbers == [1, FIRST_OF_OTHER, FIRST_OF_OTHER + 1]
                spoken = [utterance.text for utterance in other.server.utterances[-2:]]
                assert spoken == [bare(sentence) for sentence in SENTENCES[1:]]


# The end of an adapter.


async def test_closing_the_adapter_ends_a_probe_under_way(
    patched: None, no_tasks_left: None
) -> None:
    """Nobody hears it; its connection gets a Close frame."""
    async with two_lines() as (ours, other):
        watched = Watched(ours, other)
        async with closing(watched.ours, watched.other, lines=(ours, other)):
            outage = OUTAGES["no session left"]
            outage.begin(ours.server)

            def leave_mute() -> None:
                outage.end(ours.server)
                ours.server.behaviour.mute = True

            watched.on_switch = leave_mute
            check_whole(await turn(watched.adapter), other.server, REPLY)
            await ours.server.wait_for(lambda s: s.utterances)
            await watched.adapter.aclose()
            await ours.server.wait_for(lambda s: s.utterances[0].cut_off)
            assert watched.available == [False]
        connections = [*ours.server.connections, *other.server.connections]
        assert {connection.ended for connection in connections} == {End.CLIENT_CLOSE}


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
async def test_an_unclosed_adapter_is_collected_with_its_connections(
    arrange: Callable[..., Any], patched: None
) -> None:
    """P10: the framework does not close it either."""
    async with two_lines() as (ours, other):
        adapter = arrange(ours.tts(), other.tts(api_key=OTHER_KEY))
        check_whole(await turn(adapter), ours.server, REPLY)
        assert ours.server.open_count == 1
        del adapter
        gc.collect()
        await all_closed(ours.server)
        assert ours.server.connections[0].ended is End.CLIENT_CLOSE


# In an AgentSession.


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
async def test_an_adapter_in_an_agent_session(arrange: Callable[..., Any], patched: None) -> None:
    """The session prewarms only ours. After an interruption and a failure of ours it speaks on."""
    async with two_lines() as (ours, other):
        ttss = ours.tts(), other.tts(api_key=OTHER_KEY)
        adapter = arrange(*ttss)
        async with (
            closing(adapter, *ttss, lines=(ours, other)),
            session_of(
                Agent(instructions=""),
                tts=adapter,
                conn_options=SessionConnectOptions(tts_conn_options=ONE_TURN),
            ) as (session, loudspeaker),
        ):
            await ours.server.wait_for(lambda s: s.open_count == 1)
            while not xai_pool_patch.stats()["idle"]:
                await asyncio.sleep(0)

            async def hear(text: str) -> set[int]:
                await session.say(text).wait_for_playout()
                return set(loudspeaker.playbacks[-1].samples) - {0}

            assert await hear(GREETING) == {1}
            ours.server.behaviour.pace = 10.0
            playback = loudspeaker.next_playback()
            handle = session.say(SENTENCES[0])
            await playback
            handle.interrupt()
            await handle.wait_for_playout()
            ours.server.behaviour.pace = 1000.0
            assert await hear(REPLY) == {3}
            assert other.server.handshakes == []
            OUTAGES["a wrong key"].begin(ours.server)
            assert await hear(SENTENCES[1]) == {FIRST_OF_OTHER}
