"""A mark that a fleet sees: a key in Redis."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from typing import TYPE_CHECKING

from ..errors import InvalidOptionError
from ..mark import Mark, MarkStore

if TYPE_CHECKING:
    import redis.asyncio

SCHEMES = ("redis://", "rediss://", "unix://")
_SCHEMES = " or ".join(SCHEMES)
PREFIX = "xai_pool_patch:limit:"
KEPT = 300.0
"""Seconds that a mark stays after its end: one that recurs within this time is twice as long."""
TIMEOUT = 0.8
"""Seconds for connecting and for each answer, unless the URL says otherwise."""


def store_from(spec: str | MarkStore) -> MarkStore:
    """The store that a URL names, or an operator's own. Connects to nothing.

    Raises:
        InvalidOptionError: the URL is of another kind or wrong, the package `redis` is missing, or
            the object is no `MarkStore`. The message quotes nothing: a URL may have a password.
    """
    if not isinstance(spec, str):
        return _checked(spec)
    if not spec.startswith(SCHEMES):
        raise InvalidOptionError(f"the URL of a store of marks must begin with {_SCHEMES}")
    return RedisStore(spec)


def _checked(store: MarkStore) -> MarkStore:
    parts = ("name", "interval", "read", "write", "aclose")
    missing = [part for part in parts if not hasattr(store, part)]
    if missing:
        raise InvalidOptionError(
            f"a store of marks must be a URL that begins with {_SCHEMES}, or a MarkStore; "
            f"a {type(store).__name__} has no {', '.join(missing)}"
        )
    is_number = isinstance(store.interval, (int, float)) and not isinstance(store.interval, bool)
    if not is_number or not 0.0 < store.interval < math.inf:
        raise InvalidOptionError("the interval of a store of marks must be seconds above 0")
    return store


class RedisStore:
    """A key for each API key, which expires by itself.

    Each event loop has a client of its own, and with it one connection. A Redis cluster or Sentinel
    is supported as far as the client supports it by URL.

    Args:
        url: as `redis.asyncio.Redis.from_url` takes it.

    Raises:
        InvalidOptionError: the URL is wrong, or the package `redis` is missing.
        redis.RedisError, OSError: from `read` and `write`, if Redis cannot be reached or refuses.
        ValueError: from `read`, if Redis has something else than a mark.
    """

    name = "redis"
    interval = 1.0

    def __init__(self, url: str) -> None:
        self._url = url
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, redis.asyncio.Redis] = (
            weakref.WeakKeyDictionary()
        )
        self._check()

    async def read(self, digest: str) -> Mark | None:
        value = await self._client().get(PREFIX + digest)
        if value is None:
            return None
        until, length = map(float, value.split())
        return Mark(until, length)

    async def write(self, digest: str, mark: Mark) -> None:
        expires_in = mark.until + KEPT - time.time()
        if expires_in > 0:
            value = f"{mark.until:.3f} {mark.length:.3f}"
            await self._client().set(PREFIX + digest, value, px=int(expires_in * 1e3) + 1)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _client(self) -> redis.asyncio.Redis:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = self._new_client()
        return self._clients[loop]

    def _new_client(self) -> redis.asyncio.Redis:
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        return redis.asyncio.Redis.from_url(
            self._url,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )

    def _check(self) -> None:
        """Find the mistakes in the URL that can be found without connecting."""
        try:
            self._new_client().connection_pool.make_connection()  # type: ignore[no-untyped-call]
        except ImportError:
            raise InvalidOptionError(
                "a store of marks in Redis needs the package redis: "
                "pip install 'xai_pool_patch[redis]'"
            ) from None
        except Exception as error:
            # Neither its message nor its cause: both may quote the URL.
            raise InvalidOptionError(
                f"the URL of a store of marks is wrong ({type(error).__name__}): "
                "it must be like redis://user:password@host:6379/0"
            ) from None
