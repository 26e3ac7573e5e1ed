"""How long a server may take to begin to speak. Real time does not pass."""

from __future__ import annotations

import asyncio

import pytest

from tests.virtual import in_virtual_time
from xai_pool_patch.protocol.first_audio import LIMIT, MARGIN, FirstAudio

TIMEOUT = 5.0


def first_audio(*took: float) -> FirstAudio:
    """After so many utterances, which took so long."""
    watch = FirstAudio(TIMEOUT)
    for seconds in took:
        watch.took(seconds)
    return watch


@pytest.mark.parametrize("took", [[], [0.3, 0.3], [TIMEOUT / MARGIN]])
def test_a_quick_server_has_the_time_that_the_options_say(took: list[float]) -> None:
    """No more, and no less however quick it is."""
    assert first_audio(*took).replay_after == TIMEOUT
    assert first_audio(*took).limit == LIMIT * TIMEOUT


def test_slowness_that_turned_out_good_teaches_patience() -> None:
    """The same once more, and half as much again, is waited for."""
    assert first_audio(6.0).replay_after == pytest.approx(9.0)
    assert first_audio(0.3, 8.0, 6.0).replay_after == pytest.approx(9.0)


def test_what_is_slower_than_the_limit_moves_it() -> None:
    """Nothing is given up sooner than it is sent again."""
    assert first_audio(9.0).limit == LIMIT * TIMEOUT
    assert first_audio(20.0).limit == first_audio(20.0).replay_after == pytest.approx(30.0)


def test_patience_is_forgotten_by_and_by() -> None:
    """Half of it with each utterance that is quick again."""
    assert first_audio(20.0, 0.3).replay_after == pytest.approx(15.0)
    assert first_audio(20.0, 0.3, 0.3).replay_after == pytest.approx(7.5)
    assert first_audio(20.0, 0.3, 0.3, 0.3).replay_after == TIMEOUT


@in_virtual_time
async def test_one_is_sent_again_at_a_time() -> None:
    """Until it is heard over the old connection, or has ended."""
    watch = first_audio()
    assert [watch.begin_replay() for _ in range(3)] == [True, False, False]
    await asyncio.sleep(10 * TIMEOUT)
    assert not watch.begin_replay()
    watch.end_replay(helped=False)
    assert [watch.begin_replay() for _ in range(3)] == [True, False, False]


@in_virtual_time
async def test_once_it_helped_all_that_wait_are_sent_again() -> None:
    """The sessions are dead, and not the server slow; for as long as that is news."""
    watch = first_audio()
    watch.begin_replay()
    watch.end_replay(helped=True)
    await asyncio.sleep(0.9 * TIMEOUT)
    assert [watch.begin_replay() for _ in range(3)] == [True, True, True]
    await asyncio.sleep(0.2 * TIMEOUT)
    assert not watch.begin_replay()
    watch.end_replay(helped=False)
    assert [watch.begin_replay() for _ in range(2)] == [True, False]
