"""The questions that are asked by default, of servers of each temperament."""

from __future__ import annotations

from typing import Any

import pytest

from tests.probe.kit import HASTY, SHORT, ask, serving, serving_both
from xai_pool_patch.probe.question import Answer, Verdict
from xai_pool_patch.probe.quick import QUICK
from xai_pool_patch.probe.service import Timing
from xai_pool_patch.testing import Clearing, End, Ending, Wordless

pytestmark = pytest.mark.asyncio

QUESTIONS = {question.name: question for question in QUICK}
SO, OTHERWISE, UNKNOWN = Verdict.AS_SUPPOSED, Verdict.OTHERWISE, Verdict.UNKNOWN
NEAR, FAR = 0.0, 0.02
"""Seconds of a round trip."""


async def answer_of(name: str, timing: Timing = SHORT, **behaviour: Any) -> Answer:
    return await ask(QUESTIONS[name], timing, **behaviour)


@pytest.mark.parametrize("name", QUESTIONS)
async def test_a_server_as_documented(name: str) -> None:
    """It is as supposed, and costs as many characters as were announced."""
    async with serving_both(round_trip=FAR) as (service, server):
        answer = await QUESTIONS[name].ask(service)
        assert answer.verdict is SO, answer
        assert service.characters == QUESTIONS[name].characters
        spoken = sum(len(utterance.text) for utterance in server.utterances)
        assert spoken == service.characters
    assert {connection.ended for connection in server.connections} <= {End.CLIENT_CLOSE}


TEMPERAMENTS = [
    # Answers no PINGs.
    ("PING", HASTY, {"answer_pings": False}, OTHERWISE, "no PONG", {}),
    ("fence", HASTY, {"answer_pings": False}, UNKNOWN, "without PONG",
     {"interruption": "discard"}),
    ("handshake", HASTY, {"answer_pings": False, "round_trip": FAR}, SO, "round trip", {}),
    # Has an edge in front that answers them.
    ("PING", SHORT, {"edge_distance": 0.2}, SO, "PONG after", {}),
    ("fence", SHORT, {"edge_distance": 0.2}, SO, "the PONG came first", {}),
    # Answers them late.
    ("fence", SHORT, {"pong_delay": 0.5}, OTHERWISE, "3 of 3", {"interruption": "discard"}),
    # Ignores the cancel, refuses it, is late, breaks its word.
    ("clear, speaking", HASTY, {"clearing": Clearing.IGNORED}, OTHERWISE, "no answer",
     {"interruption": "discard"}),
    ("clear, speaking", SHORT, {"clearing": Clearing.REFUSED}, OTHERWISE, "unknown message type",
     {"interruption": "discard"}),
    ("clear, speaking", SHORT, {"clearing": Clearing.LATE, "clear_delay": 1.2}, OTHERWISE,
     "acknowledged after 1,2", {"interruption": "discard"}),
    ("clear, speaking", SHORT, {"clearing": Clearing.LEAKING, "clear_delay": 0.05}, OTHERWISE,
     "1 piece of audio afterwards", {"interruption": "discard"}),
    ("clear, speaking", SHORT, {"clearing": Clearing.CROSSED}, SO, "no audio afterwards",
     {"interruption": "clear"}),
    # Has other answers to what has no words.
    ("no words", SHORT, {"wordless": Wordless.SILENCE}, SO, "blank: 0.1 s of audio", {}),
    ("no words", SHORT, {"wordless": Wordless.REFUSED}, SO, "dots: error", {}),
    ("no words", HASTY, {"mute": True}, OTHERWISE, "empty: no answer", {}),
    # Breaks off.
    ("after audio.done", SHORT, {"late_audio": 0.02}, OTHERWISE, "audio.delta came", {}),
    ("second utterance", SHORT, {"end_before_audio": Ending.CLOSE}, UNKNOWN,
     "ended with a Close frame 1000", {}),
    ("first audio", SHORT, {"end_before_audio": Ending.RESET}, UNKNOWN, "without a Close frame",
     {}),
    ("gap in a text", SHORT, {"error_on_text": "timed out"}, OTHERWISE,
     "within the gap of 0.1 s: error: timed out", {}),
    ("clear, speaking", HASTY, {"mute": True}, UNKNOWN, "no audio to cancel", {}),
    ("unknown message", HASTY, {"mute": True}, OTHERWISE, "ignored", {}),
    # Refuses otherwise.
    ("bad voice", HASTY, {"voices": None}, OTHERWISE, "accepted", {}),
    ("bad key", SHORT, {"refuse": 503}, OTHERWISE, "HTTP 503", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "timing", "behaviour", "verdict", "found", "advises"),
    TEMPERAMENTS,
    ids=[f"{name}-{next(iter(behaviour))}" for name, _, behaviour, *_ in TEMPERAMENTS],
)
async def test_a_server_of_a_temperament(
    name: str,
    timing: Timing,
    behaviour: dict[str, Any],
    verdict: Verdict,
    found: str,
    advises: dict[str, Any],
) -> None:
    """The answer says what is so, and which options to take."""
    answer = await answer_of(name, timing, **behaviour)
    assert answer.verdict is verdict, answer
    assert found in answer.found
    assert answer.advises == advises


async def test_the_cancel_that_works() -> None:
    """Is advised."""
    assert (await answer_of("clear, speaking")).advises == {"interruption": "clear"}


async def test_the_parts_of_a_handshake() -> None:
    """Each takes its round trips."""
    async with serving(round_trip=0.1) as service, service.open() as socket:
        took = socket.handshake
    assert took.dns is not None
    assert took.connect is not None
    assert took.connect >= 0.2  # TCP and TLS
    assert took.upgrade >= 0.1
    assert took.total >= took.dns + took.connect + took.upgrade - 1e-6
