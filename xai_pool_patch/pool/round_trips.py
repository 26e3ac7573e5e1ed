"""Times that depend on how far away the server is."""

from __future__ import annotations

import math
from typing import NamedTuple


class RoundTrips(NamedTuple):
    """So many round trips, within bounds in seconds."""

    times: float
    at_least: float = 0.0
    at_most: float = math.inf

    def seconds(self, round_trip: float | None) -> float:
        """The time for one connection; `at_most` while its round trip is not known."""
        if round_trip is None:
            return self.at_most
        return min(self.at_most, max(self.at_least, self.times * round_trip))
