"""What runs in place of the plugin's methods. `patch` decides where these are put.

There is no wrapper for `TTS._close_ws`: what it closes is the lease, which goes back to the pool
when `_run_ws` is left. Only then is it known whether the utterance was finished or cut off.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from . import plugin_pool
from .lease import NETWORK_ERRORS
from .leasing import Leasing, current_turn
from .patch import Patch
from .plugin import Shape
from .pool import Reason
from .shared import Registry


def patches_for(module: ModuleType, shape: Shape, registry: Registry) -> list[Patch]:
    """What is put into a plugin of that shape."""
    tts, stream = module.TTS, module.SynthesizeStream
    has_pool = shape is Shape.OWN_POOL
    leasing = Leasing(registry, shape, connect_of(tts, shape))
    wrappers = Wrappers(leasing)

    def patch(owner: type, name: str, wrapper: Callable[..., Any]) -> Patch:
        return Patch(owner, name, _wrapped(wrapper, leasing))

    patches = [
        patch(stream, "_run_ws", wrappers.run_ws),
        patch(tts, "synthesize", wrappers.synthesize),
        patch(tts, "aclose", wrappers.aclose),
    ]
    if has_pool:
        attribute = plugin_pool.PoolAttribute(tts, leasing)
        return [*patches, Patch(tts, plugin_pool.NAME, attribute.stand_in, attribute.restore)]
    return [
        *patches,
        patch(tts, "_connect_ws", wrappers.connect_ws),
        patch(tts, "prewarm", wrappers.prewarm),
        patch(tts, "update_options", wrappers.update_options),
    ]


def connect_of(tts_type: type, shape: Shape) -> Any:
    """The plugin's own way to a connection, as a plain function."""
    return _as_its_pool_does if shape is Shape.OWN_POOL else vars(tts_type)["_connect_ws"]


def _as_its_pool_does(tts: Any, timeout: float) -> Any:
    """Looked up for each dial, since it is not wrapped here: others may wrap it at any time."""
    return tts._connect_pooled_ws(timeout)


def _wrapped(wrapper: Callable[..., Any], leasing: Leasing) -> Callable[[Any, list[str]], Any]:
    guarded = (_guarded_async if inspect.iscoroutinefunction(wrapper) else _guarded)(
        wrapper, leasing
    )

    def stand_in(function: Any, switch: list[str]) -> Any:
        return wrapt.FunctionWrapper(function, guarded, enabled=switch)  # type: ignore[arg-type]

    return stand_in


def _guarded(wrapper: Callable[..., Any], leasing: Leasing) -> Callable[..., Any]:
    """A wrapper that fails before it calls what it wraps does not keep it from being called."""

    def guarded(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        call = None
        try:
            call = _Call(wrapped)
            return wrapper(*_bound(call, instance, args), kwargs)
        except Exception as error:
            if call is not None and call.was_made:
                raise
            leasing.fail(wrapper.__name__, error)
        return wrapped(*args, **kwargs)

    return guarded


def _guarded_async(wrapper: Callable[..., Any], leasing: Leasing) -> Callable[..., Any]:
    """`_guarded`, of a coroutine function."""

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
            leasing.fail(wrapper.__name__, error)
        return await wrapped(*args, **kwargs)

    return guarded


def _bound(call: _Call, instance: Any, args: Any) -> tuple[Callable[..., Any], Any, Any]:
    if instance is not None:
        return call, instance, args
    # Called as the plain function that it was, by somebody who took it from the class.
    instance, *args = args
    return functools.partial(call, instance), instance, args


class _Call:
    """What is wrapped, and whether it has been called."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        self.was_made = False
        self._wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.was_made = True
        return self._wrapped(*args, **kwargs)


class Wrappers:
    """The wrappers of one installation. Those of `_connect_ws`, `prewarm` and `update_options` are
    for a plugin without a pool of its own."""

    def __init__(self, leasing: Leasing) -> None:
        self._leasing = leasing

    async def run_ws(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        leasing = self._leasing
        if leasing.has_failed:
            return await wrapped(*args, **kwargs)
        turn = leasing.attempt("beginning a turn", leasing.begin_turn, stream)
        cut_off: Reason | None = Reason.ERROR
        try:
            result = await wrapped(*args, **kwargs)
            cut_off = None
            return result
        except asyncio.CancelledError:
            cut_off = Reason.INTERRUPTED
            raise
        finally:
            if turn is not None:
                leasing.attempt("ending a turn", leasing.end_turn, turn, cut_off)
                await leasing.attempt_to_wait("closing", turn.closed)

    def synthesize(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        leasing = self._leasing
        synthesis = leasing.attempt("beginning a synthesis", leasing.begin_synthesis)
        stream = None
        try:
            stream = wrapped(*args, **kwargs)
            return stream
        finally:
            if synthesis is not None:
                leasing.attempt("a synthesis", leasing.end_synthesis, synthesis, stream)

    async def connect_ws(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        def plain() -> Any:
            return wrapped(*args, **kwargs)

        turn = current_turn()
        if turn is None:  # then nobody would say how the utterance ended
            return await plain()
        timeout, opts = _asked_for(*args, **kwargs)
        return await self._leasing.connect(turn, tts, timeout, opts, plain)

    def prewarm(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        self._leasing.attempt("prewarm", self._leasing.prewarm, tts)

    def update_options(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        self._leasing.attempt("update_options", self._leasing.follow, tts)

    async def aclose(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        await self._leasing.close(tts, lambda: wrapped(*args, **kwargs))


def _asked_for(timeout: float, opts: Any = None) -> tuple[float, Any]:
    """The arguments of `_connect_ws`, in either shape."""
    return timeout, opts
