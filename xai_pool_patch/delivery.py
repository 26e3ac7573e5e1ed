"""One utterance on its way: which connections carry it, and what to do when one fails.

A connection that lay idle may be dead without anybody knowing. As long as it has given nothing for
this utterance, its failure is not the utterance's: a fresh one is dialled, what was sent is sent
again, and whichever gives something first is the one that is heard. Once. What a fresh connection
says, and everything after the first audio, goes to the plugin as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import WSMsgType

from .background import call_at, spawn
from .connection import ENDINGS, Connection
from .pool import Acquired, Pool, Reason
from .utterance import UNREADABLE, Stage

PROBE_ROUND_TRIPS = 4
SHORTEST_PROBE = 0.25
LONGEST_PROBE = 1.5
"""Seconds. A PING leaves just ahead of an utterance's first text; nothing heard for four round
trips, between these bounds, is no sign of life. The dial of a replacement begins after half of
that: most of a handshake is over by the time it is known whether it is needed."""

Frame = Callable[[Connection], Awaitable[None]]
"""Sends one frame of the utterance on the given connection."""


class Failure(enum.Enum):
    """Why the first connection was not left to carry the utterance alone."""

    NOT_SENT = "send failed"
    ENDED = "ended by the peer"
    ERROR = "error frame"
    UNREADABLE = "unreadable frame"
    OUT_OF_TURN = "answer out of turn"
    NO_PONG = "no sign of life"
    NO_ANSWER = "no answer"


@dataclass(eq=False)
class Attempt:
    """One connection that carries the utterance."""

    connection: Connection
    is_fresh: bool
    waited: float
    """Seconds that the utterance waited for it."""
    makes_up_for: Failure | None = None
    """Why it replaces the first one, if it does."""
    sent: int = 0
    """How many of the utterance's frames have been sent on it."""
    is_sending: bool = False
    is_overdue: bool = False
    """It had the time that it gets for an answer. It may still give one, but nothing waits for it
    alone."""


class Delivery:
    """Carries one utterance, over a second connection if the first, a reused one, fails.

    Args:
        acquired: the connection to begin with.
        pool: where it came from, and goes back to.
        redial: waits for a fresh connection.
        first_audio_timeout: see `PoolOptions`.
        on_replaced: is told the seconds waited, and for what reason, when a replacement is the one
            that is heard.
    """

    def __init__(
        self,
        acquired: Acquired[Connection],
        pool: Pool[Connection],
        *,
        redial: Callable[[], Awaitable[Acquired[Connection]]],
        first_audio_timeout: float,
        on_replaced: Callable[[float, str], None],
    ) -> None:
        self.inbox: asyncio.Queue[aiohttp.WSMessage | Exception] = asyncio.Queue()
        self._pool = pool
        self._redial = redial
        self._first_audio_timeout = first_audio_timeout
        self._on_replaced = on_replaced
        self._frames: list[Frame] = []
        self._attempts: list[Attempt] = []
        self._heard: Attempt | None = None
        """The one that is heard; while there is none, a failure can still be mended."""
        self._redialling: asyncio.Task[None] | None = None
        self._has_redialled = False
        """The dial is over; its connection may be sending yet."""
        self._defeat: Exception | None = None
        """Why there is no replacement, though one was called for."""
        self._alarms: list[asyncio.TimerHandle] = []
        first = self._begin(Attempt(acquired.connection, acquired.fresh, acquired.waited))
        self.connection = first.connection
        if first.is_fresh:
            self._heard = first

    def __repr__(self) -> str:
        state = "heard" if self._heard else "unheard"
        redialling = " redialling" if self._redialling and not self._has_redialled else ""
        return f"<Delivery {state}{redialling} {[a.connection for a in self._attempts]}>"

    @property
    def is_over(self) -> bool:
        """Nothing more will come into the inbox."""
        return self._heard is not None and self._heard.connection.is_over

    async def send(self, frame: Frame) -> None:
        """Sends a frame, and remembers it for a replacement.

        Raises:
            OSError: as the WebSocket does, if there is no other way to send it.
        """
        self._frames.append(frame)
        for attempt in list(self._attempts):
            try:
                await self._catch_up(attempt)
            except OSError:
                if not self._go_on_without(attempt, Failure.NOT_SENT):
                    raise

    def end(self, cut_off: Reason | None) -> None:
        """Gives back what it holds. Never waits."""
        self._stop_watching()
        self._stop_redialling()
        for attempt in self._attempts:
            attempt.connection.detach()
            if attempt is self._heard and cut_off is None:
                self._pool.release(attempt.connection)
            elif cut_off is Reason.INTERRUPTED and self._redialling is None:
                self._pool.reclaim(attempt.connection)
            else:
                self._pool.discard(attempt.connection, cut_off or Reason.ERROR)
        self._attempts.clear()

    # Sending

    def _begin(self, attempt: Attempt) -> Attempt:
        def take(message: aiohttp.WSMessage, type_: str) -> None:
            try:
                self._hear(attempt, message, type_)
            except Exception as fault:
                # The plugin must not wait for what will never come; the reader tells the rest.
                self.inbox.put_nowait(fault)
                raise

        self._attempts.append(attempt)
        attempt.connection.attach(take)
        return attempt

    async def _catch_up(self, attempt: Attempt) -> None:
        """Sends what is not sent yet, in order, whoever calls it while it runs."""
        if attempt.is_sending:
            return
        attempt.is_sending = True
        try:
            while attempt.sent < len(self._frames):
                if attempt.sent == 0 and not attempt.is_fresh:
                    await self._probe(attempt.connection)
                attempt.sent += 1
                await self._frames[attempt.sent - 1](attempt.connection)
                if self._heard is None and not attempt.is_fresh:
                    self._watch(attempt)
        finally:
            attempt.is_sending = False

    async def _probe(self, connection: Connection) -> None:
        """Asks a reused connection for a sign of life, and sets an alarm for it."""
        now = asyncio.get_running_loop().time()
        if connection.round_trip is not None:
            patience = PROBE_ROUND_TRIPS * connection.round_trip
            patience = min(LONGEST_PROBE, max(SHORTEST_PROBE, patience))

            def is_silent() -> bool:
                return connection.last_heard <= now

            def doubt() -> None:
                if is_silent():
                    self._replace(is_silent, Failure.NO_PONG)

            self._alarm(now + patience / 2, doubt)
        await connection.ping()

    def _watch(self, attempt: Attempt) -> None:
        """Sets the alarm for a reused connection that has the whole text and has given nothing."""

        def give_up_waiting() -> None:
            attempt.is_overdue = True
            self._replace(lambda: True, Failure.NO_ANSWER)
            self._fail_if_hopeless()

        if attempt.connection.utterance.stage in (Stage.AWAITING, Stage.EMPTY):
            now = asyncio.get_running_loop().time()
            self._alarm(now + self._first_audio_timeout, give_up_waiting)

    def _alarm(self, when: float, deed: Callable[[], None]) -> None:
        def ring() -> None:
            # A busy loop rings late, before it reads what has long arrived: read first.
            self._alarms.append(call_at(when, check))

        def check() -> None:
            if self._heard is None:
                deed()

        self._alarms.append(call_at(when, ring))

    # Hearing

    def _hear(self, attempt: Attempt, message: aiohttp.WSMessage, type_: str) -> None:
        if self._heard is None:
            if failure := _failure_in(attempt, message, type_):
                if self._go_on_without(attempt, failure):
                    return
                self._settle_on(attempt)
            elif type_.startswith("audio."):
                self._settle_on(attempt)
        if self._heard in (attempt, None):
            self.inbox.put_nowait(message)

    def _settle_on(self, attempt: Attempt) -> None:
        self._heard = attempt
        self.connection = attempt.connection
        self._stop_watching()
        for other in [other for other in self._attempts if other is not attempt]:
            self._drop(other)
        if attempt.makes_up_for is not None:
            self._pool.journal.replaced(attempt.waited, attempt.makes_up_for.value)
            self._on_replaced(attempt.waited, attempt.makes_up_for.value)
        else:
            self._stop_redialling()

    def _go_on_without(self, attempt: Attempt, failure: Failure) -> bool:
        """Whether something else will carry the utterance; else its failure is the plugin's."""
        if attempt not in self._attempts:
            return True  # it was dropped while it was sending
        if self._heard is not None:
            return False
        if self._is_hopeless(without=attempt) and (attempt.is_fresh or self._has_redialled):
            return False
        self._drop(attempt)
        if attempt.is_fresh:
            self._defeat = ConnectionResetError(f"replacement failed: {failure.value}")
        self._replace(lambda: True, failure)
        return True

    def _is_hopeless(self, without: Attempt | None = None) -> bool:
        """There is no connection left of which an answer is to be expected."""
        return all(attempt.is_overdue for attempt in self._attempts if attempt is not without)

    def _fail_if_hopeless(self) -> None:
        """An error is better than to wait for ever for a connection that had its time."""
        if self._defeat is not None and self._is_hopeless():
            self.inbox.put_nowait(self._defeat)

    def _drop(self, attempt: Attempt) -> None:
        self._attempts.remove(attempt)
        attempt.connection.detach()
        if attempt.is_fresh:
            self._pool.discard(attempt.connection, Reason.ERROR)
        else:
            self._pool.condemn(attempt.connection)

    # Replacing

    def _replace(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        """Begins to dial a replacement, if none has been dialled for this utterance."""
        if self._redialling is None:
            redial = self._send_again(is_wanted, failure)
            self._redialling = spawn(redial, name="xai_pool_patch.redial")

    async def _send_again(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        try:
            acquired = await self._redial()
        except Exception as error:
            self._has_redialled = True
            self._defeat = error
            self._pool.journal.replacement_failed(error, failure.value)
            self._fail_if_hopeless()
            return
        if not self._is_hopeless() and not is_wanted():
            # The first connection has shown life meanwhile.
            self._redialling = None
            self._pool.release(acquired.connection)
            return
        self._has_redialled = True
        attempt = self._begin(Attempt(acquired.connection, True, acquired.waited, failure))
        with contextlib.suppress(OSError):  # then its reader has heard of its end
            await self._catch_up(attempt)

    def _stop_watching(self) -> None:
        for alarm in self._alarms:
            alarm.cancel()
        self._alarms.clear()

    def _stop_redialling(self) -> None:
        if self._redialling is not None:
            self._redialling.cancel()


def _failure_in(attempt: Attempt, message: aiohttp.WSMessage, type_: str) -> Failure | None:
    if message.type in ENDINGS:
        return Failure.ENDED
    is_spoiled = attempt.connection.utterance.stage is Stage.SPOILED
    if is_spoiled and type_ in ("audio.done", "audio.clear"):
        # Before any audio of an utterance with text: an answer to something else.
        return Failure.OUT_OF_TURN
    if message.type is WSMsgType.TEXT:
        return {"error": Failure.ERROR, UNREADABLE: Failure.UNREADABLE}.get(type_)
    return None
