"""The wrappers of the plugin's methods. `installation` decides when they are applied."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt
from livekit.agents.tts import ChunkedStream

from ..manager import Registry
from ..pool.pool import Reason
from ..protocol.lease import NETWORK_ERRORS, Lease
from ..telemetry.log import LogEvent, log_event
from .native_pool import PoolAttribute
from .patching import Patch
from .provider import ConnectionProvider, current_turn, report_on
from .releases import Shape, session_type
from .signs import Signs


def patches_for(module: ModuleType, shape: Shape, registry: Registry) -> list[Patch]:
    """The patches for a plugin of this shape."""
    tts, stream = module.TTS, module.SynthesizeStream
    has_pool = shape is Shape.NATIVE_POOL
    provider = ConnectionProvider(registry, shape, connect_of(tts, shape))
    wrappers = Wrappers(provider)

    def patch(owner: type, name: str, wrapper: Callable[..., Any]) -> Patch:
        return Patch(owner, name, _wrapped(wrapper, provider))

    patches = [
        patch(stream, "_run_ws", wrappers.run_ws),
        patch(tts, "synthesize", wrappers.synthesize),
        patch(tts, "aclose", wrappers.aclose),
    ]
    session = _session_to_hear(registry)
    if session is not None:
        patches.append(patch(session, "emit", Signs(provider).emit))
    if has_pool:
        return [*patches, PoolAttribute(tts, provider)]
    return [
        *patches,
        patch(tts, "_connect_ws", wrappers.connect_ws),
        patch(tts, "_close_ws", wrappers.close_ws),
        patch(tts, "prewarm", wrappers.prewarm),
        patch(tts, "update_options", wrappers.update_options),
    ]


def _session_to_hear(registry: Registry) -> type | None:
    """The framework's AgentSession, if signs of its replies are wanted and can be had."""
    if registry.options.warm == "always":
        return None
    session, difference = session_type()
    if difference is not None:
        log_event(LogEvent.NO_SIGNS, reason=difference)
    return session


def connect_of(tts_type: type, shape: Shape) -> Any:
    """The plugin's own connect, as a plain function. See `Connector`."""
    return _connect_as_native_pool if shape is Shape.NATIVE_POOL else vars(tts_type)["_connect_ws"]


def _connect_as_native_pool(tts: Any, timeout: float) -> Any:
    # Looked up for each dial. We do not wrap this method, so others may wrap it at any time.
    return tts._connect_pooled_ws(timeout)


def _wrapped(
    wrapper: Callable[..., Any], provider: ConnectionProvider
) -> Callable[[Any, list[str]], Any]:
    guarded = (_guarded_async if inspect.iscoroutinefunction(wrapper) else _guarded)(
        wrapper, provider
    )

    def make_wrapper(function: Any, switch: list[str]) -> Any:
        return wrapt.FunctionWrapper(function, guarded, enabled=switch)  # type: ignore[arg-type]

    return make_wrapper


def _guarded(wrapper: Callable[..., Any], provider: ConnectionProvider) -> Callable[..., Any]:
    """Make a wrapper fail open: if it raises before it calls the original, call the original."""

    def guarded(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        call = None
        try:
            call = _Call(wrapped)
            return wrapper(*_bound(call, instance, args), kwargs)
        except Exception as error:
            if call is not None and call.was_made:
                raise
            provider.fail(wrapper.__name__, error)
        return wrapped(*args, **kwargs)

    return guarded


def _guarded_async(wrapper: Callable[..., Any], provider: ConnectionProvider) -> Callable[..., Any]:
    """Do the same as `_guarded` with a coroutine function."""

    async def guarded(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        call = None
        try:
            call = _Call(wrapped)
            return await wrapper(*_bound(call, instance, args), kwargs)
        except NETWORK_ERRORS:
            raise
        except Exception as error:
            if call is not None and call.was_made:
                raise
            provider.fail(wrapper.__name__, error)
        return await wrapped(*args, **kwargs)

    return guarded


def _bound(call: _Call, instance: Any, args: Any) -> tuple[Callable[..., Any], Any, Any]:
    if instance is not None:
        return call, instance, args
    # Called as a plain function, by somebody who took it from the class.
    instance, *args = args
    return functools.partial(call, instance), instance, args


class _Call:
    """The original, and whether the wrapper has called it."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        self.was_made = False
        self._wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.was_made = True
        return self._wrapped(*args, **kwargs)


class Wrappers:
    """The wrappers of one installation.

    Those of `_connect_ws`, `_close_ws`, `prewarm` and `update_options` are for a plugin without a
    native pool. From 1.6.5 on `native_pool` does what they do.
    """

    def __init__(self, provider: ConnectionProvider) -> None:
        self._provider = provider

    async def run_ws(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        if self._provider.has_failed:
            return await wrapped(*args, **kwargs)
        async with self._provider.turn(stream):
            return await wrapped(*args, **kwargs)

    def synthesize(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        """`synthesize()` reports metrics on one stream and works on another, in its `_run`."""
        stream = wrapped(*args, **kwargs)
        if isinstance(stream, ChunkedStream):
            self._provider.attempt("synthesize", self._wrap_run, stream)
        return stream

    def _wrap_run(self, stream: Any) -> None:
        guarded = _guarded_async(self.run_synthesis, self._provider)
        stream._run = wrapt.FunctionWrapper(stream._run, guarded)

    async def run_synthesis(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        report_on(stream)
        return await wrapped(*args, **kwargs)

    async def connect_ws(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        def plain() -> Any:
            return wrapped(*args, **kwargs)

        turn = current_turn()
        if turn is None:  # nobody would end the lease
            return await plain()
        timeout, opts = _asked_for(*args, **kwargs)
        return await self._provider.connect(turn, tts, timeout, opts, plain)

    async def close_ws(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        """End a lease. Any other WebSocket is closed as the plugin does.

        The plugin calls this in a `finally`, so an exception in progress is what cut the utterance
        off. If the plugin does not get here, `run_ws` ends the lease.
        """
        end = functools.partial(self._end_lease, _cut_off_by(sys.exc_info()[1]), *args, **kwargs)
        closed = await wrapped(*args, **kwargs)
        self._provider.attempt("ending a lease", end)
        return closed

    def _end_lease(self, cut_off: Reason | None, ws: Any) -> None:
        turn = current_turn()
        if turn is not None and isinstance(ws, Lease):
            turn.end(cut_off)

    def prewarm(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        self._provider.attempt("prewarm", self._provider.prewarm, tts)

    def update_options(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        self._provider.attempt("update_options", self._provider.follow, tts)

    async def aclose(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        await self._provider.close(tts, lambda: wrapped(*args, **kwargs))


def _cut_off_by(error: BaseException | None) -> Reason | None:
    """Why the utterance was cut off, given the exception in progress; None if it has finished."""
    if error is None:
        return None
    return Reason.INTERRUPTED if isinstance(error, asyncio.CancelledError) else Reason.FAILED


def _asked_for(timeout: float, opts: Any = None) -> tuple[float, Any]:
    """Take the arguments of `_connect_ws`, of either shape, by position or by name."""
    return timeout, opts
