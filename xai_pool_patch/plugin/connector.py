"""Dials for a pool, with the plugin's own `_connect_ws`."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import aiohttp
import multidict
import yarl
from livekit.agents import APIStatusError

from ..manager import PoolKey
from ..protocol.connection import Heartbeat
from .releases import Shape

NOT_IN_THE_URL = {"tokenizer"}
"""Options of the plugin that do not go to the server."""


def key_of(tts: Any, opts: Any) -> PoolKey:
    """The key of the pool that serves this TTS when it speaks with these options."""
    options_type: Any = type(opts)
    options = tuple((name, getattr(opts, name)) for name in _names_in_url(options_type))
    return PoolKey(tts._api_key, tts._ensure_session(), options)


@functools.cache
def _names_in_url(options_type: Any) -> tuple[str, ...]:
    names = (field.name for field in dataclasses.fields(options_type))
    return tuple(name for name in names if name not in NOT_IN_THE_URL)


class Connector:
    """Connects with the plugin's own `_connect_ws`, with one set of options.

    Args:
        connect: the plugin's `TTS._connect_ws`, as a plain function. If the plugin has a native
            pool, the function that this pool calls, which takes no options.
        tts: the TTS that `connect` gets a view of. Only a dial holds a reference to it.
        opts: copied, since the TTS changes them in place.
    """

    def __init__(
        self,
        connect: Callable[..., Any],
        tts: Any,
        opts: Any,
        *,
        shape: Shape,
        heartbeat: Heartbeat,
    ) -> None:
        tts_type: Any = type(tts)
        self._connect = connect
        self._shape = shape
        self._tts = weakref.ref(tts)
        self._view_type = _view_type_of(tts_type)
        self._attributes = {
            "_api_key": tts._api_key,
            "_opts": dataclasses.replace(opts),
            "_session": _PooledSession(tts._ensure_session(), heartbeat),
        }

    async def __call__(self, timeout: float) -> Any:
        view = object.__new__(self._view_type)
        vars(view).update(self._attributes, _viewed=self._tts())
        takes_options = self._shape is Shape.TAKES_OPTIONS
        arguments = (timeout, view._opts) if takes_options else (timeout,)
        return await self._connect.__get__(view, self._view_type)(*arguments)


@functools.lru_cache(maxsize=64)
def _view_type_of(tts_type: Any) -> Any:
    names = {"__module__": tts_type.__module__, "__qualname__": tts_type.__qualname__}
    return type(tts_type)(tts_type.__name__, (_View, tts_type), names)


class _View:
    """What the plugin's `_connect_ws` sees as `self` when the pool dials.

    A view differs from the TTS in two attributes:

    - The options are those of the pool's key. Otherwise a change of the TTS's options could turn a
      dial for one voice into a connection for another.
    - The session opens WebSockets as a `Connection` needs them.

    The view has the TTS's class and all its other attributes, since wrappers of `_connect_ws` may
    read any of them. Only the dial keeps the TTS alive: its pool may outlive it and serve others.
    """

    def __init_subclass__(cls) -> None:
        pass  # not the hook of the TTS's class, which is for the application's subclasses

    def __del__(self) -> None:
        pass  # not the finalizer of the TTS's class, which is for the TTS

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_viewed"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(vars(self)["_viewed"], name, value)

    def __eq__(self, other: object) -> bool:
        return bool(vars(self)["_viewed"] == other)

    def __hash__(self) -> int:
        return hash(vars(self)["_viewed"])

    def _ensure_session(self) -> Any:
        return vars(self)["_session"]


class _PooledSession:
    """The plugin's HTTP session, except that it opens WebSockets as a `Connection` needs them."""

    def __init__(self, session: aiohttp.ClientSession, heartbeat: Heartbeat) -> None:
        self._session = session
        self._heartbeat = heartbeat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ws_connect(self, url: Any, **kwargs: Any) -> Any:
        defaults = {"autoping": False, "heartbeat": self._heartbeat.interval}
        return self._session.ws_connect(url, **{**defaults, **kwargs})


def with_status(error: Exception) -> Exception:
    """Convert the error of a refused handshake to one that the plugin reports with its status.

    From 1.8.0 on the plugin's connect raises an `APIStatusError`. The plugin's stream takes that
    for a failed connection, drops the status and retries. Before 1.8.0 the connect raises aiohttp's
    error, which holds the headers of the request. Whoever prints that error prints the API key.
    """
    if isinstance(error, APIStatusError) and 400 <= error.status_code < 500:
        status = error.status_code
    elif isinstance(error, aiohttp.ClientResponseError):
        status = error.status
    else:
        return error
    url = yarl.URL()
    return aiohttp.ClientResponseError(
        aiohttp.RequestInfo(url, "GET", multidict.CIMultiDictProxy(multidict.CIMultiDict()), url),
        (),
        status=status,
        message=error.message,
    )
