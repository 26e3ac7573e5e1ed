"""`interruption="clear"`: whatever the server answers, no sample is heard in another turn."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import ONCE, Heard, Line, all_closed, event_of, interrupted, line_to, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import Behaviour, Clearing, End, Outcome

CLEAR = PoolOptions(interruption="clear")
FALLEN_BACK = "clearing stopped"
SECONDS_PER_CHARACTER = 0.02
CONVERSATIONS = 4
TRUSTING = {Clearing.ACKNOWLEDGED, Clearing.CROSSED}
"""Where nothing ever makes a pool go back to discarding."""
LONGEST_DELAY = {Clearing.LATE: 0.15, Clearing.LEAKING: 0.02}
"""Seconds: mostly before the next turn is heard of."""


@pytest.fixture
def clears_interrupted() -> Any:
    xai_pool_patch.install(CLEAR)
    yield
    xai_pool_patch.uninstall()


def clears(line: Line) -> int:
    return sum(connection.clears for connection in line.server.connections)


def said_so(caplog: pytest.LogCaptureFixture) -> int:
    return [event_of(record) for record in caplog.records].count(FALLEN_BACK)


async def hear_whole(line: Line, tts: xai.TTS, text: str) -> None:
    """A turn that is heard from its beginning to its end, and nothing else with it."""
    heard = await speak(tts, text)
    check(line, text, heard)
    assert heard.error is None
    wanted = len("".join(text.split())) * line.server.behaviour.speech_per_character
    # The framework may end a sentence with a hundredth of a second of silence.
    assert heard.seconds == pytest.approx(wanted, abs=0.011)


def check(line: Line, text: str, heard: Heard) -> None:
    """More than one utterance of a text: it was sent again. One of them is heard."""
    wanted = "".join(text.split())
    spoken = {u.number for u in line.server.utterances if u.text and wanted.startswith(u.text)}
    assert heard.samples <= spoken, f"{text} heard {heard.samples}, not {spoken}"
    assert len(heard.samples) <= 1


# The fuzz


@dataclass
class Conversation:
    """One agent that is interrupted at random moments."""

    line: Line
    clearing: Clearing
    chance: random.Random
    turns: int
    interruptions: int = 0
    tts: xai.TTS = field(init=False)

    async def hold(self) -> None:
        self.tts = self.line.tts()
        for number in range(self.turns):
            if number % 5 == 0 and self.clearing not in TRUSTING:
                await self.tts.aclose()  # the next pool knows nothing yet
            self.line.server.behaviour.clear_delay = self.chance.uniform(
                0.0, LONGEST_DELAY.get(self.clearing, 0.0)
            )
            await self._turn(f"This is turn number {number}.")
            await asyncio.sleep(self.chance.choice([0.0, self.chance.uniform(0.0, 0.03)]))
        await self.tts.aclose()

    async def _turn(self, text: str) -> None:
        """Takes about 0.05 s if it is not interrupted."""
        timeout = self.chance.choice(
            [None, 0.0, self.chance.uniform(0.0, 0.02), self.chance.uniform(0.02, 0.06)]
        )
        if timeout is None:
            await hear_whole(self.line, self.tts, text)
            return
        heard = Heard()
        turn = asyncio.create_task(speak(self.tts, text, heard=heard))
        await asyncio.wait([turn], timeout=timeout)
        self.interruptions += not turn.done()
        turn.cancel()
        await asyncio.wait([turn])
        check(self.line, text, heard)


LEAST_TURNS = 150
"""Of each kind. Fewer would say little of what happens now and then."""


@pytest.mark.parametrize("clearing", Clearing)
async def test_no_wrong_sample_after_interruptions_at_random_moments(
    clearing: Clearing,
    pytestconfig: pytest.Config,
    no_tasks_left: None,
) -> None:
    """However the clear goes, every turn is heard whole."""
    turns = max(LEAST_TURNS, pytestconfig.getoption("--soak-turns") // 8)
    xai_pool_patch.install(CLEAR)
    talks = [_converse(clearing, seed, turns // CONVERSATIONS) for seed in range(CONVERSATIONS)]
    ended = await asyncio.gather(*talks)
    stats = xai_pool_patch.stats()
    xai_pool_patch.uninstall()
    interruptions = sum(talk.interruptions for talk in ended)
    connections = [each for talk in ended for each in talk.line.server.connections]
    leaks = sum(connection.leaks for connection in connections)
    print(
        f"{clearing.name}: {turns} turns, {interruptions} interrupted,"
        f" {sum(connection.clears for connection in connections)} clears,"
        f" {stats['connections_cleared']} cleared, {leaks} leaks, {stats['replays']} replays,"
        f" {len(connections)} connections"
    )
    assert turns / 3 < interruptions < turns, "the moments are badly chosen"
    if clearing in TRUSTING:
        assert stats["connections_cleared"] > turns / 4
        assert len(connections) < turns / 10
    elif clearing in (Clearing.IGNORED, Clearing.REFUSED):
        assert stats["connections_cleared"] == 0
    else:
        assert stats["connections_cleared"] > turns / 50
    if clearing is Clearing.LEAKING:
        assert leaks > turns / 20
        assert stats["replays"] > 0, "no leak met a turn"


async def _converse(clearing: Clearing, seed: int, turns: int) -> Conversation:
    behaviour = quick(
        generation=0.01, pace=20.0, speech_per_character=SECONDS_PER_CHARACTER, clearing=clearing
    )
    async with line_to(behaviour, round_trip=0.01) as line:
        talk = Conversation(line, clearing, random.Random(seed), turns)
        await talk.hold()
        await all_closed(line.server)
    for connection in line.server.connections:
        assert connection.ended is End.CLIENT_CLOSE, connection
        assert connection.violations == []
        outcomes = [utterance.outcome for utterance in connection.utterances[:-1]]
        assert set(outcomes) <= {Outcome.FINISHED, Outcome.CLEARED}
    return talk


# One after the other

SPEECH = "This is a sentence of a long speech. " * 30
"""Takes the server half a second."""


def steady(**faults: Any) -> Behaviour:
    return quick(**{"pace": 40.0, "speech_per_character": SECONDS_PER_CHARACTER, **faults})


@pytest.mark.usefixtures("clears_interrupted")
async def test_the_conversation_goes_on_over_the_same_connection() -> None:
    """A round trip after the interruption it is idle, and the pool has dialled no other."""
    async with line_to(steady(), round_trip=0.05) as line:
        tts = line.tts()
        for number in range(5):
            connection = await interrupted(line, tts, SPEECH)
            await hear_whole(line, tts, f"And now {number}.")
            assert line.server.utterances[-2].outcome is Outcome.CLEARED
            assert line.server.utterances[-1].connection == connection.number
        assert len(line.server.handshakes) == 1
        assert line.metrics[-1].acquire_time < 3 * 0.05, "longer than a handshake"
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
@pytest.mark.parametrize("answered", [Clearing.ACKNOWLEDGED, Clearing.IGNORED])
async def test_an_interruption_does_not_wait_for_the_server(answered: Clearing) -> None:
    """P7: the stream is closed before the server can have received the clear."""
    async with line_to(steady(clearing=answered), round_trip=0.2) as line:
        tts = line.tts()
        connection = await interrupted(line, tts, SPEECH)
        assert connection.clears == 0
        assert xai_pool_patch.stats()["clearing"] == 1
        await line.server.wait_for(lambda _: connection.clears == 1)
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
async def test_a_turn_interrupted_before_its_first_text_needs_no_clear() -> None:
    """The server owes nothing."""
    async with line_to(steady()) as line:
        tts = line.tts()
        await speak(tts, "First.")
        async with tts.stream() as stream:
            stream.push_text("Sec")
            while not xai_pool_patch.stats()["leased"]:
                await asyncio.sleep(0)
        assert xai_pool_patch.stats()["idle"] == 1
        await hear_whole(line, tts, "Third.")
        assert len(line.server.connections) == 1
        assert clears(line) == 0
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
async def test_a_connection_without_a_sign_of_life_is_not_cleared() -> None:
    """It is closed, as it is without an interruption."""
    async with line_to(steady(), round_trip=0.02) as line:
        tts = line.tts()
        await hear_whole(line, tts, "First.")
        line.server.behaviour.mute = True
        line.server.freeze_all()
        turn = asyncio.create_task(speak(tts, "Never heard."))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        turn.cancel()
        await asyncio.wait([turn])
        assert xai_pool_patch.stats()["clearing"] == 0
        assert xai_pool_patch.stats()["closed_interrupted"] == 1
        line.server.network.unfreeze()
        line.server.behaviour.mute = False
        await hear_whole(line, tts, "Heard.")
        assert clears(line) == 0
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
@pytest.mark.parametrize("clearing", [Clearing.IGNORED, Clearing.REFUSED])
async def test_after_two_failed_clears_interruptions_discard(
    clearing: Clearing, caplog: pytest.LogCaptureFixture
) -> None:
    """As they do by default; the log says so once."""
    async with line_to(steady(clearing=clearing), round_trip=0.02) as line:
        tts = line.tts()
        for number in range(4):
            connection = await interrupted(line, tts, SPEECH)
            await hear_whole(line, tts, f"And now {number}.")
            await line.server.wait_for(lambda _, it=connection: it.ended is End.CLIENT_CLOSE)
            assert connection.clears == (number < 2)
        assert said_so(caplog) == 1
        assert line.errors == []
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
@pytest.mark.parametrize(
    ("when", "clear_delay"), [("idle", 0.03), ("leased", 0.1), ("text under way", 0.07)]
)
async def test_audio_after_the_acknowledgement_is_not_heard(
    when: str, clear_delay: float, caplog: pytest.LogCaptureFixture
) -> None:
    """And the pool trusts no clear again. The turn that such audio meets is replayed. The
    acknowledgement arrives 0.1 s after the interruption, and the next text leaves then, to arrive
    0.05 s later. What the server says before that is not its answer."""
    behaviour = steady(clearing=Clearing.LEAKING, clear_delay=clear_delay)
    async with line_to(behaviour, round_trip=0.1) as line:
        tts = line.tts()
        connection = await interrupted(line, tts, SPEECH)
        if when == "idle":
            await line.server.wait_for(lambda _: not connection.is_open)
        async with tts.stream(conn_options=ONCE) as stream:
            stream.push_text("And n")
            if when == "leased":
                await line.server.wait_for(lambda _: connection.leaks == 1)
            stream.push_text("ow.")
            stream.end_input()
            samples = {s async for event in stream for s in event.frame.data if s}
        assert samples == {line.server.utterance_for("And now.").number}
        assert line.errors == []
        assert connection.leaks == 1
        await line.server.wait_for(lambda _: connection.ended is End.CLIENT_CLOSE)
        assert xai_pool_patch.stats()["replays"] == (when != "idle")
        assert said_so(caplog) == 1
        await interrupted(line, tts, SPEECH)
        await hear_whole(line, tts, "Goodbye.")
        assert clears(line) == 1
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
async def test_a_server_that_answers_at_once_is_not_suspected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Audio after the PONG is the answer, though it took no time to generate."""
    async with line_to(steady(generation=0.0), round_trip=0.02) as line:
        tts = line.tts()
        for number in range(20):
            await interrupted(line, tts, SPEECH)
            await hear_whole(line, tts, f"And now {number}.")
        assert xai_pool_patch.stats()["replays"] == 0
        assert len(line.server.connections) == 1
        assert said_so(caplog) == 0
        await tts.aclose()


@pytest.mark.usefixtures("clears_interrupted")
async def test_without_pongs_no_acknowledgement_is_trusted() -> None:
    """Nothing separates old audio from new, so an interrupted connection is closed."""
    async with line_to(steady(answer_pings=False)) as line:
        tts = line.tts()
        for number in range(3):
            await interrupted(line, tts, SPEECH)
            await hear_whole(line, tts, f"And now {number}.")
        assert (clears(line), xai_pool_patch.stats()["replays"]) == (0, 0)
        assert line.errors == []
        await tts.aclose()


# Ends


@pytest.mark.usefixtures("clears_interrupted")
async def test_aclose_does_not_wait_for_a_clear(no_tasks_left: None) -> None:
    """The server gets its Close frame."""
    async with line_to(steady(clearing=Clearing.IGNORED)) as line:
        tts = line.tts()
        connection = await interrupted(line, tts, SPEECH)
        await tts.aclose()
        assert (connection.ended, connection.close_code) == (End.CLIENT_CLOSE, 1000)
        assert len(line.server.handshakes) == 1


async def test_uninstall_during_a_clear_closes_the_connection(no_tasks_left: None) -> None:
    """From then on the plugin connects by itself."""
    xai_pool_patch.install(CLEAR)
    async with line_to(steady(clearing=Clearing.IGNORED)) as line:
        tts = line.tts()
        connection = await interrupted(line, tts, SPEECH)
        xai_pool_patch.uninstall()
        await line.server.wait_for(lambda _: connection.ended is End.CLIENT_CLOSE)
        await hear_whole(line, tts, "Hello.")
        await tts.aclose()
        await all_closed(line.server)


@pytest.mark.usefixtures("clears_interrupted")
async def test_a_http_session_closed_during_a_clear_ends_the_pool_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P9: no new dial and no warning."""
    async with line_to(steady(clearing=Clearing.IGNORED)) as line:
        tts = line.tts()
        await interrupted(line, tts, SPEECH)
        await line.http.close()
        await all_closed(line.server)
        await tts.aclose()
        assert len(line.server.handshakes) == 1
    assert [event_of(r) for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
