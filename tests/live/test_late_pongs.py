"""What may come before the PONG on a connection that is used again, and PONGs that come late.

A late PONG is that of a server whose PINGs wait behind its work. Nothing that may be somebody's
words is dropped, and no connection is given up for what its text gets for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from livekit.agents.tts import FallbackAdapter

from tests.kit import (
    HAS_NATIVE_POOL,
    ONCE,
    Line,
    hear_whole,
    line_to,
    quick,
    round_trips_are_known,
    speak,
)
from tests.live.never_worse import (
    COLD,
    EITHER,
    GENERATION,
    LIVEKITS_OWN,
    ROUND_TRIP,
    WARM,
    as_far_as_xai,
    check_whole,
    dials_unpatched,
    faults,
    installed,
    timed,
)
from tests.live.peer import until

LIKE_SPEECH = {"pace": 5.0, "speech_per_character": 0.06}
SENTENCE = "This sentence is about four seconds long, and none of it may be lost"
FEW = 3
"""Dials, or texts sent twice, that may be needed to learn what a server's PONGs say."""
STALE_TURN = 0.5
"""Seconds that the turn may wait that finds old audio on its connection."""


def texts(turns: int) -> list[str]:
    return [f"{SENTENCE}, {number}." for number in range(turns)]


def dials_at_most(turns: int, is_patched: bool) -> int:
    return 1 + FEW if is_patched else dials_unpatched(turns)


@EITHER
async def test_pongs_that_become_late_cut_no_turn(
    is_patched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompt at first, then behind the first audio: every sample of every turn is heard."""
    with installed(is_patched):
        async with as_far_as_xai(**LIKE_SPEECH) as line:
            tts = line.tts()
            for number, text in enumerate(texts(10)):
                line.server.behaviour.pong_delay = 0.0 if number < 3 else 0.32 + 0.02 * number
                heard = await hear_whole(line, tts, text)
                assert heard.first_audio is not None
                assert heard.first_audio < COLD + STALE_TURN
            assert len(line.server.connections) <= dials_at_most(10, is_patched)
            assert len(line.server.utterances) <= 10 + (FEW if is_patched else 0)
            await tts.aclose()
    assert faults(caplog) == []


@EITHER
@pytest.mark.parametrize("seed", [1, 2])
async def test_pongs_that_are_late_at_random_cut_no_turn(seed: int, is_patched: bool) -> None:
    """Up to 0.6 s, so that half of them come after the first audio; not the first of them."""
    chance = random.Random(seed)
    with installed(is_patched):
        async with as_far_as_xai(**LIKE_SPEECH) as line:
            tts = line.tts()
            for number, text in enumerate(texts(60)):
                line.server.behaviour.pong_delay = chance.uniform(0.0, 0.6) if number else 0.0
                await hear_whole(line, tts, text)
            assert len(line.server.connections) <= dials_at_most(60, is_patched)
            assert len(line.server.utterances) <= 60 + (FEW if is_patched else 0)
            await tts.aclose()


@EITHER
@pytest.mark.parametrize("generation", [GENERATION, 1.7])
@pytest.mark.parametrize("known", [True, False], ids=["prompt at first", "late from the start"])
async def test_a_busy_server_is_waited_for(
    known: bool, generation: float, is_patched: bool
) -> None:
    """Its PONG is later than anything that a probe waits for; it is alive, and speaks each text."""
    with installed(is_patched):
        async with as_far_as_xai(pong_delay=0.0 if known else 2.5) as line:
            tts = line.tts()
            await hear_whole(line, tts, "Before it is busy.")
            await asyncio.sleep(5.0)  # any PONG is here
            line.server.behaviour.pong_delay = 2.5
            line.server.behaviour.generation = generation
            waits = []
            for number in range(30):
                heard = await hear_whole(line, tts, f"Turn {number}.")
                waits.append(heard.first_audio or 0.0)
            assert len(line.server.connections) <= dials_at_most(31, is_patched)
            assert len(line.server.utterances) <= 31 + (FEW if is_patched else 0)
            # As soon as unpatched, once the pool has learnt how late a PONG of this host may be.
            last = WARM if HAS_NATIVE_POOL or is_patched else COLD
            assert max(waits[15:]) < last - GENERATION + generation
            await tts.aclose()


@pytest.mark.parametrize("delay", [0.1, 0.15])
async def test_one_old_piece_before_the_pong_costs_a_moment(delay: float) -> None:
    """It is not heard, and nothing of the turn is lost; the next turns find their connection."""
    with installed():
        async with as_far_as_xai() as line:
            tts = line.tts()
            await hear_whole(line, tts, "Before.")
            await until(round_trips_are_known)
            line.server.behaviour.late_audio = delay
            await hear_whole(line, tts, "The one with more to come.")
            line.server.behaviour.late_audio = None
            heard = await hear_whole(line, tts, "The one that must not have it.")
            assert heard.first_audio is not None
            assert heard.first_audio < delay + WARM + STALE_TURN
            for number in range(3):
                heard = await hear_whole(line, tts, f"After {number}.")
                assert heard.first_audio is not None
                assert heard.first_audio < WARM
            assert len(line.server.connections) <= 2
            assert line.errors == []
            await tts.aclose()


# An audio.done and nothing else: the credits are gone, or the text has nothing to be spoken.

PONG_DELAYS = [0.0, 0.2, 0.5]
IDLE = 3
AT_ONCE = 0.05
"""Seconds in which the server says that it has nothing to say."""


async def warm_up(line: Line, tts: Any) -> None:
    """So many connections are idle where they are kept."""
    await asyncio.gather(*(speak(tts, f"Before {number}.") for number in range(IDLE)))
    await asyncio.sleep(0.5)


def run_out_of_credits(line: Line, pong_delay: float) -> None:
    line.server.behaviour.speech_per_character = 0.0
    line.server.behaviour.generation = AT_ONCE
    line.server.behaviour.pong_delay = pong_delay


@EITHER
@pytest.mark.parametrize("pong_delay", PONG_DELAYS)
@pytest.mark.parametrize("options", [ONCE, LIVEKITS_OWN], ids=["once", "retrying"])
async def test_an_answer_without_audio_is_an_answer(
    options: Any, pong_delay: float, is_patched: bool
) -> None:
    """The text is sent as often as unpatched, and the error comes as soon; no idle connection has
    to go for it."""
    with installed(is_patched):
        async with as_far_as_xai() as line:
            tts = line.tts()
            await warm_up(line, tts)
            dials, sent = len(line.server.connections), len(line.server.utterances)
            still_open = line.server.open_count
            run_out_of_credits(line, pong_delay)
            heard, took = await timed(tts, "[long-pause]", options)
            attempts = options.max_retry + 1
            assert heard.error is not None
            assert heard.seconds == 0.0
            assert len(line.server.utterances) - sent == attempts
            assert took < UNTIL_ERROR[options.max_retry] + attempts * pong_delay
            dials_unpatched_now = 0 if HAS_NATIVE_POOL else attempts
            assert len(line.server.connections) - dials <= dials_unpatched_now
            if options is ONCE and is_patched:  # LiveKit's retries take longer than a spare stays
                assert line.server.open_count >= still_open - 1
            await tts.aclose()


ATTEMPT = WARM if HAS_NATIVE_POOL else COLD + ROUND_TRIP
"""Seconds; on plugins without a pool each dials, and waits for the answer to its Close."""
UNTIL_ERROR = {0: ATTEMPT, 3: 0.1 + 2 * 2.0 + 4 * ATTEMPT}
"""Seconds from the text to the error, by the retries of LiveKit, which waits 0.1 s before the first
and 2 s before each other."""


@contextlib.asynccontextmanager
async def with_fallback() -> AsyncIterator[tuple[Line, Line, Any]]:
    """Two lines, and an adapter that speaks on the second when the first fails."""
    async with as_far_as_xai() as line, line_to(quick(api_key="other")) as other:
        ttss = [line.tts(), other.tts(api_key="other")]
        adapter: Any = FallbackAdapter(ttss)
        try:
            yield line, other, adapter
        finally:
            await adapter.aclose()
            for tts in ttss:
                await tts.aclose()


@EITHER
@pytest.mark.parametrize("pong_delay", PONG_DELAYS)
async def test_the_next_tts_of_a_fallback_adapter_speaks_as_soon_as_unpatched(
    pong_delay: float, is_patched: bool
) -> None:
    with installed(is_patched):
        async with with_fallback() as (line, other, adapter):
            await speak(adapter, "Before.")
            await asyncio.sleep(0.5)
            run_out_of_credits(line, pong_delay)
            sent = len(line.server.utterances)
            heard, took = await timed(adapter, "Said by the other.", ONCE)
            check_whole(other, "Said by the other.", heard)
            assert took < UNTIL_SWITCH + 3 * pong_delay
            said = [utterance.text for utterance in line.server.utterances[sent:]]
            assert said.count("Saidbytheother.") <= SENT_UNTIL_SWITCH


UNTIL_SWITCH = 0.1 + 2.0 + 3 * ATTEMPT + 0.5
SENT_UNTIL_SWITCH = 3
"""As often as the adapter tries one TTS."""


# An audio.done that belongs to nothing.

STRAY = '{"type":"audio.done","trace_id":"stray"}'


async def ahead_of_the_pong(line: Line, turn: Callable[[], Any]) -> Any:
    """On its way when the turn begins."""
    await line.server.broadcast(STRAY)
    await asyncio.sleep(ROUND_TRIP / 4)
    return await turn()


async def behind_the_pong(line: Line, turn: Callable[[], Any]) -> Any:
    """Just ahead of the first audio."""
    line.server.behaviour.raw_before_audio = [STRAY]
    speech = asyncio.ensure_future(turn())
    sent = len(line.server.utterances)
    await line.server.wait_for(lambda s: s.utterances[sent:])
    await asyncio.sleep(GENERATION + 0.01)
    line.server.behaviour.raw_before_audio = []
    return await speech


@pytest.mark.parametrize("pong_delay", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("send_stray", [ahead_of_the_pong, behind_the_pong])
async def test_a_stray_done_costs_no_turn_its_audio(
    send_stray: Callable[[Line, Callable[[], Any]], Any], pong_delay: float
) -> None:
    """With LiveKit's retries that turn is heard, whole and alone, and so are the next."""
    with installed():
        async with as_far_as_xai() as line:
            tts = line.tts()
            for number in range(2):
                await hear_whole(line, tts, f"Before {number}.")
            await asyncio.sleep(0.5)
            line.server.behaviour.pong_delay = pong_delay
            text = "The one with a stray answer."
            heard = await send_stray(line, lambda: speak(tts, text, LIVEKITS_OWN))
            check_whole(line, text, heard)
            for number in range(3):
                await hear_whole(line, tts, f"After {number}.")
            assert len(line.server.connections) <= 1 + FEW
            await tts.aclose()
