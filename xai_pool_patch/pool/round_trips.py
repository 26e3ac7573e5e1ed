"""Times that depend on how far away the server is."""

from __future__ import annotations

import math
from typing import NamedTuple


class RoundTrips(NamedTuple):
    """So many round trips, within bounds in seconds."""

    times: float
    at_least: float = 0.0
    at_most: float = math.inf

    def seconds(self, round_trip: float) -> float:
        """The time for one connection."""
        return min(self.at_most, max(self.at_least, self.times * round_trip))
