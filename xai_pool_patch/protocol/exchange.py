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
from typing import Any, NamedTuple

import aiohttp
from aiohttp import WSMsgType

from ..pool.pool import Acquired, Pool, Reason
from ..pool.soft_timeout import SoftTimeout
from ..pool.supervisor import Supervisor
from .connection import ENDINGS, Connection
from .first_audio import FirstAudio
from .utterance import UNREADABLE, Stage

PROBE_ROUND_TRIPS = 4
SHORTEST_PROBE = 0.25
LONGEST_PROBE = 1.5
"""Seconds. A PING leaves just ahead of an utterance's first text; nothing heard for four round
trips, between these bounds, is no sign of life. The dial of a replacement begins after half of
that: most of a handshake is over by the time it is known whether it is needed."""

LOOKS = 10
"""Per `first_audio_timeout`: how often an utterance that waits for its first audio for longer than
it should looks whether it may be sent again, and whether it should be given up."""


class Frame(NamedTuple):
    """One frame that the plugin sent: the method of the WebSocket, and its arguments."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Frame {self.method}>"  # not what is spoken

    @property
    def data(self) -> object:
        return self.args[0] if self.args else None

    def send(self, ws: aiohttp.ClientWebSocketResponse) -> Awaitable[None]:
        return getattr(ws, self.method)(*self.args, **self.kwargs)  # type: ignore[no-any-return]


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
    replaces: Failure | None = None
    """Why it replaces the first one, if it does."""
    sent: int = 0
    """How many of the utterance's frames have been sent on it."""
    is_sending: bool = False
    silent_since: float | None = None
    """Since then it has given no sign of life, unless it has given one after all."""
    asked_at: float | None = None
    """When it had the whole text; time of the event loop."""
    doubted_at: float | None = None
    """Since when its answer takes longer than it should."""
    is_overdue: bool = False
    """It had the time that it gets for an answer. It may still give one, but nothing waits for it
    alone."""

    @property
    def is_exhausted(self) -> bool:
        is_silent = (
            self.silent_since is not None and self.connection.last_heard <= self.silent_since
        )
        return is_silent or self.is_overdue


class Exchange:
    """Carries one utterance, over a second connection if the first, a reused one, fails.

    Args:
        acquired: the connection to begin with.
        pool: where it came from, and goes back to.
        frames: what the plugin sends; grows by one before each `send`.
        supervisor: owns the tasks and timers.
        redial: waits for a fresh connection.
        first_audio: how long a reused connection may take to answer.
        on_replaced: called with the seconds waited, and for what reason, when a replacement is the
            one that is heard.
    """

    def __init__(
        self,
        acquired: Acquired[Connection],
        pool: Pool[Connection],
        frames: list[Frame],
        *,
        supervisor: Supervisor,
        redial: Callable[[], Awaitable[Acquired[Connection]]],
        first_audio: FirstAudio,
        on_replaced: Callable[[float, str], None],
    ) -> None:
        self.inbox: asyncio.Queue[aiohttp.WSMessage | Exception] = asyncio.Queue()
        self.frames = frames
        self._pool = pool
        self._supervisor = supervisor
        self._redial = redial
        self._first_audio = first_audio
        self._on_replaced = on_replaced
        self._attempts: list[Attempt] = []
        self._committed: Attempt | None = None
        """The one that is heard; while there is none, a failure can still be mended."""
        self._has_spoken = False
        self._redialling: asyncio.Task[None] | None = None
        self._has_redialled = False
        """The dial is over; its connection may be sending yet."""
        self._replays_unanswered = False
        """It holds the right to be sent again for being slow; see `FirstAudio`."""
        self._redial_error: Exception | None = None
        """Why there is no replacement, though one was called for."""
        self._patience: list[SoftTimeout] = []
        first = self._begin(Attempt(acquired.connection, acquired.fresh, acquired.waited))
        self.connection = first.connection
        if first.is_fresh:
            self._committed = first

    def __repr__(self) -> str:
        state = "heard" if self._committed else "unheard"
        redialling = " redialling" if self._redialling and not self._has_redialled else ""
        return f"<Exchange {state}{redialling} {[a.connection for a in self._attempts]}>"

    @property
    def is_over(self) -> bool:
        """Nothing more will come into the inbox."""
        return self._committed is not None and self._committed.connection.is_over

    @property
    def heard(self) -> Attempt | None:
        """Who has given the audio that came so far."""
        return self._committed if self._has_spoken else None

    async def send(self) -> None:
        """Sends the frames that have not been sent yet.

        Raises:
            OSError: as the WebSocket does, if there is no other way to send it.
        """
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
        self._end_replay(helped=False)
        for attempt in self._attempts:
            attempt.connection.detach()
            if attempt is self._committed and cut_off is None:
                self._pool.release(attempt.connection)
            elif cut_off is Reason.INTERRUPTED and self._redialling is None:
                self._pool.release_cut_off(attempt.connection)
            else:
                self._pool.discard(attempt.connection, cut_off or Reason.FAILED)
        self._attempts.clear()

    # Sending

    def _begin(self, attempt: Attempt) -> Attempt:
        def take(message: aiohttp.WSMessage, type_: str) -> None:
            self._hear(attempt, message, type_)

        self._attempts.append(attempt)
        attempt.connection.attach(take)
        return attempt

    async def _catch_up(self, attempt: Attempt) -> None:
        """Sends what is not sent yet, in order, whoever calls it while it runs."""
        if attempt.is_sending:
            return
        attempt.is_sending = True
        try:
            while attempt.sent < len(self.frames):
                if attempt.sent == 0 and not attempt.is_fresh:
                    await self._probe(attempt)
                frame = self.frames[attempt.sent]
                attempt.connection.sending(frame.data)
                self._watch(attempt)
                sending = frame.send(attempt.connection.ws)
                attempt.sent += 1  # with nothing in between: it tells what has left
                await sending
        finally:
            attempt.is_sending = False

    async def _probe(self, attempt: Attempt) -> None:
        """Asks a reused connection for a sign of life, and sees to it if there is none."""
        connection = attempt.connection
        if connection.round_trip is None:
            await connection.ping_as_fence(LONGEST_PROBE)
            return
        began = _now()
        patience = PROBE_ROUND_TRIPS * connection.round_trip
        patience = min(LONGEST_PROBE, max(SHORTEST_PROBE, patience))

        def is_silent() -> bool:
            return connection.last_heard <= began

        def doubt() -> None:
            if is_silent():
                self._replace(is_silent, Failure.NO_PONG)

        def give_up() -> None:
            attempt.silent_since = began
            self._fail_if_exhausted()

        self._wait(patience / 2, doubt)
        self._wait(patience, give_up)
        await connection.ping_as_fence(patience)

    def _watch(self, attempt: Attempt) -> None:
        """From the end of its text on, a reused connection that gave nothing has to answer."""
        if attempt.connection.utterance.stage not in (Stage.AWAITING, Stage.EMPTY):
            return
        attempt.asked_at = _now()
        if self._committed is None and not attempt.is_fresh:
            self._wait(self._first_audio.patience, lambda: self._doubt(attempt))

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Calls it unless something is heard first."""
        self._patience.append(SoftTimeout(self._supervisor, seconds, then))

    def _doubt(self, attempt: Attempt) -> None:
        """The answer takes longer than it should: is the session dead, or the server slow?"""
        if attempt not in self._attempts or attempt.asked_at is None:
            return
        if attempt.doubted_at is None:
            attempt.doubted_at = _now()
            ask = self._ask_for_life(attempt.connection)
            self._supervisor.spawn(ask, name="xai_pool_patch.ping")
        waited = _now() - attempt.asked_at
        if waited >= self._first_audio.limit or _is_mute(attempt):
            self._give_up_waiting(attempt)
            return
        if waited >= self._first_audio.patience and self._redialling is None:
            self._replays_unanswered = self._first_audio.begin_replay()
            if self._replays_unanswered:
                self._replace(lambda: True, Failure.NO_ANSWER)
        self._wait(self._first_audio.timeout / LOOKS, lambda: self._doubt(attempt))

    async def _ask_for_life(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):  # then its reader has heard of its end
            await connection.ping()

    def _give_up_waiting(self, attempt: Attempt) -> None:
        attempt.is_overdue = True
        self._replace(lambda: True, Failure.NO_ANSWER)  # if it was not its turn until now
        self._fail_if_exhausted()

    # Hearing

    def _hear(self, attempt: Attempt, message: aiohttp.WSMessage, type_: str) -> None:
        is_audio = type_.startswith("audio.")
        if self._committed is None:
            if failure := _failure_in(attempt, message, type_):
                if self._go_on_without(attempt, failure):
                    return
                self._commit(attempt)
            elif is_audio or type_ == "error":
                self._commit(attempt)
        if self._committed in (attempt, None):
            if is_audio and not self._has_spoken:
                self._begin_to_speak(attempt)
            # Last: what is in the inbox is heard, whatever else should fail.
            self.inbox.put_nowait(message)

    def _begin_to_speak(self, attempt: Attempt) -> None:
        self._has_spoken = True
        if attempt.asked_at is not None:
            self._first_audio.took(_now() - attempt.asked_at)

    def _commit(self, attempt: Attempt) -> None:
        self._committed = attempt
        self.connection = attempt.connection
        self._stop_watching()
        self._end_replay(helped=attempt.replaces is Failure.NO_ANSWER)
        for other in [other for other in self._attempts if other is not attempt]:
            self._drop(other)
        if attempt.replaces is not None:
            self._pool.metrics.replayed(attempt.waited, attempt.replaces.value)
            self._on_replaced(attempt.waited, attempt.replaces.value)
        else:
            self._stop_redialling()

    def _go_on_without(self, attempt: Attempt, failure: Failure) -> bool:
        """Whether something else will carry the utterance; else its failure is the plugin's."""
        if attempt not in self._attempts:
            return True  # it was dropped while it was sending
        if self._committed is not None:
            return False
        if self._is_exhausted(without=attempt) and (attempt.is_fresh or self._has_redialled):
            return False
        self._drop(attempt)
        if attempt.is_fresh:
            self._redial_error = ConnectionResetError(f"replay failed: {failure.value}")
        self._replace(lambda: True, failure)
        return True

    def _is_exhausted(self, without: Attempt | None = None) -> bool:
        """There is no connection left of which an answer is to be expected."""
        return all(attempt.is_exhausted for attempt in self._attempts if attempt is not without)

    def _fail_if_exhausted(self) -> None:
        """An error is better than to wait for ever for a connection that had its time."""
        if self._redial_error is not None and self._is_exhausted():
            self.inbox.put_nowait(self._redial_error)

    def _drop(self, attempt: Attempt) -> None:
        self._attempts.remove(attempt)
        attempt.connection.detach()
        if attempt.is_fresh:
            self._pool.discard(attempt.connection, Reason.FAILED)
        else:
            self._pool.evict(attempt.connection)

    # Replacing

    def _replace(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        """Begins to dial a replacement, if none has been dialled for this utterance."""
        if self._redialling is None:
            redial = self._send_again(is_wanted, failure)
            self._redialling = self._supervisor.spawn(redial, name="xai_pool_patch.redial")

    async def _send_again(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        try:
            acquired = await self._redial()
        except Exception as error:
            self._has_redialled = True
            self._redial_error = error
            self._pool.metrics.replay_failed(error, failure.value)
            self._fail_if_exhausted()
            return
        if not self._is_exhausted() and not is_wanted():
            # The first connection has shown life meanwhile.
            self._redialling = None
            self._pool.release(acquired.connection)
            return
        self._has_redialled = True
        attempt = self._begin(Attempt(acquired.connection, True, acquired.waited, failure))
        with contextlib.suppress(OSError):  # then its reader has heard of its end
            await self._catch_up(attempt)

    def _end_replay(self, *, helped: bool) -> None:
        if self._replays_unanswered:
            self._replays_unanswered = False
            self._first_audio.end_replay(helped=helped)

    def _stop_watching(self) -> None:
        for patience in self._patience:
            patience.stop()
        self._patience.clear()

    def _stop_redialling(self) -> None:
        if self._redialling is not None:
            self._redialling.cancel()


def _failure_in(attempt: Attempt, message: aiohttp.WSMessage, type_: str) -> Failure | None:
    if message.type in ENDINGS:
        return Failure.ENDED
    utterance = attempt.connection.utterance
    if utterance.stage is Stage.DIRTY and type_ in ("audio.done", "audio.clear"):
        # Before any audio of an utterance with words: an answer to something else.
        return Failure.OUT_OF_TURN
    if type_ == "error" and (utterance.has_words or attempt.asked_at is None):
        return Failure.ERROR
    if type_ == UNREADABLE and message.type is WSMsgType.TEXT:
        return Failure.UNREADABLE
    return None


def _is_mute(attempt: Attempt) -> bool:
    """It is in doubt, and does not answer the PING that asks for a sign of life either."""
    connection = attempt.connection
    if attempt.doubted_at is None or connection.round_trip is None:
        return False
    return connection.last_heard < attempt.doubted_at < _now() - LONGEST_PROBE


def _now() -> float:
    return asyncio.get_running_loop().time()
