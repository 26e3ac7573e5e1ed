"""The questions that are asked only by name: they take long, or sessions from other calls."""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import dataclass

from ..options import PoolOptions
from .question import Answer, Question, Verdict
from .quick import HELLO
from .service import DialError, RefusedError, Service, Socket, Spoken, now

SHARE_OF_LIFE = 0.85
"""How much of the life of a connection `max_age` may use: 1,785 s of 2,100."""

SAME_AGE = 0.03
"""Ages that differ by less than this share of them are the same."""

BEYOND = 1.15
"""How much longer than the supposed deadline the probe waits for one."""

USES = 7
"""Utterances that a connection in use speaks before the supposed deadline."""

FREES_AT_ONCE = 1.0
"""Seconds. A refused caller of the pool closes idle connections and waits so long for a session."""

RETRY, LONGEST_RETRY = 0.1, 5.0
"""Seconds between dials that wait for a session: the first, and the longest."""

OF_THE_LIMIT = {"limit", "limits", "concurrent", "concurrency", "session", "sessions", "quota"}
"""One of these words in an error message says that it is about the limit of sessions."""


# --idle


@dataclass(frozen=True)
class _Fate:
    """What became of an idle connection."""

    usable: bool
    lived: float
    """How long it was idle until it ended, or until its last PONG."""
    answers_pings: bool
    found: str


async def _idle(seconds: float, service: Service) -> Answer:
    async with service.open() as silent, service.open() as kept:
        over = now() + seconds
        await asyncio.gather(_watch(silent, over), _keep(kept, over))
        left, alive = await asyncio.gather(_fate(silent), _fate(kept))
    found = f"without PINGs {left.found}; with PINGs {alive.found}"
    measured = {"without_pings_s": round(left.lived, 1), "with_pings_s": round(alive.lived, 1)}
    advises = _for_idle(seconds, left, alive)
    return Answer(
        Verdict.AS_SUPPOSED if alive.usable and not advises else Verdict.OTHERWISE,
        found,
        advises,
        measured,
    )


def _for_idle(seconds: float, left: _Fate, alive: _Fate) -> dict[str, float]:
    if alive.usable:
        is_too_long = not left.usable and left.lived < 2 * PoolOptions.heartbeat
        return {"heartbeat": _rounded(left.lived / 3)} if is_too_long else {}
    if alive.answers_pings:
        # When the session died cannot be known: something else answered the PINGs.
        return {"max_age": min(PoolOptions.max_age, _rounded(seconds / 2))}
    return {"max_age": min(PoolOptions.max_age, _rounded(SHARE_OF_LIFE * alive.lived))}


async def _watch(socket: Socket, until: float) -> None:
    """Waits for the end of a connection, or for an error, and sends nothing."""
    await socket.first("error", since=0, timeout=until - now())


async def _keep(socket: Socket, until: float) -> None:
    """The same, and sends PINGs as the pool does."""
    interval = socket.timing.heartbeat
    while socket.is_open and not socket.count("error") and now() < until:
        await socket.send_ping()
        await _watch(socket, min(until, now() + interval))


async def _fate(socket: Socket) -> _Fate:
    pings = socket.count("PING")
    sent = f", after {pings} PINGs of the service" if pings else ""
    if not socket.is_open and socket.ended_at is not None:
        lived = socket.ended_at - socket.opened_at
        return _Fate(False, lived, False, f"{socket.why_silent()} after {_s(lived)}{sent}")
    last = max((heard.at for heard in socket.heard), default=socket.opened_at)
    asked_at = now()
    answers_pings = await socket.ping() is not None
    usable = (await socket.speak(HELLO)).is_done
    if usable:
        state = "usable"
    elif answers_pings:
        state = "PINGs are answered and a text is not,"
    else:
        state = "silent, with no sign of life"
    lived = (asked_at if usable or answers_pings else last) - socket.opened_at
    return _Fate(usable, lived, answers_pings, f"{state} after {_s(lived)}{sent}")


def idle(seconds: float) -> Question:
    """Whether a connection can be used after so many seconds."""
    return Question(
        name="idle connection",
        supposed="A connection that gets PINGs can be used after any time below `max_age`.",
        if_so="The pool keeps idle connections open, and its heartbeat keeps them alive.",
        if_not="The pool replaces an idle connection that ends. `max_age` below that time replaces"
        " it earlier, also one whose session is dead behind an open socket. A shorter `heartbeat`"
        " keeps it open.",
        options=("heartbeat", "max_age"),
        flag="--idle SECONDS",
        characters=2 * len(HELLO),
        seconds=seconds + 3,
        ask=functools.partial(_idle, seconds),
    )


# --deadline


async def _deadline(service: Service) -> Answer:
    """Three connections: never used, used once after a while, used all the time."""
    expected = service.timing.deadline
    async with service.open() as unused, service.open() as once, service.open() as often:
        until = now() + BEYOND * expected
        use = expected / USES
        await asyncio.gather(
            _use(unused, until, math.inf, math.inf),
            _use(once, until, use, math.inf),
            _use(often, until, use, use),
        )
        sockets = {"unused": unused, "used once": once, "used often": often}
        ages = {name: _age_at_end(socket) for name, socket in sockets.items()}
    return _judged(ages, expected)


async def _use(socket: Socket, until: float, first: float, interval: float) -> None:
    """Keeps a connection alive to its end, and has it speak now and then."""
    due = now() + first
    while socket.is_open and not socket.count("error") and now() < until:
        await _keep(socket, min(due, until))
        if now() >= due:
            await socket.speak(HELLO)
            due = now() + interval


def _age_at_end(socket: Socket) -> float | None:
    """The age at which the service ended it, by an error frame or otherwise."""
    errors = [heard.at for heard in socket.heard if heard.type == "error"]
    moments = [*errors, *([] if socket.ended_at is None else [socket.ended_at])]
    return min(moments) - socket.opened_at if moments else None


def _judged(ages: dict[str, float | None], expected: float) -> Answer:
    found = ", ".join(
        f"{name}: {'no end' if age is None else f'ended after {_s(age)}'}"
        for name, age in ages.items()
    )
    ends = [age for age in ages.values() if age is not None]
    if not ends:
        return Answer(Verdict.OTHERWISE, f"no end within {_s(BEYOND * expected)}")
    measured = {f"{name.replace(' ', '_')}_s": age for name, age in ages.items() if age is not None}
    from_opening = len(ends) == len(ages) and max(ends) - min(ends) <= SAME_AGE * expected
    is_late_enough = min(ends) >= (1 - SAME_AGE) * expected
    found += "; counted from the opening" if from_opening else "; not counted from the opening"
    return Answer(
        Verdict.AS_SUPPOSED if from_opening and is_late_enough else Verdict.OTHERWISE,
        found,
        {} if is_late_enough else {"max_age": _rounded(SHARE_OF_LIFE * min(ends))},
        measured,
    )


DEADLINE = Question(
    name="deadline",
    supposed="The service ends a connection about 2,100 s after it was opened, used or not.",
    if_so="The pool replaces a connection long before, by the age of 540 s.",
    if_not="`max_age` has to be below the shortest life. The default is, unless that life is"
    " shorter than nine minutes.",
    options=("max_age",),
    flag="--deadline",
    characters=(1 + USES + 1) * len(HELLO),
    seconds=2100 * BEYOND,
    ask=_deadline,
)


# --sessions


@dataclass(frozen=True)
class _Limit:
    """How the service refused the first connection above the limit."""

    refusal: str
    is_429: bool
    names_limit: bool
    """It says that it is about the limit of sessions."""

    @classmethod
    def of(cls, error: DialError) -> _Limit:
        is_429 = isinstance(error, RefusedError) and error.status == 429
        is_frame = not isinstance(error, RefusedError)
        words = set(str(error).lower().replace(":", " ").split())
        return cls(str(error), is_429, is_429 or (is_frame and bool(words & OF_THE_LIMIT)))


async def _sessions(count: int, service: Service) -> Answer:
    opened: list[Socket] = []
    try:
        limit = await _open_all(opened, count, service)
        if limit is None:
            return await _all_speak(opened)
        if not opened:
            return Answer(Verdict.UNKNOWN, f"no session was free: {limit.refusal}")
        held = len(opened)
        after_close = await _time_to_free(opened, service, close=True)
        after_drop = None
        if after_close is not None:  # else it would take as long again
            after_drop = await _time_to_free(opened, service, close=False)
    finally:
        await asyncio.gather(*(socket.close() for socket in opened))
    return _limited(held, limit, after_close, after_drop)


async def _open_all(opened: list[Socket], count: int, service: Service) -> _Limit | None:
    """Opens connections up to `count`; how the first one too many was refused."""
    while len(opened) < count:
        try:
            opened.append(await service.dial_settled())
        except DialError as error:
            return _Limit.of(error)
    return None


async def _time_to_free(opened: list[Socket], service: Service, *, close: bool) -> float | None:
    """How long after the end of one connection a dial is accepted; None if none is."""
    socket = opened.pop()
    await (socket.close() if close else socket.drop())
    ended_at, pause = now(), RETRY
    while now() - ended_at < service.timing.frees:
        dialled_at = now()
        if await _open_all(opened, len(opened) + 1, service) is None:
            return dialled_at - ended_at
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_RETRY)
    return None


def _limited(
    held: int, limit: _Limit, after_close: float | None, after_drop: float | None
) -> Answer:
    found = (
        f"idle connections count: {held} were open when the next was refused with {limit.refusal}."
        f" A Close {_freed(after_close)}, a lost connection {_freed(after_drop)}"
    )
    frees = after_close is not None and after_close <= FREES_AT_ONCE
    measured: dict[str, float] = {"sessions": held}
    for name, seconds in (("close_frees_s", after_close), ("lost_frees_s", after_drop)):
        if seconds is not None:
            measured[name] = round(seconds, 1)
    advises = {"warm": "auto" if limit.names_limit else "reply"}
    if not frees:
        advises["interruption"] = "clear"
    is_supposed = limit.is_429 and frees
    verdict = Verdict.AS_SUPPOSED if is_supposed else Verdict.OTHERWISE
    return Answer(verdict, found, advises, measured)


def _freed(after: float | None) -> str:
    if after is None:
        return "freed no session"
    return "freed a session at once" if after < RETRY else f"freed a session after {after:.1f} s"


async def _all_speak(opened: list[Socket]) -> Answer:
    """No idle connection was refused. Are utterances limited in their place?"""
    spoken = await asyncio.gather(*(socket.speak(HELLO) for socket in opened))
    refused: list[Spoken] = [each for each in spoken if not each.is_done]
    found = f"{len(opened)} idle connections were open and none was refused"
    if not refused:
        return Answer(Verdict.UNKNOWN, f"{found}, nor was any of their utterances: ask with more")
    found += f"; of {len(opened)} utterances at once {len(refused)} failed: {refused[0].outcome}"
    measured = {"utterances_at_once": float(len(opened) - len(refused))}
    return Answer(Verdict.OTHERWISE, found, {"warm": "always"}, measured)


def sessions(count: int) -> Question:
    """Whether idle connections count among the sessions of a team."""
    return Question(
        name="sessions",
        supposed="Idle connections count among a team's sessions, the first above the limit is"
        " refused with 429, and a Close frees a session at once.",
        if_so='`warm="auto"` keeps connections warm until a dial is refused for the limit.',
        if_not='If idle connections do not count, `warm="always"` costs no session. If a refusal'
        ' does not speak of the limit, only `warm="reply"` leaves sessions to others. If a Close'
        ' frees a session late, `interruption="clear"` closes fewer.',
        options=("warm", "interruption"),
        flag="--sessions N",
        characters=count * len(HELLO),
        seconds=count + 660,
        ask=functools.partial(_sessions, count),
    )


def _rounded(seconds: float) -> float:
    """Two digits of it, rounded down."""
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return round(math.floor(seconds / unit) * unit, 3)


def _s(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
