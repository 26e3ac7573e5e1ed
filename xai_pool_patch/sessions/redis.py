"""A shortage that a fleet sees: a key in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid

from .store import Store

PREFIX = "xai_pool_patch:shortage:"
PROBE_PREFIX = "xai_pool_patch:probe:"
PROBE_KEPT = 10
"""Seconds that the key of a probe lasts."""
TIMEOUT = 0.8
"""Seconds for connecting and for each answer, unless the URL says otherwise."""
CLOSE_TIMEOUT = 1.0


class RedisStore(Store):
    """A key for each host, which expires with its shortage. A process has one connection.

    The client is the blocking one: in an event loop it would read certificates from disk there.

    Args:
        url: as `redis.Redis.from_url` takes it.

    Raises:
        ImportError: the package `redis` is missing.
        Exception: from `__init__`, the URL is wrong, and may be quoted; from the methods, Redis
            cannot be reached or refuses.
    """

    name = "redis"
    keeps_open = True

    def __init__(self, url: str) -> None:
        from redis import Redis

        self._client = Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
        # Finds the mistakes in the URL that can be found without connecting.
        self._client.connection_pool.make_connection()

    async def aclose(self) -> None:
        with contextlib.suppress(Exception):
            closing = self._in_thread(lambda _: self._client.close(), "")
            await asyncio.wait_for(closing, CLOSE_TIMEOUT)

    def _read(self, name: str) -> float | None:
        value = self._client.get(PREFIX + name)
        try:
            return None if value is None else float(value)
        except ValueError:
            return None

    def _write(self, name: str, until: float) -> None:
        expires_in = math.ceil((until - time.time()) * 1e3)
        if expires_in > 0:
            self._client.set(PREFIX + name, f"{until:.3f}", px=expires_in)

    def _probe(self, name: str) -> None:
        token = uuid.uuid4().hex
        self._client.set(PROBE_PREFIX + token, token, ex=PROBE_KEPT)
        if self._client.get(PROBE_PREFIX + token) not in (token, token.encode()):
            raise ConnectionError("what was written is not what is read")
