"""The options, their defaults, and the reasons for those."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from .errors import InvalidOptionError

Interruption = Literal["discard", "clear"]
Warm = Literal["auto", "always", "reply"]

MAX_SESSIONS = 50
"""Concurrent sessions that xAI allows a team, as its documentation says."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How the pool of warm connections behaves. Times are in seconds.

    Raises:
        InvalidOptionError: a value is of the wrong type or makes no sense.
    """

    min_size: int = 1
    """Connections that the pool keeps per voice in use: idle, leased and connecting ones count. One
    conversation speaks one utterance at a time, so it needs one. With 0 the pool still reuses
    connections, but dials only for `prewarm()`, for a reply that is about to come, or when a turn
    asks for one."""

    max_age: float = 540.0
    """Age at which a connection expires: the pool replaces it in the background, and does not hand
    it out any more. A sibling of this service was seen to be dead behind an open socket after
    600 s. xAI ends a connection about 2,100 s after it was opened."""

    warm: Warm = "auto"
    """When the pool keeps `min_size` connections. `"always"`: as long as a TTS uses the voice.
    `"reply"`: only from the first sign of a reply until 0.3 s after its last use, so that a call
    holds a session only while its agent speaks; part of the handshake may delay the first audio.
    `"auto"`: as with `"always"` until xAI refuses a session, to this process or another that it
    hears of; then for two minutes after the last refusal as with `"reply"`."""

    redis_url: str | None = field(default=None, repr=False)
    """With `warm="auto"`, the URL of a Redis (`redis://`, `rediss://` or `unix://`) through which
    processes on several machines hear of each other's refusals. None: the URL in the environment
    variable `XAI_POOL_PATCH_REDIS_URL`, if it is set; else only the processes of this user on this
    machine hear of them. A process that cannot hear of others works as with `"reply"`. Not in the
    repr: a URL may contain a password."""

    max_idle_time: float = 60.0
    """Idle time after which the pool closes the last connection of a voice that no TTS uses any
    more, or with `min_size=0`. Those that no turn is expected to need, such as the rest of a burst
    of turns, close after five seconds: each counts among the team's sessions."""

    heartbeat: float = 20.0
    """Interval of WebSocket PINGs. They keep NATs and load balancers from dropping an idle
    connection, and show within 1.5 times this interval that a peer has vanished. If a server has
    never answered a PING, silence ends no connection."""

    answer_timeout: float = 20.0
    """Time from the end of an utterance's text in which a reused connection has to answer. Then the
    utterance fails, and LiveKit retries it on a new connection. An open socket is not a live
    session: xAI's speech to text was seen to answer PINGs and do nothing else. A slow server is not
    a dead one either: healthy answers took up to 19 s."""

    interruption: Interruption = "discard"
    """What the pool does with a connection whose utterance was interrupted. `"discard"` closes it,
    which needs nothing from the server. `"clear"` asks the server to cancel the utterance
    (`text.clear`) and reuses the connection once the server has acknowledged that: one round trip
    instead of a handshake."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            wanted = _wanted_instead(option.name, value)
            if wanted is not None:
                # A URL may contain a password.
                shown = repr(value) if option.repr else type(value).__name__
                raise InvalidOptionError(f"{option.name} must be {wanted}, not {shown}")


_CHOICES = {"interruption": get_args(Interruption), "warm": get_args(Warm)}


def _wanted_instead(name: str, value: Any) -> str | None:
    """What the option must be; None if the value is that."""
    if name in _CHOICES:
        *others, last = map(repr, _CHOICES[name])
        return None if value in _CHOICES[name] else f"{', '.join(others)} or {last}"
    if name == "redis_url":
        # What is in it is checked by install(): that needs the Redis client.
        return None if value is None or isinstance(value, str) else "a string or None"
    if name == "min_size":
        is_count = _is_number(value, int) and 0 <= value <= MAX_SESSIONS
        return None if is_count else f"a whole number from 0 to {MAX_SESSIONS}"
    is_time = _is_number(value, int, float) and math.isfinite(value) and value > 0
    return None if is_time else "a number of seconds above 0"


def _is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
