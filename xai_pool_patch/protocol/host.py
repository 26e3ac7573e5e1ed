"""What the connections of one event loop have learnt about one server."""

from __future__ import annotations

from ..pool.round_trips import RoundTrips

PROBE = RoundTrips(4, at_least=0.25, at_most=1.5)
"""Time for a sign of life after the PING that leaves just ahead of an utterance's first text."""

MARGIN = 1.5
"""A server whose PONG was late may take half as long again the next time."""
DECAY = 0.9
"""What each PONG leaves of the slowest one: fifteen prompt PONGs make up for one that took 3 s."""
HELD_ENDS = 2
"""Ends in a row that came by themselves ahead of a PONG, and were not overtaken by audio. Each was
on another connection, so that all were of older utterances is less likely than a late PONG."""
LONGEST_PATIENCE = 10.0
"""Seconds. However late PONGs were, a connection that says nothing for so long is replaced."""


class Host:
    """How a server answers PINGs.

    Attributes:
        answers_pings: a PONG has come. Until then, silence says nothing about a connection.
        pongs_unordered: the answer to a text came ahead of the PONG for an earlier PING. So PONGs
            of this server do not show which utterance an answer is for.
    """

    def __init__(self) -> None:
        self.answers_pings = False
        self.pongs_unordered = False
        self._slowest = 0.0
        self._held_ends = 0

    def held_an_end(self) -> None:
        """An `audio.done` came ahead of the PONG, and nothing after it."""
        self._held_ends += 1
        self.pongs_unordered |= self._held_ends >= HELD_ENDS

    def was_in_order(self) -> None:
        """A PONG came ahead of any answer to the text behind its PING."""
        self._held_ends = 0

    def answered(self, seconds: float) -> None:
        """A PING was answered after so many seconds, by a PONG or by anything else."""
        self.answers_pings = True
        self._slowest = max(seconds, DECAY * self._slowest)

    def patience(self, round_trip: float) -> float:
        """Seconds after a PING in which a connection has to give a sign of life."""
        return min(LONGEST_PATIENCE, max(PROBE.seconds(round_trip), MARGIN * self._slowest))
