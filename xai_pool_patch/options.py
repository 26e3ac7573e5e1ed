"""What can be set, what it is set to, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from .errors import InvalidOptionError

Interruption = Literal["discard", "clear"]

MAX_SESSIONS = 50
"""Concurrent sessions that xAI allows a team (xAI's documentation)."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How the pool of warm connections behaves. Times are in seconds.

    Raises:
        InvalidOptionError: a value is of the wrong type or makes no sense.
    """

    min_size: int = 1
    """Connections kept per voice in use, whether idle, leased or being dialled. One conversation
    speaks one utterance at a time, so one is what it needs. 0 keeps none: connections are still
    reused, but a replacement is dialled only when a turn asks for it."""

    max_age: float = 1800.0
    """Oldest connection that is handed out. xAI was seen to end connections about 2,100 s after
    they were opened; the 300 s in between are room for an utterance that begins last of all,
    enough for 25 minutes of speech at the five times real time at which its audio comes."""

    max_idle_time: float = 60.0
    """Idle time after which a connection above `min_size` is closed. xAI counts it among the
    team's 50 sessions, so what a burst left behind should not stay for long."""

    close_timeout: float = 5.0
    """Time the server has to answer a Close frame before the socket is aborted. Always spent in
    the background. Without a Close frame xAI may count the session for up to 600 s more."""

    heartbeat: float = 20.0
    """Interval of WebSocket PINGs. Keeps NATs and load balancers from forgetting the connection
    and finds a vanished peer within 1.5 times this. A server that never answers one is not held
    to it."""

    first_audio_timeout: float = 5.0
    """Time a reused connection has, from the end of an utterance's text, to say anything; after
    that the utterance is sent again on a new one. An open socket is not a live session: xAI's
    speech to text was seen to answer PINGs and do nothing else. One that answers PINGs is waited
    for up to three times this if nothing better comes, since a slow server is not a dead one."""

    interruption: Interruption = "discard"
    """What becomes of a connection whose utterance was interrupted. Discarding it needs nothing
    from the server. `"clear"` asks the server to cancel the utterance (`text.clear`), and uses the
    connection again once that is acknowledged: one round trip instead of a handshake."""

    clear_timeout: float = 1.0
    """Longest time the server has to acknowledge a `text.clear`; less over a short round trip. It
    is spent in the background, and the connection is of no use meanwhile."""

    verify_after: float | None = None
    """Idle time after which a connection has to acknowledge a `text.clear`. That proves the session
    behind the socket: xAI's speech to text was seen to answer PINGs after 600 s of idleness and do
    nothing else, so 300 would be a choice. None: PINGs alone keep it. A server that refuses it
    twice in a row is not asked again."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "min_size":
                _check_count(field.name, value)
            elif field.name in _CHOICES:
                _check_choice(field.name, value)
            elif value is not None or field.default is not None:
                _check_seconds(field.name, value)


_CHOICES = {"interruption": get_args(Interruption)}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SESSIONS:
        raise InvalidOptionError(
            f"{name} must be a whole number from 0 to {MAX_SESSIONS}, not {value!r}"
        )


def _check_choice(name: str, value: object) -> None:
    if value not in _CHOICES[name]:
        choices = " or ".join(map(repr, _CHOICES[name]))
        raise InvalidOptionError(f"{name} must be {choices}, not {value!r}")


def _check_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
        raise InvalidOptionError(f"{name} must be a number of seconds above 0, not {value!r}")
