"""Which conversations leave a connection clean, frame by frame."""

from __future__ import annotations

import json

import pytest

from xai_pool_patch.utterance import Stage, UtteranceTracker, type_of

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'
AUDIO, AUDIO_DONE = '{"type":"audio.delta","delta":"AAAA"}', '{"type":"audio.done","trace_id":"t"}'
ERROR, NEWS = '{"type":"error","message":"no"}', '{"type":"session.updated"}'

Step = tuple[str, object]


def up(*frames: object) -> list[Step]:
    return [("up", frame) for frame in frames]


def down(*frames: object) -> list[Step]:
    return [("down", frame) for frame in frames]


def after(steps: list[Step]) -> UtteranceTracker:
    tracker = UtteranceTracker()
    for direction, frame in steps:
        if direction == "up":
            tracker.sent(frame)
        else:
            tracker.received(type_of(frame))
    return tracker


ROUND = [*up(TEXT, TEXT), *down(AUDIO), *up(DONE), *down(AUDIO, AUDIO_DONE)]


@pytest.mark.parametrize(
    ("steps", "stage"),
    [
        ([], Stage.CLEAN),
        (up(TEXT), Stage.ASKED),
        (up(TEXT) + down(AUDIO), Stage.SPEAKING),
        (up(TEXT, DONE), Stage.AWAITING),
        (up(DONE), Stage.EMPTY),
        (ROUND, Stage.CLEAN),
        (ROUND + ROUND, Stage.CLEAN),
        ([*up(DONE), *down(AUDIO_DONE)], Stage.CLEAN),
        (ROUND + down(NEWS), Stage.CLEAN),
        (up(TEXT) + down(NEWS), Stage.ASKED),
        (ROUND[:-1], Stage.FINISHING),
    ],
)
def test_whole_and_unfinished_rounds(steps: list[Step], stage: Stage) -> None:
    """Only a round that was finished on both sides leaves the connection clean."""
    assert after(steps).stage is stage


@pytest.mark.parametrize(
    "steps",
    [
        down(AUDIO),
        down(AUDIO_DONE),
        down(ERROR),
        down("not json"),
        down("[" * 100_000),
        down('"audio.delta"'),
        down('{"no": "type"}'),
        down('{"type": 7}'),
        down(b"\x00\x01"),
        ROUND + down(AUDIO),
        ROUND + down(AUDIO_DONE),
        ROUND + down('{"type":"audio.clear"}'),
        [*up(TEXT), *down(AUDIO_DONE), *up(DONE), *down(AUDIO_DONE)],
        [*up(TEXT), *down(AUDIO, AUDIO_DONE), *up(DONE), *down(AUDIO_DONE)],
        [*up(TEXT, DONE), *down(AUDIO_DONE)],
        [*up(DONE), *down(AUDIO, AUDIO_DONE)],
        [*up(TEXT, DONE), *down(ERROR, AUDIO_DONE)],
        [*up(TEXT, DONE), *down(b"\x00", AUDIO_DONE)],
        [*up(TEXT, DONE, TEXT), *down(AUDIO_DONE)],
        [*up(TEXT, DONE, DONE), *down(AUDIO_DONE)],
        [*up(json.dumps({"type": "session.update", "replace": {}})), *ROUND],
        [*up(b"\x00"), *ROUND],
    ],
)
def test_whatever_else_happens_spoils_the_connection(steps: list[Step]) -> None:
    """What is not one utterance after another is never given to another utterance."""
    assert after(steps).stage is Stage.SPOILED


@pytest.mark.parametrize("steps", [[], ROUND])
def test_audio_that_nobody_asked_for_must_not_be_heard(steps: list[Step]) -> None:
    """It belongs to an utterance that was cut off, or to nobody."""
    assert after(steps).received(type_of(AUDIO)) is False


@pytest.mark.parametrize("steps", [up(TEXT), up(TEXT, DONE), up(TEXT) + down(ERROR)])
def test_audio_that_was_asked_for_may_be_heard(steps: list[Step]) -> None:
    """Also after an error frame, as it would be without the patch."""
    assert after(steps).received(type_of(AUDIO)) is True


def test_repr() -> None:
    """The stage is what there is to know."""
    assert repr(after(up(TEXT))) == "<UtteranceTracker asked>"
