"""Leases connections to the plugin's TTS instances, whichever way they come to ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import aiohttp
from livekit.agents import APIConnectionError, APIError, get_job_context

from .connection import Connection
from .delivery import Delivery
from .dialler import dialler_of, key_of, with_status
from .lease import Lease
from .plugin import Shape
from .pool import (
    Acquired,
    AcquireTimeoutError,
    DialFailedError,
    Pool,
    PoolClosedError,
    Reason,
)
from .shared import Connect, LoopPools, Registry
from .telemetry.log import Event, in_ms, tell
from .telemetry.stats import Tally

NETWORK_ERRORS = (aiohttp.ClientError, APIError, OSError, asyncio.TimeoutError)
"""What the plugin's connect raises when the network or the server is at fault."""


class Turn:
    """One run of the plugin's `_run_ws`: one utterance, on one lease at a time.

    Args:
        stream: whose; None if somebody asks for a connection outside of any.

    Attributes:
        waited: seconds waited for the connection that is heard.
        reused: it was there when asked for.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        self.waited = 0.0
        self.reused = False
        self._reporting = [stream, *(outer() for outer in _synthesis.get())]
        self._tally = Tally()
        self._lease: Lease | None = None

    def begin(self, lease: Lease, tally: Tally) -> None:
        self.end(Reason.ERROR)  # of a subclass that connects more than once
        self._lease = lease
        self._tally = tally

    def acquired(self, waited: float, *, reused: bool) -> None:
        self.note(waited, reused=reused)
        self._tally.begun(waited, reused=reused)
        if not reused:
            self._mark("waited", wait_ms=in_ms(waited))

    def replaced(self, waited: float, reason: str) -> None:
        self.note(waited)
        self._tally.replaced(waited)
        self._mark("replaced", reason=reason, wait_ms=in_ms(waited))

    def note(self, waited: float, *, reused: bool = False) -> None:
        self.waited, self.reused = waited, reused
        for stream in filter(None, self._reporting):
            # Where livekit-agents takes it from for its TTSMetrics.
            stream._acquire_time = waited
            stream._connection_reused = reused

    def _mark(self, event: str, **attributes: str | float) -> None:
        """On the stream's own span: the pool's tasks, which notice what happens, have none."""
        span = getattr(self.stream, "_tts_request_span", None)
        if span is not None:
            span.add_event(f"xai_pool_patch.{event}", attributes)

    def end(self, cut_off: Reason | None) -> None:
        if self._lease is not None:
            self._lease.end(cut_off)


_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("xai_pool_patch", default=None)
current_turn = _turn.get

_synthesis: contextvars.ContextVar[Sequence[weakref.ref[Any]]] = contextvars.ContextVar(
    "xai_pool_patch.synthesis", default=()
)
"""The stream of a `TTS.synthesize()`, for the stream that does its work in its task."""


class Leasing:
    """What the plugin asks of the pools of one installation. Fails open.

    Args:
        registry: the pools.
        shape: how the plugin comes by its connections.
        connect: finds the plugin's own `TTS._connect_ws`, as a plain function.
    """

    def __init__(self, registry: Registry, shape: Shape, connect: Callable[[], Any]) -> None:
        self._registry = registry
        self._shape = shape
        self._connect = connect

    @property
    def has_failed(self) -> bool:
        return self._registry.has_failed

    @contextlib.contextmanager
    def turn_of(self, stream: Any) -> Iterator[Turn]:
        turn = Turn(stream)
        token = _turn.set(turn)
        cut_off: Reason | None = Reason.ERROR
        try:
            yield turn
            cut_off = None
        except asyncio.CancelledError:
            cut_off = Reason.INTERRUPTED
            raise
        finally:
            _turn.reset(token)
            with self._guarded("giving back"):
                turn.end(cut_off)

    @contextlib.contextmanager
    def synthesis(self) -> Iterator[list[weakref.ref[Any]]]:
        """Takes a stream that is made in here, whose metrics are to tell what another one did."""
        streams: list[weakref.ref[Any]] = []
        token = _synthesis.set(streams)
        try:
            yield streams
        finally:
            _synthesis.reset(token)

    async def connect(
        self, turn: Turn, tts: Any, timeout: float, opts: Any, otherwise: Callable[[], Any]
    ) -> Any:
        """A lease for that turn, or what the plugin would have used without the patch.

        Args:
            opts: the options to speak with; None for the TTS's current ones.
            otherwise: the plugin's own way to a connection.
        """
        if self.has_failed:
            return await otherwise()
        try:
            return await self._lease(turn, tts, timeout, opts)
        except NETWORK_ERRORS:
            raise
        except Exception as error:
            fault = error
        began = asyncio.get_running_loop().time()
        ws = await otherwise()
        turn.note(asyncio.get_running_loop().time() - began)
        # Had the plugin failed as well, the fault would not be the pool's.
        if not isinstance(fault, PoolClosedError):
            self._registry.fail("connecting", fault)
        return ws

    def prewarm(self, tts: Any) -> None:
        if not has_loop():
            tell(Event.PREWARM_SKIPPED, reason="no event loop is running")
            return
        try:
            tts._ensure_session()
        except RuntimeError:
            tell(Event.PREWARM_SKIPPED, reason="there is no HTTP session outside a job")
            return
        with self._guarded("prewarm"):
            self._use(self._registry.here(), tts).prewarm()

    def follow(self, tts: Any) -> None:
        """The TTS has other options now: warms what it speaks with next, if it speaks at all."""
        if not has_loop():
            return
        with self._guarded("update_options"):
            pools = self._registry.here()
            if pools.knows(tts):
                self._use(pools, tts)

    async def closing(self, tts: Any, close: Callable[[], Awaitable[Any]]) -> None:
        """Closes the TTS and the pools that nobody else uses."""
        # Before its streams are closed, lest each of them calls for a replacement; and again
        # afterwards, for what they may have begun meanwhile.
        ended = self._leave(tts)
        try:
            await close()
        finally:
            ended += self._leave(tts)
        await asyncio.gather(*(pool.aclose() for pool in ended))

    def _leave(self, tts: Any) -> list[Pool[Connection]]:
        with self._guarded("aclose"):
            return self._registry.here().leave(tts)
        return []

    @contextlib.contextmanager
    def _guarded(self, deed: str) -> Iterator[None]:
        """A fault of the pool's own must not become one of the agent's."""
        try:
            yield
        except Exception as fault:
            self._registry.fail(deed, fault)

    async def _lease(self, turn: Turn, tts: Any, timeout: float, opts: Any) -> Lease:
        pools = self._registry.here()
        pool = self._use(pools, tts)
        tally = pools.tally(tts)  # the TTS may have left by the time there is a connection
        if opts is not None:
            pool = pools.visit(tts, key_of(tts, opts), lambda: self._dialler(pools, tts, opts))
        acquired = await _acquire(pool, timeout)
        lease = Lease(
            Delivery(
                acquired,
                pool,
                redial=lambda: _acquire(pool, timeout, fresh=True),
                first_audio_timeout=self._registry.options.first_audio_timeout,
                on_replaced=turn.replaced,
            )
        )
        turn.begin(lease, tally)
        turn.acquired(acquired.waited, reused=acquired.reused)
        return lease

    def _use(self, pools: LoopPools, tts: Any) -> Pool[Connection]:
        self._end_with_job(pools)
        opts = tts._opts
        return pools.use(tts, key_of(tts, opts), lambda: self._dialler(pools, tts, opts))

    def _end_with_job(self, pools: LoopPools) -> None:
        """Closes the pools before the job closes its HTTP session: nothing calls `TTS.aclose()`."""
        try:
            job = get_job_context()
        except RuntimeError:  # not in a job
            return
        if pools.is_first_use_by(job):
            job.add_shutdown_callback(pools.aclose)

    def _dialler(self, pools: LoopPools, tts: Any, opts: Any) -> Connect:
        connect = self._connect()
        return dialler_of(connect, tts, opts, shape=self._shape, heartbeat=pools.heartbeat)


def has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _acquire(
    pool: Pool[Connection], timeout: float, *, fresh: bool = False
) -> Acquired[Connection]:
    """Raises what the plugin's own connect would have raised."""
    try:
        return await pool.acquire(timeout, fresh=fresh)
    except DialFailedError as failure:
        error = failure.error
    except AcquireTimeoutError as late:
        raise APIConnectionError("failed to connect to xAI") from late
    # Out here no other error becomes its context. What the plugin has hidden there carries headers.
    if error.__suppress_context__:
        error.__context__ = None
    raise with_status(error) from error.__cause__
