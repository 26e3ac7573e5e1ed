"""Learns from the last utterances how long the server may take until the first audio."""

from __future__ import annotations

import asyncio
import math

LIMIT = 3
"""An utterance fails after so many times `first_audio_timeout`. Something may still answer the
PINGs, but no session is behind it."""

MARGIN = 1.5
"""A server that was slow may take half as long again the next time."""


class FirstAudio:
    """Distinguishes a slow server from a dead session, for the utterances of one event loop.

    If each utterance were replayed after `first_audio_timeout`, a slow server would have to
    generate everything twice. So an utterance that was slow and was heard gives the next ones more
    time. Of several utterances that wait, one is replayed at a time, until a replay has helped.

    Args:
        timeout: see `PoolOptions.first_audio_timeout`.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._slowest = 0.0
        self._is_replaying = False
        self._helped_at = -math.inf

    @property
    def replay_after(self) -> float:
        """Seconds after the end of a text at which it may be replayed."""
        return max(self.timeout, MARGIN * self._slowest)

    @property
    def limit(self) -> float:
        """Seconds after the end of a text at which the utterance fails."""
        return max(LIMIT * self.timeout, self.replay_after)

    def took(self, seconds: float) -> None:
        """Learn the time from the end of a text to its first audio."""
        self._slowest = max(seconds, self._slowest / 2)

    def begin_replay(self) -> bool:
        """Begin to replay an utterance that waited `replay_after`. False if it must wait longer."""
        if self._is_replaying and _now() - self._helped_at > self.timeout:
            return False
        self._is_replaying = True
        return True

    def end_replay(self, *, helped: bool) -> None:
        """A replay is over. It helped if its connection was the one that was heard."""
        self._is_replaying = False
        if helped:
            self._helped_at = _now()


def _now() -> float:
    return asyncio.get_running_loop().time()
