"""Which conversations leave a connection clean, frame by frame."""

from __future__ import annotations

import json

import pytest

from xai_pool_patch.protocol.utterance import Stage, UtteranceTracker, type_of

TEXT, DONE = '{"type":"text.delta","delta":"Hello"}', '{"type":"text.done"}'
AUDIO, AUDIO_DONE = '{"type":"audio.delta","delta":"AAAA"}', '{"type":"audio.done","trace_id":"t"}'
WORDLESS = json.dumps({"type": "text.delta", "delta": " … \n"})
CLEAR, CLEARED = '{"type":"text.clear"}', '{"type":"audio.clear"}'
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
        (up(CLEAR), Stage.VERIFYING),
        (up(TEXT, CLEAR), Stage.CLEARING),
        ([*up(TEXT, CLEAR), *down(AUDIO, AUDIO)], Stage.CLEARING),
        ([*up(TEXT, DONE, CLEAR), *down(AUDIO, AUDIO_DONE)], Stage.VERIFYING),
        (up(TEXT, CLEAR) + down(NEWS), Stage.CLEARING),
    ],
)
def test_whole_and_unfinished_rounds(steps: list[Step], stage: Stage) -> None:
    """Only a round that was finished on both sides leaves the connection clean."""
    assert after(steps).stage is stage


OWING = [
    up(TEXT),
    up(TEXT) + down(AUDIO),
    up(TEXT, DONE),
    [*up(TEXT), *down(AUDIO), *up(DONE)],
    up(DONE),
]
"""One conversation for each stage in which something is owed."""


@pytest.mark.parametrize("steps", OWING)
@pytest.mark.parametrize("under_way", [[], [AUDIO], [AUDIO, AUDIO_DONE], [AUDIO_DONE]])
def test_a_clear_that_is_acknowledged_leaves_it_clean(
    steps: list[Step], under_way: list[object]
) -> None:
    """Whatever was under way, an `audio.done` that crosses it included; and so does the next."""
    cleared = [*steps, *up(CLEAR), *down(*under_way, CLEARED)]
    assert after(cleared).stage is Stage.CLEAN
    assert after(cleared + cleared + ROUND).stage is Stage.CLEAN
    assert after(cleared[:-1]).stage is not Stage.CLEAN


def test_whose_word_is_all_there_is() -> None:
    """After a clear of an utterance, but not after one that only proved a connection alive."""
    assert not after(ROUND + up(CLEAR) + down(CLEARED)).was_cleared
    assert after(up(TEXT, CLEAR) + down(CLEARED) + ROUND).was_cleared


@pytest.mark.parametrize(
    "steps",
    [
        down(CLEARED),
        up(TEXT) + down(CLEARED),
        up(TEXT, DONE) + down(CLEARED),
        [*up(CLEAR), *down(AUDIO, CLEARED)],
        [*up(CLEAR), *down(AUDIO_DONE, CLEARED)],
        [*up(CLEAR), *down(ERROR, CLEARED)],
        up(CLEAR, CLEAR) + down(CLEARED, CLEARED),
        up(CLEAR, TEXT) + down(CLEARED),
        [*up(CLEAR), *down(CLEARED, CLEARED)],
        [*up(TEXT, CLEAR), *down(AUDIO_DONE, AUDIO, CLEARED)],
        [*up(TEXT, CLEAR), *down(AUDIO_DONE, AUDIO_DONE, CLEARED)],
        [*up(TEXT, CLEAR), *down(ERROR, CLEARED)],
        [*up(TEXT, CLEAR), *down("not json", CLEARED)],
        [*up(TEXT, CLEAR), *down(CLEARED, AUDIO)],
        [*up(TEXT, CLEAR), *down(CLEARED, AUDIO_DONE)],
        up(TEXT, CLEAR, TEXT) + down(CLEARED),
        up(TEXT, CLEAR, DONE) + down(CLEARED),
        up(TEXT, CLEAR, CLEAR) + down(CLEARED, CLEARED),
    ],
)
def test_a_clear_that_goes_otherwise_spoils_the_connection(steps: list[Step]) -> None:
    """One at a time, nothing sent meanwhile, and nothing that the answer does not account for."""
    assert after(steps).stage is Stage.DIRTY


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
        [*ROUND, *up(WORDLESS, TEXT, DONE), *down(AUDIO_DONE)],
        [*up(WORDLESS), *down(AUDIO_DONE)],
        [*up(WORDLESS, DONE), *down(ERROR, AUDIO_DONE)],
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
    assert after(steps).stage is Stage.DIRTY


@pytest.mark.parametrize("steps", [[], ROUND])
def test_audio_that_nobody_asked_for_must_not_be_heard(steps: list[Step]) -> None:
    """It belongs to an utterance that was cut off, or to nobody."""
    assert after(steps).received(type_of(AUDIO)) is False


@pytest.mark.parametrize("steps", [up(TEXT), up(TEXT, DONE), up(TEXT) + down(ERROR)])
def test_audio_that_was_asked_for_may_be_heard(steps: list[Step]) -> None:
    """Also after an error frame, as it would be without the patch."""
    assert after(steps).received(type_of(AUDIO)) is True


@pytest.mark.parametrize(
    "steps",
    [
        [*up(WORDLESS, DONE), *down(AUDIO_DONE)],
        [*up(WORDLESS, WORDLESS, DONE), *down(AUDIO, AUDIO_DONE)],
        [*up(DONE), *down(AUDIO_DONE)],
        [*up(DONE), *down(AUDIO, AUDIO, AUDIO_DONE)],
    ],
)
def test_an_utterance_without_words_may_be_answered_by_silence(steps: list[Step]) -> None:
    """Nobody has said whether by audio that is silent or by none at all."""
    tracker = UtteranceTracker()
    for where, frame in steps:
        if where == "up":
            tracker.sent(frame)
        else:
            assert tracker.received(type_of(frame))
    assert tracker.stage is Stage.CLEAN


def test_an_end_without_audio_is_believed_when_it_is_known_whose_it_is() -> None:
    """Old messages have been told apart from new ones by a PONG."""
    tracker = after(up(TEXT, DONE))
    tracker.is_unambiguous = True
    assert tracker.received("audio.done")
    assert tracker.stage is Stage.CLEAN
    tracker = after(ROUND + up(TEXT, DONE))
    assert not tracker.is_unambiguous


def test_silence_after_a_clear_is_heard_only_when_it_is_known_whose_it_is() -> None:
    """It may be what was cleared."""
    cleared = [*up(TEXT, CLEAR), *down(CLEARED), *up(DONE)]
    assert after(cleared).received(type_of(AUDIO)) is False
    tracker = after(cleared)
    tracker.is_unambiguous = True
    assert tracker.received(type_of(AUDIO)) is True


def test_repr() -> None:
    """The stage is what there is to know."""
    assert repr(after(up(TEXT))) == "<UtteranceTracker asked>"
