"""Provides the plugin's TTS instances with connections from the shared pools."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from livekit.agents import APIConnectionError, get_job_context

from ..manager import UNEXPLAINED, PoolManager
from ..pool.backoff import FailureKind
from ..pool.entries import Acquired, Outcome
from ..pool.pool import AcquireTimeoutError, DialFailedError, Pool, PoolClosedError
from ..protocol.connection import Connection
from ..protocol.exchange import Exchange
from ..protocol.lease import Lease
from ..registry import Registry, running_loop
from ..telemetry.log import LogEvent, log_event
from .asking import Asking, with_status
from .conversation import Conversation, current_conversation
from .turn import Turn

_Ask = Callable[[float], Awaitable[Acquired[Connection]]]
"""Asks a pool for a connection, within a timeout."""

ROOM_TIMEOUT = 1.0
"""Seconds that a refused caller waits for the server to answer the Close frame of an idle
connection, so that its session is free."""


class ConnectionProvider:
    """Does for the plugin what the wrappers replace.

    Args:
        registry: the pools of the installation.
        asking: asks the TTS instances what they would connect to.
    """

    def __init__(self, registry: Registry, asking: Asking) -> None:
        self.registry = registry
        self._asking = asking
        self._left_alone: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        """The TTS instances that were found to be unlike the others, and why."""
        self._owners: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()
        """Of the TTS instances that share no connection, since they change how it speaks."""
        self._told: set[tuple[type, str]] = set()

    def serves(self, tts: Any, *, is_connecting: bool = False) -> bool:
        """Whether the pools serve this TTS. One with a connect of its own works as unpatched.

        Args:
            is_connecting: see `Asking.why_not`. Ahead of that, nothing may be dialled for a TTS
                that overrides `_connect_ws`, but its turns may use the pools.
        """
        if not self.registry.is_open:
            return False
        reason = self._left_alone.get(tts) or self._asking.why_not(tts, is_connecting=is_connecting)
        if reason is not None and (type(tts), reason) not in self._told:
            self._told.add((type(tts), reason))
            log_event(LogEvent.LEFT_ALONE, tts=type(tts).__qualname__, reason=reason)
        return reason is None

    def _leave_alone(self, tts: Any, reason: str) -> None:
        self._left_alone[tts] = reason
        self.serves(tts)  # which logs it

    # Turns

    async def lease(self, turn: Turn, tts: Any, timeout: float, opts: Any = None) -> Lease | None:
        """A lease for the turn; None if the plugin has to connect by itself.

        Args:
            opts: the options to speak with; None for the TTS's current ones.

        Raises:
            Exception: as the plugin's own connect does, if the network or the server fails.
        """
        try:
            keep = self.serves(tts)
            is_served = keep or self.serves(tts, is_connecting=True)
            lease = await self._lease(turn, tts, timeout, opts, keep) if is_served else None
        except PoolClosedError:
            return None
        except Exception as fault:
            self.registry.fail("connecting", fault)
            return None
        if isinstance(lease, BaseException):
            raise lease from lease.__cause__
        return lease

    async def _lease(
        self, turn: Turn, tts: Any, timeout: float, opts: Any, keep: bool
    ) -> Lease | BaseException | None:
        manager = turn.manager = self.registry.here()
        pool = self._use(manager, tts, opts, is_turn=True, keep=keep)
        if pool is None:
            return None
        # Now, since the TTS may be closed before the connection is there.
        turn.usage = manager.users[tts].usage
        conversation = current_conversation()
        ask = functools.partial(pool.acquire, caller=conversation)
        acquire = functools.partial(self._acquire, pool, tts, timeout, opts)
        acquired = await acquire(ask)
        if isinstance(acquired, BaseException):
            return acquired
        if conversation is not None:
            conversation.speaks(tts, pool)
        if self.registry.has_failed:  # since the pool handed out this connection
            return None
        exchange = Exchange(
            acquired,
            pool,
            acquire_fresh=lambda: _raise_errors(acquire(functools.partial(ask, fresh=True))),
            on_replayed=turn.replayed,
        )
        turn.end(Outcome.FAILED)  # a subclass may connect more than once
        lease = turn.lease = Lease(exchange, self.registry.fail)
        manager.leases.add(lease)
        turn.acquired(acquired.waited, reused=acquired.reused)
        return lease

    def end_turn(self, turn: Turn, tts: Any, outcome: Outcome) -> None:
        lease, manager = turn.lease, turn.manager
        if lease is None or manager is None:
            return
        conversation = current_conversation()
        if conversation is not None and conversation.is_closing:
            self.leave(manager, conversation)  # nothing is to be replaced
        if lease.was_configured and tts not in self._owners:
            self._owners[tts] = object()
            self.follow(tts)
        turn.end(outcome)

    async def close_if_over(self, turn: Turn) -> None:
        """If the job is over, close what is open, and wait for it: nothing would do so later."""
        try:
            if turn.manager is not None and turn.manager.is_over(_job()):
                await turn.manager.aclose()
        except Exception as fault:
            self.registry.fail("closing", fault)

    async def _acquire(
        self, pool: Pool[Connection], tts: Any, timeout: float, opts: Any, ask: _Ask
    ) -> Acquired[Connection] | BaseException:
        """A connection, or what the plugin's own connect would have raised."""
        make_room = functools.partial(self.registry.attempt, "making room", self.registry.make_room)
        try:
            return await ask_or_make_room(ask, timeout, make_room)
        except DialFailedError as failure:
            error = failure.error
        except AcquireTimeoutError:
            error = asyncio.TimeoutError()
        if pool.is_defunct:
            return APIConnectionError("the HTTP session is closed")
        # Outside of the `except`, so that no other error becomes the context of this one.
        raised = with_status(self._asking.error_for(tts, opts, error))
        if raised.__suppress_context__:
            raised.__context__ = None  # it holds the headers of the request
        return raised

    # Ahead of turns

    def prewarm(self, tts: Any) -> bool:
        """Dial in the background. False if the TTS has to do so by itself."""
        if running_loop() is None:
            log_event(LogEvent.PREWARM_SKIPPED, reason="no event loop is running")
        elif not self._asking.has_session(tts):
            log_event(LogEvent.PREWARM_SKIPPED, reason="there is no HTTP session outside a job")
        elif self.serves(tts):
            manager = self.registry.here()
            pool = None if manager.is_over(_job()) else self._use(manager, tts, None)
            if pool is not None:
                pool.prewarm()
            conversation = current_conversation()
            if conversation is not None:
                conversation.tts = tts  # of an agent that takes over, and has not spoken yet
        else:
            return False
        return True

    def follow(self, tts: Any) -> None:
        """Warm the pool of the TTS's new options, if the TTS has used a pool before."""
        if running_loop() is not None:
            self.registry.here().options_changed(tts)
            self._use_again(tts)

    def expect(self, conversation: Conversation, tts: Any) -> bool:
        """Has a connection ready for a reply that is to come. False if that TTS is not in use."""
        pool = self._use_again(tts)
        if pool is not None:
            conversation.expect_at(pool)
        return pool is not None

    def _use_again(self, tts: Any) -> Pool[Connection] | None:
        """The pool of a TTS that has used one before; None for any other."""
        manager = self.registry.here()
        is_in_use = tts in manager.users and not manager.is_over(_job()) and self.serves(tts)
        return self._use(manager, tts, None) if is_in_use else None

    def _use(
        self, manager: PoolManager, tts: Any, opts: Any, *, is_turn: bool = False, keep: bool = True
    ) -> Pool[Connection] | None:
        request = self._asking.request_of(tts, opts, self._owners.get(tts))
        if request is None:
            self._leave_alone(tts, "what it connects to cannot be known in advance")
            return None
        job = _job()
        if job is not None and job not in manager.jobs:
            manager.jobs[job] = False
            # Nothing calls `TTS.aclose()` when a job ends.
            job.add_shutdown_callback(lambda: manager.end_with(job))
        keep = keep and not manager.is_over(job)
        pool = manager.register(tts, request, is_turn=is_turn, keep=keep)
        if manager.users[tts].unexplained >= UNEXPLAINED:
            self._leave_alone(tts, "each turn asks for another connection")
            manager.unregister(tts)
            return None
        return pool

    # Ends

    async def close(self, tts: Any, close: Callable[[], Awaitable[Any]]) -> None:
        """Close the TTS, and the pools that no other TTS uses."""
        attempt = self.registry.attempt
        # Before the TTS closes its streams: each stream that ends a lease would make the pool dial
        # a replacement. And again afterwards, since a stream may have used a pool in the meantime.
        ended = attempt("aclose", self._unregister, tts) or []
        try:
            await close()
        finally:
            ended += attempt("aclose", self._unregister, tts) or []
        try:
            await asyncio.gather(*(pool.aclose() for pool in ended))
            await self.registry.here().wait_closed()
        except Exception as fault:
            self.registry.fail("aclose", fault)

    def leave(self, manager: PoolManager, conversation: Conversation) -> None:
        """A conversation is over: let go of what only its TTS instances used."""
        for tts in conversation.close():
            manager.unregister(tts)

    def _unregister(self, tts: Any) -> list[Pool[Connection]]:
        return self.registry.here().unregister(tts)


async def ask_or_make_room(
    ask: _Ask, timeout: float, make_room: Callable[[], Collection[asyncio.Future[Any]] | None]
) -> Acquired[Connection]:
    """Ask again after a refusal, if this process gives sessions back."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    try:
        return await ask(timeout)
    except DialFailedError as failure:
        if failure.kind is not FailureKind.REFUSED:
            raise
        closing = make_room()
        if not closing:
            raise
    await asyncio.wait(closing, timeout=ROOM_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    return await ask(max(0.0, deadline - loop.time()))


async def _raise_errors(
    acquiring: Awaitable[Acquired[Connection] | BaseException],
) -> Acquired[Connection]:
    acquired = await acquiring
    if isinstance(acquired, BaseException):
        raise acquired
    return acquired


def _job() -> Any:
    """The job that the running code belongs to; None outside of a job."""
    try:
        return get_job_context()
    except RuntimeError:
        return None
