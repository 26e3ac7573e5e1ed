"""Asks a TTS what it would ask aiohttp for, with the first step of the plugin's own connect.

Nothing is awaited before the plugin calls `ws_connect`. So its connect can be run up to there
against a session that raises instead of connecting: with the arguments, to learn the request, or
with the error of a dial, to learn what the plugin makes of it. Nothing reaches the network.
"""

from __future__ import annotations

import inspect
import threading
from types import ModuleType
from typing import Any

import aiohttp
import yarl
from livekit.agents import APIStatusError
from livekit.agents.utils import ConnectionPool
from multidict import CIMultiDict, CIMultiDictProxy

from ..protocol.request import Request
from .patching import Wrapper
from .releases import Shape

SHORTEST_AGE = 30.0
"""Seconds. An application that wants its connections to be younger wants no pool."""


def _is_not_ours(function: Any) -> bool:
    return not isinstance(function, Wrapper)


class _AskedError(BaseException):
    """Carries the session and the arguments of `ws_connect` through the plugin's `except
    Exception`."""

    def __init__(self, *asked: Any) -> None:
        super().__init__()  # without them: the repr would show the API key
        self.asked = asked


class _Session:
    """In place of the TTS's HTTP session, for one synchronous step."""

    def __init__(self, session: Any, error: BaseException | None) -> None:
        self._session = session
        self._error = error
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ws_connect(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self._thread:
            asked = _AskedError(self._session, args, kwargs)
            raise asked if self._error is None else self._error
        return self._session.ws_connect(*args, **kwargs)  # another thread uses the same TTS


class Asking:
    """Knows which TTS instances connect as the plugin was published, and asks them.

    Args:
        module: the plugin, before it is patched.
        shape: how it gets its connections.
    """

    def __init__(self, module: ModuleType, shape: Shape) -> None:
        self._type: type = module.TTS
        self._shape = shape
        self._is_native = shape is Shape.NATIVE_POOL
        names = ["_connect_ws", "_ensure_session"]
        if self._is_native:
            names.append("_connect_pooled_ws")
        current = vars(self._type)
        self._published = {name: inspect.unwrap(current[name], stop=_is_not_ours) for name in names}
        self._wrapped = next((name for name in names if not self._is_plain(name)), None)
        self._current = self._published.copy()

    def _is_plain(self, name: str) -> bool:
        function = self._published[name]
        return inspect.isfunction(function) and not hasattr(function, "__wrapped__")

    def patched(self) -> None:
        """The patches are applied: what the class has now is the plugin's own, or ours."""
        self._current = {name: vars(self._type)[name] for name in self._published}

    def has_session(self, tts: Any) -> bool:
        """Whether the TTS has an HTTP session. Outside of a job there may be none."""
        try:
            tts._ensure_session()
        except RuntimeError:
            return False
        return True

    def why_not(self, tts: Any, *, is_connecting: bool = False) -> str | None:
        """Why this TTS has to connect by itself; None if it connects as published.

        Args:
            is_connecting: the plugin's own `_connect_ws` is being called, so what overrides it has
                its way.
        """
        if self._wrapped is not None:
            return f"TTS.{self._wrapped} is wrapped"
        if self._is_native:
            reason = self._why_not_native(vars(tts).get("_pool"))
            if reason is not None:
                return reason
            tts = vars(tts)["_pool"]._connect_cb.__self__
        for name, current in self._current.items():
            if is_connecting and name == "_connect_ws" and not self._is_native:
                continue
            of_its_types = (vars(each)[name] for each in type(tts).__mro__ if name in vars(each))
            if name in vars(tts) or next(of_its_types, None) is not current:
                return f"{name} is not the plugin's own"
        if not self.has_session(tts):
            return "there is no HTTP session outside a job"
        if not isinstance(tts._session, aiohttp.ClientSession):
            return "its HTTP session is not an aiohttp.ClientSession"
        return None

    def _why_not_native(self, native: Any) -> str | None:
        if type(native) is not ConnectionPool:
            return "_pool is not the plugin's own"
        connects = getattr(native._connect_cb, "__func__", None)
        if connects is not self._published["_connect_pooled_ws"]:
            return "_pool._connect_cb is not the plugin's own"
        duration = native._max_session_duration
        if duration is not None and duration < SHORTEST_AGE:
            return "_pool._max_session_duration allows next to no reuse"
        return None

    def request_of(self, tts: Any, opts: Any, owner: object) -> Request | None:
        """What this TTS would ask for now; None if that cannot be known or compared.

        Args:
            opts: the options to speak with; None for the TTS's current ones.
            owner: see `Request`.
        """
        asked = self._first_step(tts, opts, None)
        if not isinstance(asked, _AskedError):
            return None
        session, args, kwargs = asked.asked
        duration = vars(tts)["_pool"]._max_session_duration if self._is_native else None
        try:
            max_age = float("inf") if duration is None else float(duration)
            return Request(session, args, kwargs, max_age, owner)
        except (TypeError, ValueError, IndexError):
            return None

    def error_for(self, tts: Any, opts: Any, error: Exception) -> BaseException:
        """What the plugin's connect raises after that error of aiohttp; the error itself if the
        connect awaits something before."""
        raised = self._first_step(tts, opts, error)
        return error if raised is None else raised

    def _first_step(self, tts: Any, opts: Any, error: Exception | None) -> BaseException | None:
        """Run the plugin's connect up to `ws_connect`, which raises; returns what leaves it."""
        if self._is_native:  # a copy of a TTS shares the native pool of the original
            connect = vars(tts)["_pool"]._connect_cb
        else:
            connect = self._published["_connect_ws"].__get__(tts)
        takes_options = self._shape is Shape.TAKES_OPTIONS
        spoken_with = (opts if opts is not None else tts._opts,) if takes_options else ()
        connect.__self__._ensure_session()
        attributes = vars(connect.__self__)
        session = attributes["_session"]
        asked = _Session(session, error)
        coroutine = connect(0.0, *spoken_with)  # which will not come to use its timeout
        # Last: left in place by an exception of ours, it would keep the TTS from connecting.
        attributes["_session"] = asked
        try:
            coroutine.send(None)
        except (Exception, _AskedError) as raised:
            return raised
        finally:
            coroutine.close()
            attributes["_session"] = session
        return None


def with_status(error: BaseException) -> BaseException:
    """Convert the error of a refused handshake to one that the plugin reports with its status.

    From 1.8.0 on the plugin's connect raises an `APIStatusError`. The plugin's stream takes that
    for a failed connection, drops the status and retries. Before 1.8.0 the connect raises aiohttp's
    error, which holds the headers of the request: printing that error prints the API key.
    """
    if isinstance(error, APIStatusError) and 400 <= error.status_code < 500:
        status = error.status_code
    elif isinstance(error, aiohttp.ClientResponseError):
        status = error.status
    else:
        return error
    url = yarl.URL()
    request = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(request, (), status=status, message=error.message)
