"""Provides the plugin's TTS instances with connections from the shared pools."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from livekit.agents import APIConnectionError, get_job_context

from ..manager import Connect, PoolManager, Registry
from ..pool.backoff import FailureKind
from ..pool.pool import (
    Acquired,
    AcquireTimeoutError,
    DialFailedError,
    Pool,
    PoolClosedError,
    Reason,
)
from ..protocol.connection import Connection
from ..protocol.exchange import Exchange
from ..protocol.lease import NETWORK_ERRORS, Lease
from ..telemetry.log import LogEvent, harmless, in_ms, log_event
from ..telemetry.usage import UsageStats
from .connector import Connector, key_of, with_status
from .conversation import Conversation, current_conversation
from .releases import Shape

T = TypeVar("T")

ROOM_TIMEOUT = 1.0
"""Seconds that a refused caller waits for the server to answer the Close frame of an idle
connection, so that its session is free."""


class Turn:
    """One run of the plugin's `_run_ws`: one utterance, on one lease at a time.

    Args:
        stream: the stream that runs; None if somebody asks for a connection outside of a stream.

    Attributes:
        waited: seconds that the turn waited for the connection that is heard.
        reused: the connection was ready when the turn asked for it.
        pools: the pools of the turn's event loop; None until the turn asks for a connection.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        self.waited = 0.0
        self.reused = False
        self._reporting = [stream, _reporting_stream()]
        self._usage = UsageStats()
        self._lease: Lease | None = None
        self.pools: PoolManager | None = None

    def begin(self, lease: Lease, pools: PoolManager, usage: UsageStats) -> None:
        self.end(Reason.FAILED)  # a subclass may connect more than once
        self._lease = lease
        self._usage = usage
        pools.leases.add(lease)

    def end(self, cut_off: Reason | None) -> None:
        if self._lease is not None and self.pools is not None:
            # First, so that a fault in `Lease.end` leaves nobody who would keep the socket open.
            self.pools.leases.discard(self._lease)
            self._lease.end(cut_off)

    async def closed(self) -> None:
        """If the job is over, close what is open, and wait for it: nothing would do so later."""
        if self.pools is not None and self.pools.is_over(_job()):
            await self.pools.aclose()

    @harmless
    def acquired(self, waited: float, *, reused: bool) -> None:
        self.note(waited, reused=reused)
        self._usage.begun(waited, reused=reused)
        if not reused:
            self._mark("waited", wait_ms=in_ms(waited))

    @harmless
    def replayed(self, waited: float, reason: str) -> None:
        self.note(waited)
        self._usage.replaced(waited)
        self._mark("replayed", reason=reason, wait_ms=in_ms(waited))

    @harmless
    def note(self, waited: float, *, reused: bool = False) -> None:
        self.waited, self.reused = waited, reused
        for stream in filter(None, self._reporting):
            # livekit-agents reads these two for its TTSMetrics.
            stream._acquire_time = waited
            stream._connection_reused = reused

    def _mark(self, event: str, **attributes: str | float) -> None:
        """Add an event to the stream's span. The pool's own tasks run outside of any span."""
        span = getattr(self.stream, "_tts_request_span", None)
        if span is not None:
            span.add_event(f"xai_pool_patch.{event}", attributes)


_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("xai_pool_patch", default=None)
current_turn = _turn.get


# Weak, since a task or timer that is started in this context may live as long as a connection.
_reporting: contextvars.ContextVar[weakref.ref[Any] | None] = contextvars.ContextVar(
    "xai_pool_patch.reporting", default=None
)


def report_on(stream: Any) -> None:
    """Make the turns of this task, and of the tasks it starts, report on that stream, too."""
    _reporting.set(weakref.ref(stream))


def _reporting_stream() -> Any:
    reference = _reporting.get()
    return reference() if reference is not None else None


class ConnectionProvider:
    """Does for the plugin what the wrappers replace. Fails open.

    Args:
        registry: the pools of the installation.
        shape: how the plugin gets its connections.
        connect: see `Connector`.
    """

    def __init__(self, registry: Registry, shape: Shape, connect: Callable[..., Any]) -> None:
        self._registry = registry
        self._shape = shape
        self._connect = connect

    @property
    def has_failed(self) -> bool:
        return self._registry.has_failed

    def fail(self, operation: str, fault: Exception) -> None:
        """Report a fault of the patch. From here on the plugin works as if it were not patched."""
        self._registry.fail(operation, fault)

    def attempt(self, operation: str, do: Callable[..., T], *args: Any) -> T | None:
        """Call a function of ours. Its exception is a fault, and does not reach the agent."""
        try:
            return do(*args)
        except Exception as fault:
            self.fail(operation, fault)
            return None

    async def attempt_to_wait(
        self, operation: str, wait: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        """Do the same as `attempt` with a coroutine function."""
        try:
            await wait(*args)
        except Exception as fault:
            self.fail(operation, fault)

    @contextlib.asynccontextmanager
    async def turn(self, stream: Any) -> AsyncIterator[Turn]:
        """The turn that runs in this block. The end of the block ends its lease."""
        turn = Turn(stream)
        token = _turn.set(turn)
        cut_off = None
        try:
            yield turn
        except asyncio.CancelledError:
            cut_off = Reason.INTERRUPTED
            raise
        except BaseException:
            cut_off = Reason.FAILED
            raise
        finally:
            _turn.reset(token)
            self.attempt("ending a turn", turn.end, cut_off)
            await self.attempt_to_wait("closing", turn.closed)

    async def connect(
        self, turn: Turn, tts: Any, timeout: float, opts: Any, fallback: Callable[[], Any]
    ) -> Any:
        """A lease for the turn; after a fault, what the plugin would have used without the patch.

        Args:
            opts: the options to speak with; None for the TTS's current ones.
            fallback: the plugin's own way to a connection.
        """
        if self.has_failed:
            return await fallback()
        try:
            return await self._lease(turn, tts, timeout, opts)
        except NETWORK_ERRORS:
            raise
        except Exception as error:
            fault = error
        began = asyncio.get_running_loop().time()
        ws = await fallback()
        turn.note(asyncio.get_running_loop().time() - began)
        # Not before the fallback: if that fails too, the patch is not the cause.
        if not isinstance(fault, PoolClosedError):
            self.fail("connecting", fault)
        return ws

    def prewarm(self, tts: Any) -> None:
        if self.has_failed:
            return
        if not has_loop():
            log_event(LogEvent.PREWARM_SKIPPED, reason="no event loop is running")
            return
        try:
            tts._ensure_session()
        except RuntimeError:
            log_event(LogEvent.PREWARM_SKIPPED, reason="there is no HTTP session outside a job")
            return
        pools = self._registry.here()
        if not pools.is_over(_job()):
            self._use(pools, tts).prewarm()
        conversation = current_conversation()
        if conversation is not None:
            conversation.tts = tts  # of an agent that takes over, and has not spoken yet

    def follow(self, tts: Any) -> None:
        """Warm the pool of the TTS's new options, if the TTS has used a pool before."""
        if has_loop() and not self.has_failed:
            self._use_again(tts)

    def expect(self, conversation: Conversation, tts: Any) -> bool:
        """Has a connection ready for a reply that is to come. False if that TTS is not in use."""
        pool = self._use_again(tts)
        if pool is not None:
            conversation.expect_at(pool)
        return pool is not None

    def _use_again(self, tts: Any) -> Pool[Connection] | None:
        """The pool of a TTS that has used one before; None for any other."""
        pools = self._registry.here()
        is_in_use = pools.knows(tts) and not pools.is_over(_job())
        return self._use(pools, tts) if is_in_use else None

    async def close(self, tts: Any, close: Callable[[], Awaitable[Any]]) -> None:
        """Close the TTS, and the pools that no other TTS uses."""
        # Before the TTS closes its streams: each stream that ends a lease would make the pool dial
        # a replacement. And again afterwards, since a stream may have used a pool in the meantime.
        ended = self.attempt("aclose", self._leave, tts) or []
        try:
            await close()
        finally:
            ended += self.attempt("aclose", self._leave, tts) or []
        await self.attempt_to_wait("aclose", self._ended, ended)

    def _leave(self, tts: Any) -> list[Pool[Connection]]:
        return self._registry.here().unregister(tts)

    async def _ended(self, pools: Sequence[Pool[Connection]]) -> None:
        """Wait until these pools have closed their connections."""
        await asyncio.gather(*(pool.aclose() for pool in pools))
        await self._registry.here().closed()

    async def _lease(self, turn: Turn, tts: Any, timeout: float, opts: Any) -> Lease:
        pools = turn.pools = self._registry.here()
        pool = self._use(pools, tts)
        usage = pools.usage(tts)  # now, since the TTS may be closed before the connection is there
        if opts is not None:
            pool = pools.pool_for(tts, key_of(tts, opts), lambda: self._connector(pools, tts, opts))
        conversation = current_conversation()

        def acquire(*, fresh: bool = False) -> Awaitable[Acquired[Connection]]:
            return _acquire(pools, pool, tts._api_key, timeout, fresh=fresh, caller=conversation)

        acquired = await acquire()
        if conversation is not None:
            conversation.speaks(tts, pool)
        if self.has_failed:  # since the pool handed out this connection
            raise PoolClosedError("the pool failed")
        exchange = Exchange(
            acquired,
            pool,
            frames=[],
            supervisor=pools.supervisor,
            acquire_fresh=lambda: acquire(fresh=True),
            first_audio=pools.first_audio,
            on_replayed=turn.replayed,
        )
        lease = Lease(
            exchange, pools.supervisor, connect=lambda: self._plugins_own(tts, timeout, opts)
        )
        turn.begin(lease, pools, usage)
        turn.acquired(acquired.waited, reused=acquired.reused)
        return lease

    def _use(self, pools: PoolManager, tts: Any) -> Pool[Connection]:
        job = _job()
        if job is not None and pools.is_first_use_by(job):
            # Nothing calls `TTS.aclose()` when a job ends.
            job.add_shutdown_callback(lambda: pools.end_with(job))
        opts = tts._opts
        take = pools.pool_for if pools.is_over(job) else pools.register
        return take(tts, key_of(tts, opts), lambda: self._connector(pools, tts, opts))

    def _plugins_own(self, tts: Any, timeout: float, opts: Any) -> Any:
        """Open a WebSocket with the plugin's own connect."""
        if self._shape is Shape.TAKES_OPTIONS:
            return self._connect(tts, timeout, opts if opts is not None else tts._opts)
        return self._connect(tts, timeout)

    def _connector(self, pools: PoolManager, tts: Any, opts: Any) -> Connect:
        return Connector(self._connect, tts, opts, shape=self._shape, heartbeat=pools.heartbeat)


def _job() -> Any:
    """The job that the running code belongs to; None outside of a job."""
    try:
        return get_job_context()
    except RuntimeError:
        return None


def has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _acquire(
    pools: PoolManager,
    pool: Pool[Connection],
    api_key: str,
    timeout: float,
    *,
    fresh: bool,
    caller: Conversation | None,
) -> Acquired[Connection]:
    """Acquire a connection. Raises what the plugin's own connect would have raised."""
    ask = functools.partial(pool.acquire, fresh=fresh, caller=caller)
    try:
        return await _ask_or_make_room(ask, pools, api_key, timeout)
    except DialFailedError as failure:
        error = failure.error
    except AcquireTimeoutError as late:
        raise APIConnectionError("failed to connect to xAI") from late
    if pool.is_defunct:
        raise APIConnectionError("the HTTP session is closed")
    # The plugin turns every exception of its connect into a network error. If it hides a fault, the
    # fallback may still work, so the fault itself is raised.
    hidden = error.__cause__ or error.__context__
    if isinstance(hidden, Exception) and not isinstance(hidden, NETWORK_ERRORS):
        raise hidden
    # Outside of the `except`, so that no other error becomes the context of this one. A context
    # that the plugin has suppressed is removed: it holds the headers of the request.
    if error.__suppress_context__:
        error.__context__ = None
    raise with_status(error) from error.__cause__


async def _ask_or_make_room(
    ask: Callable[[float], Awaitable[Acquired[Connection]]],
    pools: PoolManager,
    api_key: str,
    timeout: float,
) -> Acquired[Connection]:
    """Ask again after a refusal for the limit, if this process gives sessions back."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    try:
        return await ask(timeout)
    except DialFailedError as failure:
        if failure.kind is not FailureKind.RATE_LIMITED:
            raise
        try:
            closing = pools.make_room(api_key)
        except Exception as fault:
            # As an error of this dial it would be hidden behind the refusal, and come with each.
            pools.supervisor.on_fault("making room", fault)
            raise failure from None
        if not closing:
            raise
    await asyncio.wait(closing, timeout=ROOM_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    return await ask(max(0.0, deadline - loop.time()))
