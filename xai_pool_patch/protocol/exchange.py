"""Carries an utterance over one connection, and once over another if the first one fails.

An idle connection may be dead before anything shows it. If a reused connection fails before it has
answered, the exchange gives it up, dials a fresh one and replays the utterance on it, once. From
the first audio on, and on a fresh connection from the start, everything goes to the plugin as it
is, failures included.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from ..pool.entries import Acquired, Outcome
from ..pool.pool import Pool
from ..pool.soft_timeout import SoftTimeout
from .connection import DATA, Connection
from .inbox import Inbox
from .utterance import UNREADABLE, Stage, parsed


class Failure(enum.Enum):
    """Why an exchange replayed its utterance. Log and metrics use these values."""

    NOT_SENT = "send failed"
    ENDED = "ended by the peer"
    NO_PONG = "no sign of life"
    ERROR = "error frame"
    UNREADABLE = "unreadable frame"
    OUT_OF_TURN = "answer out of turn"


OF_THE_CONNECTION = {Failure.NOT_SENT, Failure.ENDED, Failure.NO_PONG}
"""Other connections of the same age most likely have failed, too. The other failures may be the
text's, or the server's with this one connection."""


@dataclass(eq=False)
class Exchange:
    """Carries the utterance of one lease.

    Attributes:
        inbox: what the plugin has not received yet.
        connection: carries the utterance, or was the last to carry it.
    """

    acquired: Acquired[Connection]
    """The connection to begin with."""
    pool: Pool[Connection]
    """Where the connections come from and go back to."""
    acquire_fresh: Callable[[], Awaitable[Acquired[Connection]]]
    """Dials, and returns the new connection."""
    on_replayed: Callable[[float, str], None]
    """Called when the utterance is replayed, with the seconds that it waited for the connection and
    the reason."""

    def __post_init__(self) -> None:
        self.inbox = Inbox()
        self._frames: list[tuple[str, tuple[Any, ...]]] = []
        """What the plugin sent: the method of the WebSocket, and its arguments."""
        self._may_replay = not self.acquired.fresh
        self._timer: SoftTimeout | None = None
        self._replaying: asyncio.Task[None] | None = None
        self._carrier: Connection | None
        """None while a replay is dialling, and when no connection is left."""
        self._sender: Connection | None = None
        """What frames are being sent on."""
        self._begin(self.acquired.connection)

    def __repr__(self) -> str:
        state = "may replay" if self._may_replay else "replaying" if self.is_replaying else "heard"
        return f"<Exchange {state} {self.connection!r}>"

    @property
    def is_replaying(self) -> bool:
        return self._replaying is not None and not self._replaying.done()

    @property
    def is_over(self) -> bool:
        """Nothing more will come into the inbox."""
        if self._may_replay or self.is_replaying:  # the next send fails, and begins a replay
            return False
        return self._carrier is None or self._carrier.reader.done()

    async def send(self, method: str, *args: Any) -> None:
        """Send a frame by that method of the WebSocket, once those before it are sent.

        Raises:
            OSError: the WebSocket raised it, and no other connection can carry the utterance.
        """
        self._frames.append((method, args))
        if self._carrier is not None:
            await self._catch_up(self._carrier)

    def end(self, outcome: Outcome) -> None:
        """Give the connection back to the pool. Never waits."""
        self._stop()
        if self._carrier is not None:
            self._carrier = None
            self.connection.detach()
            if self.connection.is_given_away:
                self.connection.close()
            else:
                self.pool.give_back(self.connection, outcome)

    def give_away(self) -> None:
        """Leave the connection to the application, which goes on using this exchange."""
        self._stop()
        self._may_replay = False
        self.connection.is_given_away = True
        self.pool.give_away(self.connection)

    # Sending

    def _begin(self, connection: Connection) -> None:
        self.connection = self._carrier = connection
        self._sent = 0
        """How many of the frames have been sent on it."""
        connection.sink = functools.partial(self._hear, connection)

    async def _catch_up(self, connection: Connection) -> None:
        """Send what has not been sent on this connection yet, in order."""
        if self._sender is connection:
            # The plugin's send() and the replay may both be here. The first one also sends the
            # frames that the plugin adds in the meantime. Two senders would mix up their order.
            return
        self._sender = connection
        try:
            while connection is self._carrier and self._sent < len(self._frames):
                await self._send_next(connection)
        except OSError:
            if connection is self._carrier and not self._replay_if_possible(Failure.NOT_SENT):
                raise
        finally:
            if self._sender is connection:  # else it failed, and another carries the utterance
                self._sender = None
        if connection is self._carrier and not self._may_replay:
            self._frames.clear()
            self._sent = 0

    async def _send_next(self, connection: Connection) -> None:
        if self._sent == 0 and self._may_replay:
            await connection.probe(functools.partial(self._replay_if_possible, Failure.NO_PONG))
            if connection is not self._carrier:
                return
        method, args = self._frames[self._sent]
        # Before the await: a send that is cancelled may have left, and is not sent twice.
        self._sent += 1
        type_ = connection.utterance.sent(args[0])
        if type_ == "text.done" and self._may_replay:
            timeout = self.pool.options.answer_timeout
            self._timer = SoftTimeout(self.pool.supervisor, timeout, self._not_answered)
        await getattr(connection.ws, method)(*args)

    def _not_answered(self) -> None:
        """The connection answers PINGs, and its session is dead: LiveKit retries on a fresh one."""
        if self._may_replay:
            self._give_up(listen=False, with_others=True)
            self.inbox.put(asyncio.TimeoutError())

    # Hearing

    def _hear(self, connection: Connection, message: aiohttp.WSMessage, type_: str) -> None:
        if connection is not self._carrier:
            return
        if self._may_replay:
            failure = _failure_in(connection, message, type_)
            if failure is not None and not (failure is Failure.ERROR and self._is_wordless()):
                self._replay_if_possible(failure)
                return
            if failure is not None or type_.startswith("audio."):
                self._may_replay = False
                self._stop()
        self.inbox.put(message)

    def _is_wordless(self) -> bool:
        """Whether the whole text is sent and has nothing to speak: an error is its answer then."""
        sent = [parsed(args[0]) for _, args in self._frames]
        spoken = "".join(str(each.get("delta", "")) for each in sent)
        is_whole = any(each.get("type") == "text.done" for each in sent)
        return is_whole and not any(map(str.isalnum, spoken))

    # Replaying

    def _replay_if_possible(self, failure: Failure) -> bool:
        """Go on with a fresh connection. False if the caller must report the failure."""
        if not self._may_replay:
            return False
        self._give_up(listen=failure is Failure.NO_PONG, with_others=failure in OF_THE_CONNECTION)
        replay = self._replay(failure)
        self._replaying = self.pool.supervisor.spawn(replay, name="xai_pool_patch.replay")
        return True

    def _give_up(self, *, listen: bool, with_others: bool) -> None:
        self._may_replay = False
        self._stop()
        self._carrier = None
        self.connection.detach()
        self.pool.evict(self.connection, listen=listen, with_others=with_others)

    async def _replay(self, failure: Failure) -> None:
        try:
            acquired = await self.acquire_fresh()
        except Exception as error:
            self.pool.metrics.replay_failed(error=error, reason=failure.value)
            self.inbox.put(error)
            return
        self._begin(acquired.connection)
        self.pool.metrics.replayed(acquired.waited, failure.value)
        self.on_replayed(acquired.waited, failure.value)
        with contextlib.suppress(OSError):  # the connection's reader reports its end
            await self._catch_up(acquired.connection)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()
        if self._replaying is not None:
            self._replaying.cancel()


def _failure_in(connection: Connection, message: aiohttp.WSMessage, type_: str) -> Failure | None:
    """Why the first answer of a reused connection is none to this utterance."""
    if message.type not in DATA:
        return Failure.ENDED
    if type_.startswith("audio."):
        is_of_another = type_ != "audio.delta" and connection.utterance.stage is Stage.DIRTY
        return None if connection.is_in_step and not is_of_another else Failure.OUT_OF_TURN
    if type_ == "error":
        return Failure.ERROR
    if type_ == UNREADABLE and message.type is WSMsgType.TEXT:
        return Failure.UNREADABLE
    return None
