"""Leases connections to the plugin's TTS instances, whichever way they come to ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import multidict
import yarl
from livekit.agents import APIConnectionError, APIError, APIStatusError

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
        self._lease: Lease | None = None

    def begin(self, lease: Lease) -> None:
        self.end(Reason.ERROR)  # of a subclass that connects more than once
        self._lease = lease

    def note(self, waited: float, *, reused: bool = False) -> None:
        self.waited, self.reused = waited, reused
        if self.stream is not None:
            # Where livekit-agents takes it from for its TTSMetrics.
            self.stream._acquire_time = waited
            self.stream._connection_reused = reused

    def end(self, cut_off: Reason | None) -> None:
        if self._lease is not None:
            self._lease.end(cut_off)


_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("xai_pool_patch", default=None)
current_turn = _turn.get


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
            log().debug("prewarm skipped, no event loop is running")
            return
        try:
            tts._ensure_session()
        except RuntimeError:
            log().debug("prewarm skipped, there is no HTTP session outside a job")
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
        connect = self._connect().__get__(view, _TTSView)
        if self._shape is Shape.READS_OPTIONS:
            return connect  # type: ignore[no-any-return]
        return functools.partial(connect, opts=view._opts)


def has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


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
        raise _with_status(failure.error) from failure.error.__cause__
    except AcquireTimeoutError as error:
        raise APIConnectionError("failed to connect to xAI") from error


def _with_status(error: Exception) -> Exception:
    """A refused handshake as the error from which the plugin makes an `APIStatusError`.

    From 1.8.0 on its connect makes one itself, which its stream then takes for a connection that
    failed: without a status, and to be tried again.
    """
    if not isinstance(error, APIStatusError) or not 400 <= error.status_code < 500:
        return error
    url = yarl.URL()
    return aiohttp.ClientResponseError(
        aiohttp.RequestInfo(url, "GET", multidict.CIMultiDictProxy(multidict.CIMultiDict()), url),
        (),
        status=error.status_code,
        message=error.message,
    )


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
