"""What runs in place of the plugin's methods. `patch` decides where these are put."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import aiohttp
from livekit.agents import APIConnectionError, APIError

from .connection import Connection
from .delivery import Delivery
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
from .shared import Connect, Key, LoopPools, Registry
from .telemetry import log

NETWORK_ERRORS = (aiohttp.ClientError, APIError, OSError, asyncio.TimeoutError)
"""What the plugin's connect raises when the network or the server is at fault."""

NOT_IN_THE_URL = {"tokenizer"}
"""Options of the plugin that do not go to the server."""


class Turn:
    """One run of the plugin's `_run_ws`: one utterance, on one lease at a time."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lease: Lease | None = None

    def begin(self, lease: Lease) -> None:
        self.end(Reason.ERROR)  # of a subclass that connects more than once
        self._lease = lease

    def note(self, waited: float, *, reused: bool = False) -> None:
        """Where livekit-agents takes it from for its TTSMetrics."""
        self._stream._acquire_time = waited
        self._stream._connection_reused = reused

    def end(self, cut_off: Reason | None) -> None:
        if self._lease is not None:
            self._lease.end(cut_off)


_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("xai_pool_patch", default=None)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Wrappers:
    """The wrappers of one installation.

    There is none for `TTS._close_ws`: what it closes is the lease, which goes back to the pool
    when `_run_ws` is left. Only then is it known whether the utterance was finished or cut off.

    Args:
        registry: the pools.
        shape: how `TTS._connect_ws` is told what to connect for.
        connect: the plugin's own `TTS._connect_ws`, as found in the class.
    """

    def __init__(self, registry: Registry, shape: Shape, connect: Any) -> None:
        self._registry = registry
        self._shape = shape
        self._connect = connect

    async def run_ws(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        with self._turn_of(stream):
            return await wrapped(*args, **kwargs)

    async def connect_ws(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        turn = _turn.get()
        # Without a turn nobody would say how the utterance ended.
        if turn is None or self._registry.has_failed:
            return await wrapped(*args, **kwargs)
        try:
            return await self._lease(turn, tts, *args, **kwargs)
        except NETWORK_ERRORS:
            raise
        except Exception as error:
            fault = error
        began = asyncio.get_running_loop().time()
        ws = await wrapped(*args, **kwargs)
        turn.note(asyncio.get_running_loop().time() - began)
        # Had the plugin failed as well, the fault would not be the pool's.
        if not isinstance(fault, PoolClosedError):
            self._registry.fail("connecting", fault)
        return ws

    def prewarm(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        if not _has_loop():
            log().debug("prewarm skipped, no event loop is running")
            return
        try:
            tts._ensure_session()
        except RuntimeError:
            log().debug("prewarm skipped, there is no HTTP session outside a job")
            return
        with self._guarded("prewarm"):
            self._use(self._registry.here(), tts).prewarm()

    def update_options(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        if not _has_loop():
            return
        with self._guarded("update_options"):
            pools = self._registry.here()
            if pools.knows(tts):
                self._use(pools, tts)

    async def aclose(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        # Before its streams are closed, lest each of them calls for a replacement; and again
        # afterwards, for what they may have begun meanwhile.
        ended = self._leave(tts)
        try:
            await wrapped(*args, **kwargs)
        finally:
            ended += self._leave(tts)
        await asyncio.gather(*(pool.aclose() for pool in ended))

    def _leave(self, tts: Any) -> list[Pool[Connection]]:
        with self._guarded("aclose"):
            return self._registry.here().leave(tts)
        return []

    @contextlib.contextmanager
    def _turn_of(self, stream: Any) -> Iterator[None]:
        turn = Turn(stream)
        token = _turn.set(turn)
        cut_off: Reason | None = Reason.ERROR
        try:
            yield
            cut_off = None
        except asyncio.CancelledError:
            cut_off = Reason.INTERRUPTED
            raise
        finally:
            _turn.reset(token)
            with self._guarded("giving back"):
                turn.end(cut_off)

    @contextlib.contextmanager
    def _guarded(self, deed: str) -> Iterator[None]:
        """A fault of the pool's own must not become one of the agent's."""
        try:
            yield
        except Exception as fault:
            self._registry.fail(deed, fault)

    async def _lease(self, turn: Turn, tts: Any, timeout: float, opts: Any = None) -> Lease:
        pools = self._registry.here()
        pool = self._use(pools, tts)
        if opts is not None:
            pool = pools.visit(tts, _key(tts, opts), lambda: self._dialler(tts, opts))
        acquired = await _acquire(pool, timeout)
        lease = Lease(
            Delivery(
                acquired,
                pool,
                redial=lambda: _acquire(pool, timeout, fresh=True),
                first_audio_timeout=self._registry.options.first_audio_timeout,
                on_replaced=turn.note,
            )
        )
        turn.begin(lease)
        turn.note(acquired.waited, reused=acquired.reused)
        log().debug("acquired", reused=acquired.reused, waited_ms=round(acquired.waited * 1e3, 1))
        return lease

    def _use(self, pools: LoopPools, tts: Any) -> Pool[Connection]:
        return pools.use(tts, _key(tts, tts._opts), lambda: self._dialler(tts, tts._opts))

    def _dialler(self, tts: Any, opts: Any) -> Connect:
        heartbeat = self._registry.options.heartbeat
        view = _TTSView(tts._api_key, dataclasses.replace(opts), tts._ensure_session(), heartbeat)
        connect = self._connect.__get__(view, _TTSView)
        if self._shape is Shape.TAKES_OPTIONS:
            return functools.partial(connect, opts=view._opts)
        return connect  # type: ignore[no-any-return]


def _key(tts: Any, opts: Any) -> Key:
    options_type: Any = type(opts)
    options = tuple((name, getattr(opts, name)) for name in _names_in_url(options_type))
    return Key(tts._api_key, tts._ensure_session(), options)


@functools.cache
def _names_in_url(options_type: Any) -> tuple[str, ...]:
    names = (field.name for field in dataclasses.fields(options_type))
    return tuple(name for name in names if name not in NOT_IN_THE_URL)


async def _acquire(
    pool: Pool[Connection], timeout: float, *, fresh: bool = False
) -> Acquired[Connection]:
    """Raises what the plugin's own connect would have raised."""
    try:
        return await pool.acquire(timeout, fresh=fresh)
    except DialFailedError as failure:
        raise failure.error from failure.error.__cause__
    except AcquireTimeoutError as error:
        raise APIConnectionError("failed to connect to xAI") from error


class _TTSView:
    """What the plugin's `_connect_ws` sees as `self` when the pool dials.

    It holds the options of the moment, so that a later change does not turn a dial for one voice
    into a connection for another; and not the TTS, which may go while its pool serves others.
    """

    def __init__(
        self, api_key: str, opts: Any, session: aiohttp.ClientSession, heartbeat: float
    ) -> None:
        self._api_key = api_key
        self._opts = opts
        self._session = _SessionWithDefaults(session, autoping=False, heartbeat=heartbeat)

    def _ensure_session(self) -> Any:
        return self._session


class _SessionWithDefaults:
    """The plugin's HTTP session, with other defaults for the WebSockets it opens."""

    def __init__(self, session: aiohttp.ClientSession, **defaults: Any) -> None:
        self._session = session
        self._defaults = defaults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ws_connect(self, url: Any, **kwargs: Any) -> Any:
        return self._session.ws_connect(url, **{**self._defaults, **kwargs})
