"""A dead or dying socket never costs a reply.

Each fault comes in the second turn of a conversation, on a connection that the first one left idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from livekit.agents import APIConnectOptions

import xai_pool_patch
from tests.kit import ONCE, Heard, Line, all_closed, connections, line_to, quick, speak
from tests.live.never_worse import ANSWER_TIMEOUT, LIVEKITS_OWN, WARM, as_far_as_xai
from tests.live.peer import until
from xai_pool_patch.testing import Ending, FakeServer, Utterance

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
ROUND_TRIP = 0.02
SECONDS_PER_CHARACTER = 0.02
TEXT = "This is the second turn."
FOUR_MIB = '{"type":"news","filler":"' + "x" * 4 * 1024 * 1024 + '"}'
OLD_AUDIO = '{"type":"audio.delta","delta":"CQAJAAkACQAJAAkA"}'

pytestmark = pytest.mark.usefixtures("patched")


@dataclass
class Row:
    """What the table says of a fault. The retries are LiveKit's own, and so are the errors."""

    heard: str
    errors: int
    first_audio: float


def _rows() -> dict[str, Row]:
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    return {
        name.replace("`", ""): Row(heard, int(errors), float(first_audio.removesuffix(" s")))
        for name, heard, errors, first_audio in cells[1:]
    }


ROWS = _rows()


@dataclass
class Fault:
    """What happens to the second turn."""

    inject: Callable[[Line], Awaitable[None]]
    replays: int = 1


def behaving(**faults: Any) -> Callable[[Line], Awaitable[None]]:
    """The server behaves so until it has dealt with the second turn's first text once."""

    async def inject(line: Line) -> None:
        behaviour = line.server.behaviour
        usual = {name: getattr(behaviour, name) for name in faults}
        for name, value in faults.items():
            setattr(behaviour, name, value)
        before = len(line.server.utterances)
        await line.server.wait_for(lambda s: len(s.utterances) > before)
        if "mute" not in faults:
            await line.server.wait_for(lambda s: is_done_to(s, s.utterances[before]))
        for name, value in usual.items():
            setattr(behaviour, name, value)

    return inject


def is_done_to(server: FakeServer, utterance: Utterance) -> bool:
    """The fault has been done, or cannot be any more."""
    connection = server.connections[utterance.connection - 1]
    return not connection.is_open or utterance.first_audio_at is not None


async def freeze(line: Line) -> None:
    line.server.freeze_all()


async def reset_in_flight(line: Line) -> None:
    line.server.reset_all()


async def close_in_flight(line: Line) -> None:
    await line.server.close_all()


async def error_in_flight(line: Line) -> None:
    await line.server.broadcast('{"type":"error","message":"Deadline expired"}')


async def stray_done_in_flight(line: Line) -> None:
    await line.server.broadcast('{"type":"audio.done","trace_id":"stray"}')


async def old_audio_in_flight(line: Line) -> None:
    await line.server.broadcast(OLD_AUDIO)


FAULTS = {
    "Close as the turn begins": Fault(close_in_flight),
    "reset as the turn begins": Fault(reset_in_flight),
    "error frame as the turn begins": Fault(error_in_flight),
    "old audio as the turn begins": Fault(old_audio_in_flight),
    "stray audio.done as the turn begins": Fault(stray_done_in_flight, replays=0),
    "half-open as the turn begins": Fault(freeze),
    "error frame as the first answer": Fault(behaving(error_on_text="Deadline expired")),
    "Close instead of the first audio": Fault(behaving(end_before_audio=Ending.CLOSE)),
    "reset instead of the first audio": Fault(behaving(end_before_audio=Ending.RESET)),
    "malformed JSON": Fault(behaving(raw_before_audio=["{not json"])),
    "a frame of 4 MiB": Fault(behaving(raw_before_audio=[FOUR_MIB])),
    "PINGs are not answered any more": Fault(behaving(answer_pings=False)),
    "an unknown message type": Fault(behaving(raw_before_audio=['{"type":"news"}']), replays=0),
    "a binary frame": Fault(behaving(raw_before_audio=[b"\x00\x01"]), replays=0),
    "PINGs are answered, and nothing else": Fault(behaving(mute=True), replays=0),
    "half-open after the text arrived": Fault(behaving(end_before_audio=Ending.SILENT), replays=0),
    "Close after the first audio": Fault(behaving(end_after_audio=Ending.CLOSE), replays=0),
    "reset after the first audio": Fault(behaving(end_after_audio=Ending.RESET), replays=0),
    "half-open after the first audio": Fault(behaving(end_after_audio=Ending.SILENT), replays=0),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_of_a_reused_connection_costs_what_the_table_says(name: str) -> None:
    """Before the first audio another connection speaks, or the framework's retry is heard."""
    fault, row = FAULTS[name], ROWS[name]
    async with as_far_as_xai(pace=20.0, speech_per_character=SECONDS_PER_CHARACTER) as line:
        tts = line.tts()
        await speak(tts, "This is the first turn.")
        await _until_round_trip_is_known()
        heard = await _second_turn(line, tts, fault, LIVEKITS_OWN)
        assert (len(line.errors), xai_pool_patch.stats()["replays"]) == (row.errors, fault.replays)
        assert heard.first_audio == pytest.approx(row.first_audio, abs=0.01)
        _check_samples(line, heard)
        is_whole = row.heard.startswith("all")
        assert (heard.error is None) == is_whole
        if is_whole:
            whole = len(TEXT.replace(" ", "")) * SECONDS_PER_CHARACTER
            # The framework may end a sentence with a hundredth of a second of silence.
            assert heard.seconds == pytest.approx(whole, abs=0.011)
            metric = line.metrics[-1]
            is_first_try = not (fault.replays or row.errors)
            assert (metric.connection_reused, metric.acquire_time == 0.0) == (is_first_try,) * 2
            line.server.network.unfreeze()
            await until(lambda: xai_pool_patch.stats()["idle"])
            after = await speak(tts, "And a third turn.")
            assert after.samples == {line.server.utterance_for("And a third turn.").number}
            assert after.first_audio is not None
            assert after.first_audio < WARM
        await tts.aclose()


def test_the_table_has_all_faults_and_no_other() -> None:
    assert ROWS.keys() == FAULTS.keys()


async def _second_turn(
    line: Line,
    tts: Any,
    fault: Fault,
    options: APIConnectOptions = ONCE,
) -> Heard:
    injecting = asyncio.create_task(_inject(line, fault))
    heard = await speak(tts, TEXT, options)
    await injecting
    return heard


async def _inject(line: Line, fault: Fault) -> None:
    while not xai_pool_patch.stats()["leased"]:
        await asyncio.sleep(0)
    await fault.inject(line)


async def _until_round_trip_is_known() -> None:
    """The PONG to a connection's first PING comes a round trip after its handshake."""
    [connection] = connections()
    await until(lambda: connection.round_trip is not None)


def _check_samples(line: Line, heard: Heard) -> None:
    wanted = "".join(TEXT.split())
    spoken = {u.number for u in line.server.utterances if wanted.startswith(u.text) and u.text}
    assert len(heard.samples) <= 1
    assert heard.samples <= spoken


async def test_text_written_during_a_redial_goes_to_the_replacement() -> None:
    """In order, nothing twice and nothing lost."""
    words = [f"word{number} " for number in range(30)]
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await _until_round_trip_is_known()
        line.server.freeze_all()
        async with tts.stream() as stream:
            for word in words:
                stream.push_text(word)
                await asyncio.sleep(0.01)
            stream.end_input()
            samples = {s async for event in stream for s in event.frame.data if s}
        spoken = line.server.utterances[-1]
        assert spoken.text == "".join("".join(words).split())
        assert samples == {spoken.number}
        assert line.errors == []
        line.server.network.unfreeze()
        await tts.aclose()


@pytest.mark.parametrize("status", [401, 429])
async def test_the_status_of_a_refused_redial_reaches_the_plugin(status: int) -> None:
    """As if it had dialled in the first place, with one more dial at most."""
    async with line_to(round_trip=ROUND_TRIP) as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.server.behaviour.refuse = status
        heard = await _second_turn(line, tts, Fault(reset_in_flight))
        assert getattr(heard.error, "status_code", None) == status
        assert [type(event.error).__name__ for event in line.errors] == ["APIStatusError"]
        assert len(line.server.handshakes) <= 3
        await tts.aclose()


async def test_a_connection_that_fails_takes_those_of_its_age_along() -> None:
    """A server that restarted ended all of them; each would cost another turn a replay."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await asyncio.gather(*(speak(tts, f"Stream {n}.") for n in range(3)))
        assert xai_pool_patch.stats()["idle"] == 3
        inject = behaving(end_before_audio=Ending.CLOSE)
        heard = await _second_turn(line, tts, Fault(inject))
        assert heard.error is None
        assert [c.is_open for c in line.server.connections[:3]] == [False] * 3
        await tts.aclose()


async def test_an_error_frame_takes_no_other_connection_along() -> None:
    """It may be the text's, and the others are as good as before."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await asyncio.gather(*(speak(tts, f"Stream {n}.") for n in range(3)))
        heard = await _second_turn(line, tts, Fault(behaving(error_on_text="no such word")))
        assert heard.error is None
        assert sum(c.is_open for c in line.server.connections[:3]) == 2
        await tts.aclose()


async def test_a_failure_of_a_fresh_connection_reaches_the_plugin() -> None:
    """L3: there is no replay of an utterance whose connection was dialled for it."""
    async with line_to(quick(end_before_audio=Ending.CLOSE)) as line:
        tts = line.tts()
        heard = await speak(tts, "First.")
        assert len(line.errors) == 1
        assert heard.error is not None
        assert len(line.server.utterances) == 1
        await tts.aclose()


async def test_a_failure_of_the_replacement_reaches_the_plugin() -> None:
    """L3: one replay an utterance, since the server may be down."""
    async with line_to(quick()) as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.server.behaviour.end_before_audio = Ending.CLOSE
        await speak(tts, "Second.")
        assert len(line.errors) == 1
        assert len(line.server.utterances) == 3
        await tts.aclose()


async def test_a_dead_session_is_an_error_and_its_retry_is_heard() -> None:
    """L4b: its socket still answers PINGs, but nothing else will ever come."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await _until_round_trip_is_known()
        line.server.behaviour.mute = True
        began = asyncio.get_running_loop().time()
        turn = asyncio.create_task(speak(tts, TEXT, APIConnectOptions(timeout=2.0)))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        line.server.behaviour.mute = False
        heard = await turn
        assert heard.samples == {line.server.utterances[-1].number}
        assert [type(event.error).__name__ for event in line.errors] == ["APITimeoutError"]
        took = asyncio.get_running_loop().time() - began
        assert ANSWER_TIMEOUT < took < ANSWER_TIMEOUT + 1.0
        await tts.aclose()


async def test_the_replacement_speaks_though_the_pong_comes_after_the_probe() -> None:
    """L4: the dial that the missing PONG began serves the turn, however late it ends."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts, behaviour = line.tts(), line.server.behaviour
        await speak(tts, "First.")
        await _until_round_trip_is_known()
        behaviour.mute, behaviour.answer_pings, behaviour.handshake_delay = True, False, 0.6
        turn = asyncio.create_task(speak(tts, TEXT))
        await line.server.wait_for(lambda s: len(s.handshakes) == 2)
        assert not turn.done()
        await line.server.broadcast('{"type":"news"}')
        behaviour.mute, behaviour.answer_pings = False, True
        heard = await asyncio.wait_for(turn, 5.0)
        assert heard.samples == {line.server.utterances[-1].number}
        assert line.errors == []
        await tts.aclose()


async def test_an_utterance_is_spoken_to_its_end_after_uninstall() -> None:
    """A1, L3: over another connection if need be."""
    async with line_to(quick(generation=0.1), ROUND_TRIP) as line:
        tts = line.tts()
        await speak(tts, "First.")
        turn = asyncio.create_task(speak(tts, TEXT))
        await line.server.wait_for(lambda s: len(s.utterances) == 2)
        xai_pool_patch.uninstall()
        await asyncio.sleep(0)  # the pools end in the next turn of their loop
        line.server.reset_all()
        heard = await turn
        assert heard.samples == {line.server.utterances[-1].number}
        assert (len(line.server.utterances), line.errors) == (3, [])
        await tts.aclose()
        await all_closed(line.server)


async def test_a_redial_of_an_interrupted_turn_serves_the_next(no_tasks_left: None) -> None:
    """Nothing is left behind."""
    async with line_to(quick(), ROUND_TRIP) as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.server.reset_all()
        turn = asyncio.create_task(speak(tts, "Never heard."))
        await line.server.wait_for(lambda s: s.network.accepted == 2)
        turn.cancel()
        await asyncio.wait([turn])
        heard = await speak(tts, "Heard.")
        assert heard.samples == {line.server.utterance_for("Heard.").number}
        await tts.aclose()
        await all_closed(line.server)
