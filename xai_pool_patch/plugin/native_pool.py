"""Takes the place of the native pool, which the plugin has from 1.6.5 on."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import aiohttp
from livekit.agents.utils import ConnectionPool

from ..pool.entries import Outcome
from ..pool.supervisor import spawn
from ..protocol.lease import Lease
from ..registry import running_loop
from .patching import Patch
from .provider import ConnectionProvider
from .turn import Turn, current_turn

NAME = "_pool"


class PooledConnections(ConnectionPool[aiohttp.ClientWebSocketResponse]):
    """What one TTS sees as its native pool: it gets its connections from the shared pools.

    Only the methods that the plugin calls are overridden. The base class's `connection()` calls
    them too. Everything else is that of the native pool, which also serves a TTS that the shared
    pools do not.

    Args:
        tts: the TTS. It keeps this object alive, not the other way round.
        provider: the shared pools.
    """

    def __init__(self, tts: Any, provider: ConnectionProvider) -> None:
        # No super().__init__(): it would set what `__getattr__` finds in the native pool.
        self._tts = weakref.ref(tts)
        self._provider = provider
        self.last_acquire_time = 0.0
        self.last_connection_reused = False

    def __repr__(self) -> str:
        return f"<PooledConnections for {type(self._tts()).__name__}>"

    def __getattr__(self, name: str) -> Any:
        if name in ("_tts", "_provider"):
            raise AttributeError(name)
        return getattr(self._native, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_connect_cb", "_max_session_duration"):
            setattr(self._native, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _native(self) -> Any:
        return vars(self._tts())[NAME]

    async def get(self, *, timeout: float) -> aiohttp.ClientWebSocketResponse:
        attempt = self._provider.registry.attempt
        turn = current_turn() or attempt("connecting", Turn)
        lease = await self._provider.lease(turn, self._tts(), timeout) if turn is not None else None
        if turn is None or lease is None:
            native = self._native
            ws: aiohttp.ClientWebSocketResponse = await native.get(timeout=timeout)
            self.last_acquire_time = native.last_acquire_time
            self.last_connection_reused = native.last_connection_reused
            return ws
        attempt("closing the native pool", self._close_native)
        self.last_acquire_time, self.last_connection_reused = turn.waited, turn.reused
        return lease

    def put(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        self._return(conn, Outcome.FINISHED)

    def remove(self, conn: aiohttp.ClientWebSocketResponse) -> None:
        self._return(conn, Outcome.FAILED)

    def invalidate(self) -> None:
        """Warm the pool of the new options. No TTS asks for connections of the old ones now."""
        self._native.invalidate()
        self._provider.registry.attempt("invalidate", self._provider.follow, self._tts())

    def prewarm(self) -> None:
        registry, tts = self._provider.registry, self._tts()
        if registry.attempt("prewarm", self._provider.prewarm, tts) is False:
            self._native.prewarm()

    async def aclose(self) -> None:
        await self._provider.close(self._tts(), self._native.aclose)

    def _return(self, conn: aiohttp.ClientWebSocketResponse, outcome: Outcome) -> None:
        if not isinstance(conn, Lease):
            native = self._native
            (native.put if outcome is Outcome.FINISHED else native.remove)(conn)
            return
        attempt = self._provider.registry.attempt
        attempt("closing a lease", conn.mark_closed)
        # Within a turn, the end of the turn ends the lease: the plugin may return the connection
        # and fail afterwards.
        if current_turn() is None:
            attempt("ending a lease", conn.end, outcome)

    def _close_native(self) -> None:
        """Close what the native pool opened before it was replaced. It is never read."""
        native = self._native
        # Only what is not in use: before 1.7 `invalidate()` would close that, too.
        for ws in list(native._available):
            native.remove(ws)
        if native._to_close and running_loop() is not None:
            spawn(native._drain_to_close(), name="xai_pool_patch.close_native")


class PoolAttribute(Patch):
    """The patch of `TTS._pool`, and also the descriptor that it puts there.

    The native pool stays where the plugin put it: in the instance's `__dict__`.

    Args:
        tts_type: the plugin's `TTS`.
        provider: the shared pools.
    """

    def __init__(self, tts_type: type, provider: ConnectionProvider) -> None:
        super().__init__(tts_type, NAME)
        self._provider = provider
        self._replacements = weakref.WeakKeyDictionary[Any, PooledConnections]()
        self._lock = threading.Lock()  # worker threads have TTS instances of their own

    def replacement(self, original: Any) -> PoolAttribute:
        return self

    def __get__(self, tts: Any, owner: type | None = None) -> Any:
        if tts is None:
            return self
        if NAME not in vars(tts):
            raise AttributeError(f"{type(tts).__name__!r} object has no attribute {NAME!r}")
        native = vars(tts)[NAME]
        is_ours = self.switch and type(native) is ConnectionPool
        if not is_ours or not self._provider.registry.is_open:
            return native
        replacement = self._replacements.get(tts)
        if replacement is None:
            replacement = self._provider.registry.attempt("replacing", self._replace, tts)
        return replacement if replacement is not None else native

    def __set__(self, tts: Any, native: Any) -> None:
        vars(tts)[NAME] = native

    def _replace(self, tts: Any) -> PooledConnections:
        with self._lock:
            return self._replacements.setdefault(tts, PooledConnections(tts, self._provider))
