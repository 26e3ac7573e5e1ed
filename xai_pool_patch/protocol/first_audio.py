"""How long a server may take to begin to speak, as far as the last utterances tell."""

from __future__ import annotations

import asyncio
import math

LIMIT = 3
"""An utterance is given up after so many times `first_audio_timeout`: whatever answers the PINGs,
nobody speaks behind it."""

MARGIN = 1.5
"""A server that was slow and spoke may take half as long again the next time."""


class FirstAudio:
    """Tells a slow server from a dead session, for the utterances of one event loop.

    A server that takes longer than `first_audio_timeout` would have to generate everything twice
    if each utterance were sent again then. So slowness that turned out good teaches patience, and
    of several that wait one is sent again at a time, until that has helped.

    Args:
        timeout: see `PoolOptions.first_audio_timeout`.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._slowest = 0.0
        self._is_replaying = False
        self._helped_at = -math.inf

    @property
    def patience(self) -> float:
        """Seconds from the end of a text after which it is sent again over another connection."""
        return max(self.timeout, MARGIN * self._slowest)

    @property
    def limit(self) -> float:
        """Seconds after which nothing is expected any more."""
        return max(LIMIT * self.timeout, self.patience)

    def took(self, seconds: float) -> None:
        """So long it was from the end of a text to its first audio."""
        self._slowest = max(seconds, self._slowest / 2)

    def begin_replay(self) -> bool:
        """Whether an utterance that waited for so long may be sent again now."""
        if self._is_replaying and _now() - self._helped_at > self.timeout:
            return False
        self._is_replaying = True
        return True

    def end_replay(self, *, helped: bool) -> None:
        """One that was sent again has ended, or was heard: over the other connection, it helped."""
        self._is_replaying = False
        if helped:
            self._helped_at = _now()


def _now() -> float:
    return asyncio.get_running_loop().time()
