"""Dials with the plugin's own `_connect_ws`, for a pool rather than for the TTS that asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import aiohttp
import multidict
import yarl
from livekit.agents import APIStatusError

from .connection import Heartbeat
from .plugin import Shape
from .shared import Connect, Key

NOT_IN_THE_URL = {"tokenizer"}
"""Options of the plugin that do not go to the server."""


def key_of(tts: Any, opts: Any) -> Key:
    """What that TTS shares its connections by when it speaks with those options."""
    options_type: Any = type(opts)
    options = tuple((name, getattr(opts, name)) for name in _names_in_url(options_type))
    return Key(tts._api_key, tts._ensure_session(), options)


@functools.cache
def _names_in_url(options_type: Any) -> tuple[str, ...]:
    names = (field.name for field in dataclasses.fields(options_type))
    return tuple(name for name in names if name not in NOT_IN_THE_URL)


def dialler_of(
    connect: Callable[..., Any], tts: Any, opts: Any, *, shape: Shape, heartbeat: Heartbeat
) -> Connect:
    """Makes what a pool dials with.

    Args:
        connect: the plugin's `TTS._connect_ws`, as a plain function.
    """
    view = _TTSView(tts._api_key, dataclasses.replace(opts), tts._ensure_session(), heartbeat)
    dial = connect.__get__(view, _TTSView)
    if shape is Shape.READS_OPTIONS:
        return dial  # type: ignore[no-any-return]
    return functools.partial(dial, opts=view._opts)


class _TTSView:
    """What the plugin's `_connect_ws` sees as `self` when the pool dials.

    It holds the options of the moment, so that a later change does not turn a dial for one voice
    into a connection for another; and not the TTS, which may go while its pool serves others.
    """

    def __init__(
        self, api_key: str, opts: Any, session: aiohttp.ClientSession, heartbeat: Heartbeat
    ) -> None:
        self._api_key = api_key
        self._opts = opts
        self._session = _PooledSession(session, heartbeat)

    def _ensure_session(self) -> Any:
        return self._session


class _PooledSession:
    """The plugin's HTTP session, which opens WebSockets as a `Connection` needs them."""

    def __init__(self, session: aiohttp.ClientSession, heartbeat: Heartbeat) -> None:
        self._session = session
        self._heartbeat = heartbeat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ws_connect(self, url: Any, **kwargs: Any) -> Any:
        defaults = {"autoping": False, "heartbeat": self._heartbeat.interval}
        return self._session.ws_connect(url, **{**defaults, **kwargs})


def with_status(error: Exception) -> Exception:
    """A refused handshake as the error from which the plugin makes an `APIStatusError`.

    From 1.8.0 on its connect makes one itself, which its stream then takes for a connection that
    failed: without a status, and to be tried again. Before that, it is aiohttp's, with the headers
    of the request, and so with the API key, for everybody who prints it.
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
