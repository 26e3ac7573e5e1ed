"""What stands in for the pool that the plugin has of its own from 1.6.5 on."""

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
    """After a fault of the patch the native pool does what the method should have."""
    name = method.__name__

    @functools.wraps(method)
    def guarded(pool: PooledConnections, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(pool, *args, **kwargs)
        except Exception as fault:
            pool._provider.fail(name, fault)
        return getattr(pool._own, name)(*args, **kwargs)

    @functools.wraps(method)
    async def guarded_async(pool: PooledConnections, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(pool, *args, **kwargs)
        except NETWORK_ERRORS:
            raise
        except Exception as fault:
            pool._provider.fail(name, fault)
        return await getattr(pool._own, name)(*args, **kwargs)

    return guarded_async if inspect.iscoroutinefunction(method) else guarded  # type: ignore[return-value]


class PooledConnections(ConnectionPool[aiohttp.ClientWebSocketResponse]):
    """The shared pools, as one TTS of the plugin asks for connections.

    Only what the plugin calls is overridden; `connection()` is the base class's, and built on it.

    Args:
        tts: which keeps this pool alive, and not the other way round.
        provider: the shared pools.
    """

    def __init__(self, tts: Any, provider: ConnectionProvider) -> None:
        super().__init__()
        self._tts = weakref.ref(tts)
        self._provider = provider
        own = self._own
        prewarming = own._prewarm_task and own._prewarm_task()
        if prewarming is not None:
            prewarming.cancel()
        for ws in list(own._available):
            self._close_own(ws)
        # Replaced on the instance, since nothing else tells when a connection comes back that was
        # in use, or being dialled, when this pool took over. Last, so that nothing fails after it.
        own.put = own.remove = self._close_own

    def __repr__(self) -> str:
        return f"<PooledConnections for {type(self._tts()).__name__}>"

    @property
    def _own(self) -> Any:
        return vars(self._tts())[NAME]

    def restore(self) -> None:
        """The native pool serves again."""
        tts = self._tts()
        if tts is not None:  # else its pool has gone with it
            for name in ("put", "remove"):
                vars(vars(tts)[NAME]).pop(name, None)

    @_fails_open
    async def get(self, *, timeout: float) -> aiohttp.ClientWebSocketResponse:
        tts = self._tts()
        turn = current_turn() or Turn()
        opts = turn.stream._opts if turn.stream is not None else None
        own = self._own
        ws = await self._provider.connect(
            turn, tts, timeout, opts, lambda: own.get(timeout=timeout)
        )
        self.last_acquire_time, self.last_connection_reused = turn.waited, turn.reused
        return ws  # type: ignore[no-any-return]

    @_fails_open
    def put(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        if isinstance(conn, Lease):
            self._end(conn, None)
        else:
            self._own.put(conn)

    @_fails_open
    def remove(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        if isinstance(conn, Lease):
            self._end(conn, Reason.FAILED)
        else:
            self._own.remove(conn)

    @_fails_open
    def invalidate(self) -> None:
        """The options have changed. What was made for the old ones is not asked for any more."""
        self._provider.follow(self._tts())

    @_fails_open
    def prewarm(self) -> None:
        self._provider.prewarm(self._tts())

    @_fails_open
    async def aclose(self) -> None:
        await self._provider.close(self._tts(), self._own.aclose)

    def _end(self, lease: Lease, cut_off: Reason | None) -> None:
        # Within a turn, how that ends decides: the plugin may yet fail after it gave it back.
        if current_turn() is None:
            lease.end(cut_off)

    def _close_own(self, ws: Any) -> None:
        own = self._own
        type(own).remove(own, ws)
        if has_loop():
            spawn(own._drain_to_close(), name="xai_pool_patch.close_own")


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
        own = vars(tts)[NAME]
        try:
            is_off = not self.switch or self._provider.has_failed
            if is_off and not self._is_restored:
                self.restore()
            return own if self._is_restored else self._replacement_for(tts, own) or own
        except Exception as fault:
            self._provider.fail(NAME, fault)
            return own

    def __set__(self, tts: Any, own: Any) -> None:
        self._provider.attempt("standing in", self._let_go, tts)
        vars(tts)[NAME] = own

    def undo(self) -> None:
        try:
            super().undo()
        finally:
            self.restore()

    def restore(self) -> None:
        """From here on the native pools serve again."""
        with self._lock, contextlib.ExitStack() as steps:
            self._is_restored = True
            for replacement in filter(None, self._replacements.values()):
                steps.callback(replacement.restore)
            self._replacements.clear()

    def _replacement_for(self, tts: Any, own: Any) -> PooledConnections | None:
        if not WAYS_TO_CONNECT.isdisjoint(vars(tts)):
            # One that is set on an instance, which may come and go, keeps it likewise.
            self._let_go(tts)
            return None
        with self._lock:
            if tts not in self._replacements:
                is_known = type(own) is ConnectionPool and self._connects_as_published(type(tts))
                self._replacements[tts] = (
                    PooledConnections(tts, self._provider) if is_known else None
                )
            return self._replacements[tts]

    def _let_go(self, tts: Any) -> None:
        """Its native pool serves, for now at least."""
        with self._lock:
            replacement = self._replacements.pop(tts, None)
        if replacement is not None:
            replacement.restore()

    def _connects_as_published(self, tts_type: type) -> bool:
        """A subclass that connects in a way of its own keeps the pool that calls it."""
        return all(
            inspect.getattr_static(tts_type, name) is vars(self.owner)[name]
            for name in WAYS_TO_CONNECT
        )
