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
        (up(CLEAR), Stage.DIRTY),
        (up(TEXT, CLEAR), Stage.CLEARING),
        ([*up(TEXT, CLEAR), *down(AUDIO, AUDIO)], Stage.CLEARING),
        ([*up(TEXT, DONE, CLEAR), *down(AUDIO, AUDIO_DONE)], Stage.CLEARING),
        (up(TEXT, CLEAR) + down(NEWS), Stage.CLEARING),
    ],
)
def test_only_a_finished_round_leaves_the_connection_clean(steps: list[Step], stage: Stage) -> None:
    """Finished by both sides. Each unfinished one has its own stage."""
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
@pytest.mark.parametrize(
    "under_way",
    [[], [AUDIO], [AUDIO, AUDIO_DONE], [AUDIO_DONE], [AUDIO_DONE, AUDIO], [AUDIO_DONE, AUDIO_DONE]],
)
def test_an_acknowledged_clear_leaves_the_connection_clean(
    steps: list[Step], under_way: list[object]
) -> None:
    """Whatever was under way, even an `audio.done` that crosses the clear; and a second one too."""
    cleared = [*steps, *up(CLEAR), *down(*under_way, CLEARED)]
    assert after(cleared).stage is Stage.CLEAN
    assert after(cleared + cleared + ROUND).stage is Stage.CLEAN
    assert after(cleared[:-1]).stage is not Stage.CLEAN


def test_was_cleared_stays_set() -> None:
    """Only the server's word says that nothing more comes, for as long as the connection lives."""
    assert not after(ROUND).was_cleared
    assert after(up(TEXT, CLEAR)).was_cleared
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
        [*up(TEXT, CLEAR), *down(ERROR, CLEARED)],
        [*up(TEXT, CLEAR), *down("not json", CLEARED)],
        [*up(TEXT, CLEAR), *down(CLEARED, AUDIO)],
        [*up(TEXT, CLEAR), *down(CLEARED, AUDIO_DONE)],
        up(TEXT, CLEAR, TEXT) + down(CLEARED),
        up(TEXT, CLEAR, DONE) + down(CLEARED),
        up(TEXT, CLEAR, CLEAR) + down(CLEARED, CLEARED),
    ],
)
def test_any_other_answer_to_a_clear_leaves_the_connection_dirty(steps: list[Step]) -> None:
    """One clear at a time, nothing sent meanwhile, and no message that it does not explain."""
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
        [*up(WORDLESS), *down(AUDIO_DONE)],
        [*up(WORDLESS, DONE), *down(ERROR, AUDIO_DONE)],
        [*up(TEXT, DONE), *down(ERROR, AUDIO_DONE)],
        [*up(TEXT, DONE), *down(b"\x00", AUDIO_DONE)],
        [*up(TEXT, DONE, TEXT), *down(AUDIO_DONE)],
        [*up(TEXT, DONE, DONE), *down(AUDIO_DONE)],
        [*up(b"\x00"), *ROUND],
    ],
)
def test_anything_but_one_utterance_after_another_leaves_the_connection_dirty(
    steps: list[Step],
) -> None:
    """No other utterance may use such a connection."""
    assert after(steps).stage is Stage.DIRTY


@pytest.mark.parametrize("steps", [[], ROUND])
def test_audio_without_an_utterance_is_not_heard(steps: list[Step]) -> None:
    """It belongs to an earlier utterance, or to none."""
    assert after(steps).received(type_of(AUDIO)) is False


@pytest.mark.parametrize("steps", [up(TEXT), up(TEXT, DONE), up(TEXT) + down(ERROR)])
def test_audio_of_the_utterance_is_heard(steps: list[Step]) -> None:
    """Also after an error frame, as it would be without the patch."""
    assert after(steps).received(type_of(AUDIO)) is True


@pytest.mark.parametrize(
    "steps",
    [
        [*up(WORDLESS, DONE), *down(AUDIO_DONE)],
        [*up(WORDLESS, WORDLESS, DONE), *down(AUDIO, AUDIO_DONE)],
        [*up(DONE), *down(AUDIO_DONE)],
        [*up(DONE), *down(AUDIO, AUDIO, AUDIO_DONE)],
        [*up(TEXT, DONE), *down(AUDIO_DONE)],
        [*ROUND, *up(WORDLESS, TEXT, DONE), *down(AUDIO_DONE)],
        [*up(TEXT, CLEAR), *down(CLEARED), *up(DONE), *down(AUDIO, AUDIO_DONE)],
    ],
)
def test_an_utterance_may_end_with_or_without_audio(steps: list[Step]) -> None:
    """L4c: the protocol does not say which texts have none."""
    tracker = UtteranceTracker()
    for where, frame in steps:
        if where == "up":
            tracker.sent(frame)
        else:
            assert tracker.received(type_of(frame))
    assert tracker.stage is Stage.CLEAN


@pytest.mark.parametrize("before", [[], up(TEXT), up(TEXT, DONE), ROUND])
def test_a_session_update_is_no_part_of_an_utterance(before: list[Step]) -> None:
    """It leaves the stage as it is, and its connection to whoever sent it."""
    update = up(json.dumps({"type": "session.update", "replace": {}}))
    assert not after(before).was_configured
    assert after(before + update).stage is after(before).stage
    assert after(before + update).was_configured
    assert after(before + update).is_unused == after(before).is_unused


@pytest.mark.parametrize(
    ("steps", "is_unused", "is_first"),
    [
        ([], True, False),
        (up(TEXT), False, True),
        (up(TEXT, DONE) + down(AUDIO), False, True),
        (ROUND, False, True),
        (ROUND + up(TEXT), False, False),
        (ROUND + up(DONE), False, False),
    ],
)
def test_the_first_utterance_of_a_connection(
    steps: list[Step], is_unused: bool, is_first: bool
) -> None:
    """Whatever comes during it is of no other."""
    tracker = after(steps)
    assert (tracker.is_unused, tracker.is_first) == (is_unused, is_first)


def test_repr_shows_the_stage() -> None:
    """A failing test shows where the utterance was."""
    assert repr(after(up(TEXT))) == "<UtteranceTracker asked>"
