"""Replaces the native pool, which the plugin has from 1.6.5 on."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
from livekit.agents.utils import ConnectionPool

from ..pool.pool import Reason
from ..pool.supervisor import spawn
from ..protocol.lease import NETWORK_ERRORS, Lease
from .patching import Patch
from .provider import ConnectionProvider, Turn, current_turn, has_loop

NAME = "_pool"

WAYS_TO_CONNECT = {"_connect_ws", "_connect_pooled_ws"}


Method = TypeVar("Method", bound=Callable[..., Any])


def _fails_open(method: Method) -> Method:
    """After a fault of the patch, call the same method of the native pool."""
    name = method.__name__

    @functools.wraps(method)
    def guarded(pool: PooledConnections, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(pool, *args, **kwargs)
        except Exception as fault:
            pool._provider.fail(name, fault)
        return getattr(pool._native, name)(*args, **kwargs)

    @functools.wraps(method)
    async def guarded_async(pool: PooledConnections, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(pool, *args, **kwargs)
        except NETWORK_ERRORS:
            raise
        except Exception as fault:
            pool._provider.fail(name, fault)
        return await getattr(pool._native, name)(*args, **kwargs)

    return guarded_async if inspect.iscoroutinefunction(method) else guarded  # type: ignore[return-value]


class PooledConnections(ConnectionPool[aiohttp.ClientWebSocketResponse]):
    """What one TTS sees as its native pool: it gets its connections from the shared pools.

    Only the methods that the plugin calls are overridden. The base class's `connection()` calls
    them too.

    Args:
        tts: the TTS. It keeps this object alive, not the other way round.
        provider: the shared pools.
    """

    def __init__(self, tts: Any, provider: ConnectionProvider) -> None:
        super().__init__()
        self._tts = weakref.ref(tts)
        self._provider = provider
        native = self._native
        prewarming = native._prewarm_task and native._prewarm_task()
        if prewarming is not None:
            prewarming.cancel()
        for ws in list(native._available):
            self._close_native(ws)
        # A connection that was in use, or being dialled, when this object took over comes back
        # through these methods, and through nothing else. They are replaced last, so that nothing
        # can fail afterwards.
        native.put = native.remove = self._close_native

    def __repr__(self) -> str:
        return f"<PooledConnections for {type(self._tts()).__name__}>"

    @property
    def _native(self) -> Any:
        return vars(self._tts())[NAME]

    def restore(self) -> None:
        """Let the native pool serve again."""
        tts = self._tts()
        if tts is not None:  # otherwise the native pool is gone, too
            for name in ("put", "remove"):
                vars(vars(tts)[NAME]).pop(name, None)

    @_fails_open
    async def get(self, *, timeout: float) -> aiohttp.ClientWebSocketResponse:
        tts = self._tts()
        turn = current_turn() or Turn()
        opts = turn.stream._opts if turn.stream is not None else None
        native = self._native
        ws = await self._provider.connect(
            turn, tts, timeout, opts, lambda: native.get(timeout=timeout)
        )
        self.last_acquire_time, self.last_connection_reused = turn.waited, turn.reused
        return ws  # type: ignore[no-any-return]

    @_fails_open
    def put(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        if isinstance(conn, Lease):
            self._end(conn, None)
        else:
            self._native.put(conn)

    @_fails_open
    def remove(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        if isinstance(conn, Lease):
            self._end(conn, Reason.FAILED)
        else:
            self._native.remove(conn)

    @_fails_open
    def invalidate(self) -> None:
        """Warm the pool of the new options. Nobody asks for connections of the old ones now."""
        self._provider.follow(self._tts())

    @_fails_open
    def prewarm(self) -> None:
        self._provider.prewarm(self._tts())

    @_fails_open
    async def aclose(self) -> None:
        await self._provider.close(self._tts(), self._native.aclose)

    def _end(self, lease: Lease, cut_off: Reason | None) -> None:
        # Within a turn, the end of the turn ends the lease: the plugin may return the connection
        # and fail afterwards.
        if current_turn() is None:
            lease.end(cut_off)

    def _close_native(self, ws: Any) -> None:
        native = self._native
        type(native).remove(native, ws)
        if has_loop():
            spawn(native._drain_to_close(), name="xai_pool_patch.close_native")


class PoolAttribute(Patch):
    """The patch of `TTS._pool`, and also the descriptor that it puts there.

    The native pool stays where the plugin put it: in the instance's `__dict__`.

    Args:
        tts_type: the plugin's `TTS`.
        provider: the shared pools.
    """

    def __init__(self, tts_type: type, provider: ConnectionProvider) -> None:
        super().__init__(tts_type, NAME, lambda *_: self)
        self._provider = provider
        self._is_restored = False
        self._replacements: weakref.WeakKeyDictionary[Any, PooledConnections | None]
        self._replacements = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # worker threads have TTS instances of their own

    def __get__(self, tts: Any, owner: type | None = None) -> Any:
        if tts is None:
            return self
        if NAME not in vars(tts):
            raise AttributeError(f"{type(tts).__name__!r} object has no attribute {NAME!r}")
        native = vars(tts)[NAME]
        try:
            is_off = not self.switch or self._provider.has_failed
            if is_off and not self._is_restored:
                self.restore()
            return native if self._is_restored else self._replacement_for(tts, native) or native
        except Exception as fault:
            self._provider.fail(NAME, fault)
            return native

    def __set__(self, tts: Any, native: Any) -> None:
        self._provider.attempt(NAME, self._remove_replacement, tts)
        vars(tts)[NAME] = native

    def undo(self) -> None:
        try:
            super().undo()
        finally:
            self.restore()

    def restore(self) -> None:
        """Let all native pools serve again, for good."""
        with self._lock, contextlib.ExitStack() as steps:
            self._is_restored = True
            for replacement in filter(None, self._replacements.values()):
                steps.callback(replacement.restore)
            self._replacements.clear()

    def _replacement_for(self, tts: Any, native: Any) -> PooledConnections | None:
        if not WAYS_TO_CONNECT.isdisjoint(vars(tts)):
            # Somebody has replaced the connect of this instance, which only the native pool calls.
            # Not remembered, since the instance may lose that attribute again.
            self._remove_replacement(tts)
            return None
        with self._lock:
            if tts not in self._replacements:
                is_known = type(native) is ConnectionPool and self._connects_as_published(type(tts))
                self._replacements[tts] = (
                    PooledConnections(tts, self._provider) if is_known else None
                )
            return self._replacements[tts]

    def _remove_replacement(self, tts: Any) -> None:
        """Let the native pool of this TTS serve, until `_pool` is read again."""
        with self._lock:
            replacement = self._replacements.pop(tts, None)
        if replacement is not None:
            replacement.restore()

    def _connects_as_published(self, tts_type: type) -> bool:
        """False for a subclass with a connect of its own, which only the native pool calls."""
        return all(
            inspect.getattr_static(tts_type, name) is vars(self.owner)[name]
            for name in WAYS_TO_CONNECT
        )
