"""What is known about how a server answers PINGs, and how long the pool waits for it."""

from __future__ import annotations

import pytest

from xai_pool_patch.protocol.host import DECAY, LONGEST_PATIENCE, MARGIN, PROBE, Host


def after(*seconds: float) -> Host:
    host = Host()
    for each in seconds:
        host.answered(each)
    return host


@pytest.mark.parametrize(
    ("round_trip", "patience"),
    [(0.0, PROBE.at_least), (0.1, 0.4), (1.0, PROBE.at_most)],
)
def test_without_late_pongs_patience_follows_the_round_trip(
    round_trip: float, patience: float
) -> None:
    """Within bounds."""
    assert Host().patience(round_trip) == pytest.approx(patience)
    assert after(0.05).patience(round_trip) == pytest.approx(patience)


def test_a_late_pong_makes_patient() -> None:
    """For half as long again, whichever connection it came on."""
    assert after(0.1, 3.0, 0.1).patience(0.1) == pytest.approx(3.0 * DECAY * MARGIN)
    assert after(3.0, 4.0).patience(0.1) == pytest.approx(4.0 * MARGIN)


def test_patience_has_a_limit() -> None:
    """A caller waits for what is dead no longer, however late PONGs were."""
    assert after(60.0).patience(60.0) == LONGEST_PATIENCE


def test_prompt_pongs_bring_patience_back() -> None:
    """Fifteen of them make up for one that took three seconds."""
    late = [3.0, *[0.1] * 15]
    assert after(*late[:-5]).patience(0.1) > MARGIN
    assert after(*late).patience(0.1) < MARGIN
    assert after(*late, *[0.1] * 60).patience(0.1) == pytest.approx(0.4)


def test_only_an_answer_shows_that_pings_are_answered() -> None:
    """Until then, silence says nothing about a connection."""
    assert not Host().answers_pings
    assert after(0.1).answers_pings
    assert not Host().pongs_unordered


def test_two_ends_by_themselves_in_a_row_say_that_pongs_are_late() -> None:
    """L4c: one may be of an older utterance."""
    host = Host()
    host.held_an_end()
    assert not host.pongs_unordered
    host.was_in_order()
    host.held_an_end()
    assert not host.pongs_unordered
    host.held_an_end()
    assert host.pongs_unordered
