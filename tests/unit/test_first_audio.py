"""How long the pool waits for the first audio of an utterance before it replays it."""

from __future__ import annotations

import asyncio

import pytest

from tests.virtual import in_virtual_time
from xai_pool_patch.protocol.first_audio import LIMIT, MARGIN, FirstAudio

TIMEOUT = 5.0


def first_audio(*took: float) -> FirstAudio:
    """After utterances whose first audio took so many seconds."""
    watch = FirstAudio(TIMEOUT)
    for seconds in took:
        watch.took(seconds)
    return watch


@pytest.mark.parametrize("took", [[], [0.3, 0.3], [TIMEOUT / MARGIN]])
def test_a_quick_server_has_first_audio_timeout(took: list[float]) -> None:
    """No less, however quick it is."""
    assert first_audio(*took).replay_after == TIMEOUT
    assert first_audio(*took).limit == LIMIT * TIMEOUT


def test_a_slow_answer_extends_the_time_before_a_replay() -> None:
    """To half as much again as the answer took."""
    assert first_audio(6.0).replay_after == pytest.approx(9.0)
    assert first_audio(0.3, 8.0, 6.0).replay_after == pytest.approx(9.0)


def test_an_answer_slower_than_the_limit_moves_the_limit() -> None:
    """No utterance is given up before it is replayed."""
    assert first_audio(9.0).limit == LIMIT * TIMEOUT
    assert first_audio(20.0).limit == first_audio(20.0).replay_after == pytest.approx(30.0)


def test_quick_answers_bring_the_time_before_a_replay_back() -> None:
    """Each of them halves it, down to first_audio_timeout."""
    assert first_audio(20.0, 0.3).replay_after == pytest.approx(15.0)
    assert first_audio(20.0, 0.3, 0.3).replay_after == pytest.approx(7.5)
    assert first_audio(20.0, 0.3, 0.3, 0.3).replay_after == TIMEOUT


@in_virtual_time
async def test_one_utterance_is_replayed_at_a_time() -> None:
    """Until its replay ends, whether or not that helped."""
    watch = first_audio()
    assert [watch.begin_replay() for _ in range(3)] == [True, False, False]
    await asyncio.sleep(10 * TIMEOUT)
    assert not watch.begin_replay()
    watch.end_replay(helped=False)
    assert [watch.begin_replay() for _ in range(3)] == [True, False, False]


@in_virtual_time
async def test_after_a_replay_that_helped_all_waiting_utterances_are_replayed() -> None:
    """For first_audio_timeout: the sessions are dead, and the server is not slow."""
    watch = first_audio()
    watch.begin_replay()
    watch.end_replay(helped=True)
    await asyncio.sleep(0.9 * TIMEOUT)
    assert [watch.begin_replay() for _ in range(3)] == [True, True, True]
    await asyncio.sleep(0.2 * TIMEOUT)
    assert not watch.begin_replay()
    watch.end_replay(helped=False)
    assert [watch.begin_replay() for _ in range(2)] == [True, False]
