"""Carries one utterance over one connection, and over a second one if the first fails.

An idle connection may be dead before anybody notices. If a reused connection fails before it has
answered, the exchange dials a fresh one and replays the utterance on it, once. The plugin hears
whichever connection answers first. From then on, and on a fresh connection from the start,
everything goes to the plugin as it is, failures included.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
from aiohttp import WSMsgType

from ..pool.pool import Acquired, Pool, Reason
from ..pool.round_trips import RoundTrips
from ..pool.soft_timeout import SoftTimeout
from ..pool.supervisor import Supervisor
from .connection import ENDINGS, Connection
from .first_audio import FirstAudio
from .utterance import UNREADABLE, Stage

PROBE = RoundTrips(4, at_least=0.25, at_most=1.5)
"""Time for a sign of life after the PING that leaves just ahead of an utterance's first text. After
half of it, the exchange begins to dial. So most of a handshake is over by the time the exchange
knows whether it needs the connection."""

LOOKS = 10
"""How often per `first_audio_timeout` an exchange whose first audio is late checks whether it may
replay the utterance, and whether it should give up."""


class Frame(NamedTuple):
    """A frame that the plugin sent: the method of the WebSocket, and its arguments."""

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
    """Why an exchange replayed its utterance. Log and metrics use these values."""

    NOT_SENT = "send failed"
    ENDED = "ended by the peer"
    ERROR = "error frame"
    UNREADABLE = "unreadable frame"
    OUT_OF_TURN = "answer out of turn"
    NO_PONG = "no sign of life"
    NO_ANSWER = "no answer"


@dataclass(eq=False)
class Attempt:
    """A connection that carries the utterance."""

    connection: Connection
    is_fresh: bool
    waited: float
    """Seconds that the utterance waited for this connection."""
    replay_reason: Failure | None = None
    """Why the utterance is replayed on this connection; None for the first one."""
    sent: int = 0
    """How many of the utterance's frames have been sent on this connection."""
    is_sending: bool = False
    silent_since: float | None = None
    """When an unanswered probe began. The connection is silent if it sent nothing since."""
    asked_at: float | None = None
    """When the whole text had been sent; time of the event loop."""
    doubted_at: float | None = None
    """When the answer began to take longer than it should."""
    is_overdue: bool = False
    """The time for an answer is over. One may still come, but nothing waits for it alone."""

    @property
    def is_exhausted(self) -> bool:
        """No answer is expected from this connection any more."""
        is_silent = (
            self.silent_since is not None and self.connection.last_heard <= self.silent_since
        )
        return is_silent or self.is_overdue


class Exchange:
    """Carries one utterance, over a second connection if the first, a reused one, fails.

    Args:
        acquired: the connection to begin with.
        pool: the pool that the connections come from and go back to.
        frames: what the plugin sends; grows by one before each `send`.
        supervisor: owns the tasks and timers.
        acquire_fresh: dials, and returns the new connection.
        first_audio: decides how long a reused connection may take to answer.
        on_replayed: called when the plugin hears a replay, with the seconds that the utterance
            waited for the connection and the reason.
    """

    def __init__(
        self,
        acquired: Acquired[Connection],
        pool: Pool[Connection],
        frames: list[Frame],
        *,
        supervisor: Supervisor,
        acquire_fresh: Callable[[], Awaitable[Acquired[Connection]]],
        first_audio: FirstAudio,
        on_replayed: Callable[[float, str], None],
    ) -> None:
        self.inbox: asyncio.Queue[aiohttp.WSMessage | Exception] = asyncio.Queue()
        self.frames = frames
        self._pool = pool
        self._supervisor = supervisor
        self._acquire_fresh = acquire_fresh
        self._first_audio = first_audio
        self._on_replayed = on_replayed
        self._attempts: list[Attempt] = []
        self._committed: Attempt | None = None
        """The attempt that is heard. While there is none, the utterance can be replayed."""
        self._has_spoken = False
        self._replaying: asyncio.Task[None] | None = None
        self._has_dialled = False
        """The dial for the replay is over. The replay may still be sending."""
        self._replays_unanswered = False
        """`FirstAudio` has allowed this exchange to replay an utterance that was not answered."""
        self._replay_error: Exception | None = None
        """Why the exchange could not replay the utterance, though it had to."""
        self._soft_timeouts: list[SoftTimeout] = []
        first = self._begin(Attempt(acquired.connection, acquired.fresh, acquired.waited))
        self.connection = first.connection
        if first.is_fresh:
            self._committed = first

    def __repr__(self) -> str:
        state = "heard" if self._committed else "unheard"
        replaying = " replaying" if self._replaying and not self._has_dialled else ""
        return f"<Exchange {state}{replaying} {[a.connection for a in self._attempts]}>"

    @property
    def is_over(self) -> bool:
        """Nothing more will come into the inbox."""
        return self._committed is not None and self._committed.connection.is_over

    @property
    def heard(self) -> Attempt | None:
        """The attempt whose audio the plugin has heard; None before the first audio."""
        return self._committed if self._has_spoken else None

    async def send(self) -> None:
        """Send the frames that have not been sent yet.

        Raises:
            OSError: the WebSocket raised it, and no other connection can carry the utterance.
        """
        for attempt in list(self._attempts):
            try:
                await self._catch_up(attempt)
            except OSError:
                if not self._go_on_without(attempt, Failure.NOT_SENT):
                    raise

    def end(self, cut_off: Reason | None) -> None:
        """Give the connections back to the pool. Never waits."""
        self._stop_watching()
        self._stop_replaying()
        self._end_replay(helped=False)
        for attempt in self._attempts:
            attempt.connection.detach()
            if attempt is self._committed and cut_off is None:
                self._pool.release(attempt.connection)
            elif cut_off is Reason.INTERRUPTED and self._replaying is None:
                self._pool.release_cut_off(attempt.connection)
            else:
                self._pool.discard(attempt.connection, cut_off or Reason.FAILED)
        self._attempts.clear()

    # Sending

    def _begin(self, attempt: Attempt) -> Attempt:
        self._attempts.append(attempt)
        attempt.connection.attach(functools.partial(self._hear, attempt))
        return attempt

    async def _catch_up(self, attempt: Attempt) -> None:
        """Send what has not been sent on this connection yet, in order."""
        if attempt.is_sending:
            # The plugin's send() and the replay may both be here. The first one also sends the
            # frames that the plugin adds in the meantime. Two senders would mix up their order.
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
                # Before the await: a send that is cancelled may have left, and must not be sent
                # twice over the same socket by a lease that steps aside.
                attempt.sent += 1
                await sending
        finally:
            attempt.is_sending = False

    async def _probe(self, attempt: Attempt) -> None:
        """Ask a reused connection for a sign of life, and replay if none comes in time."""
        connection = attempt.connection
        timeout = PROBE.seconds(connection.round_trip)
        if connection.round_trip is None:
            await connection.ping_as_fence(timeout)
            return
        began = _now()

        def is_silent() -> bool:
            return connection.last_heard <= began

        def doubt() -> None:
            if is_silent():
                self._start_replaying(is_silent, Failure.NO_PONG)

        def give_up() -> None:
            attempt.silent_since = began
            self._fail_if_exhausted()

        # Lean, no connection is dialled on suspicion: others may need the session.
        self._wait(timeout if self._pool.is_lean else timeout / 2, doubt)
        self._wait(timeout, give_up)
        await connection.ping_as_fence(timeout)

    def _watch(self, attempt: Attempt) -> None:
        """Once the whole text is sent, limit the time until a reused connection answers."""
        if attempt.connection.utterance.stage not in (Stage.AWAITING, Stage.EMPTY):
            return
        attempt.asked_at = _now()
        if self._committed is None and not attempt.is_fresh:
            self._wait(self._first_audio.replay_after, lambda: self._doubt(attempt))

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Call a function after that time, unless the plugin hears something first."""
        self._soft_timeouts.append(SoftTimeout(self._supervisor, seconds, then))

    def _doubt(self, attempt: Attempt) -> None:
        """Decide about a late answer: the session may be dead, or the server slow."""
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
        if waited >= self._first_audio.replay_after and self._replaying is None:
            self._replays_unanswered = self._first_audio.begin_replay()
            if self._replays_unanswered:
                self._start_replaying(lambda: True, Failure.NO_ANSWER)
        self._wait(self._first_audio.timeout / LOOKS, lambda: self._doubt(attempt))

    async def _ask_for_life(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):  # the connection's reader reports its end
            await connection.ping()

    def _give_up_waiting(self, attempt: Attempt) -> None:
        attempt.is_overdue = True
        self._start_replaying(lambda: True, Failure.NO_ANSWER)  # if `FirstAudio` made it wait
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
            # Last: if anything above raises, the lease steps aside and finds this message with the
            # connection (`Connection.unhandled`). In the inbox too, it would be heard twice.
            self.inbox.put_nowait(message)

    def _begin_to_speak(self, attempt: Attempt) -> None:
        self._has_spoken = True
        if attempt.asked_at is not None:
            self._first_audio.took(_now() - attempt.asked_at)

    def _commit(self, attempt: Attempt) -> None:
        self._committed = attempt
        self.connection = attempt.connection
        self._stop_watching()
        self._end_replay(helped=attempt.replay_reason is Failure.NO_ANSWER)
        for other in [other for other in self._attempts if other is not attempt]:
            self._drop(other)
        if attempt.replay_reason is not None:
            self._pool.metrics.replayed(attempt.waited, attempt.replay_reason.value)
            self._on_replayed(attempt.waited, attempt.replay_reason.value)
        else:
            self._stop_replaying()

    def _go_on_without(self, attempt: Attempt, failure: Failure) -> bool:
        """Drop a failed attempt. False if nothing is left: the caller must report the failure."""
        if attempt not in self._attempts:
            return True  # another call dropped the attempt while this one was sending
        if self._committed is not None:
            return False
        if self._is_exhausted(without=attempt) and (attempt.is_fresh or self._has_dialled):
            return False
        self._drop(attempt)
        if attempt.is_fresh:
            self._replay_error = ConnectionResetError(f"replay failed: {failure.value}")
        self._start_replaying(lambda: True, failure)
        return True

    def _is_exhausted(self, without: Attempt | None = None) -> bool:
        """No answer is expected from any connection, leaving out one if given."""
        return all(attempt.is_exhausted for attempt in self._attempts if attempt is not without)

    def _fail_if_exhausted(self) -> None:
        """Report why the utterance was not replayed, if no connection will answer.

        Otherwise the plugin would wait for ever.
        """
        if self._replay_error is not None and self._is_exhausted():
            self.inbox.put_nowait(self._replay_error)

    def _drop(self, attempt: Attempt) -> None:
        self._attempts.remove(attempt)
        attempt.connection.detach()
        if attempt.is_fresh:
            self._pool.discard(attempt.connection, Reason.FAILED)
        else:
            self._pool.evict(attempt.connection)

    # Replaying

    def _start_replaying(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        """Begin to dial for a replay, unless this utterance has been replayed already."""
        if self._replaying is None:
            replay = self._replay(is_wanted, failure)
            self._replaying = self._supervisor.spawn(replay, name="xai_pool_patch.replay")

    async def _replay(self, is_wanted: Callable[[], bool], failure: Failure) -> None:
        try:
            acquired = await self._acquire_fresh()
        except Exception as error:
            self._has_dialled = True
            self._replay_error = error
            self._pool.metrics.replay_failed(error, failure.value)
            self._fail_if_exhausted()
            return
        if not self._is_exhausted() and not is_wanted():
            # The first connection has sent something during the dial. A replay would make the
            # server generate the same audio twice.
            self._replaying = None
            self._pool.release(acquired.connection)
            return
        self._has_dialled = True
        attempt = self._begin(Attempt(acquired.connection, True, acquired.waited, failure))
        with contextlib.suppress(OSError):  # the connection's reader reports its end
            await self._catch_up(attempt)

    def _end_replay(self, *, helped: bool) -> None:
        if self._replays_unanswered:
            self._replays_unanswered = False
            self._first_audio.end_replay(helped=helped)

    def _stop_watching(self) -> None:
        for soft_timeout in self._soft_timeouts:
            soft_timeout.stop()
        self._soft_timeouts.clear()

    def _stop_replaying(self) -> None:
        if self._replaying is not None:
            self._replaying.cancel()


def _failure_in(attempt: Attempt, message: aiohttp.WSMessage, type_: str) -> Failure | None:
    if message.type in ENDINGS:
        return Failure.ENDED
    utterance = attempt.connection.utterance
    if utterance.stage is Stage.DIRTY and type_ in ("audio.done", "audio.clear"):
        # The utterance has words and has had no audio: this answers something else.
        return Failure.OUT_OF_TURN
    if type_ == "error" and (utterance.has_words or attempt.asked_at is None):
        return Failure.ERROR
    if type_ == UNREADABLE and message.type is WSMsgType.TEXT:
        return Failure.UNREADABLE
    return None


def _is_mute(attempt: Attempt) -> bool:
    """The answer is late, and the PONG of the PING that followed is late, too."""
    connection = attempt.connection
    if attempt.doubted_at is None or connection.round_trip is None:
        return False
    return connection.last_heard < attempt.doubted_at < _now() - PROBE.at_most


def _now() -> float:
    return asyncio.get_running_loop().time()
