"""What runs in place of the plugin's methods. `patch` decides where these are put.

There is no wrapper for `TTS._close_ws`: what it closes is the lease, which goes back to the pool
when `_run_ws` is left. Only then is it known whether the utterance was finished or cut off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from . import plugin_pool
from .leasing import Leasing, current_turn
from .patch import Patch
from .plugin import Shape
from .shared import Registry


def patches_for(module: ModuleType, shape: Shape, registry: Registry) -> list[Patch]:
    """What is put into a plugin of that shape."""
    tts, stream = module.TTS, module.SynthesizeStream
    has_pool = shape is Shape.OWN_POOL
    connect = _as_its_pool_does if has_pool else vars(tts)["_connect_ws"]
    leasing = Leasing(registry, shape, lambda: connect)
    wrappers = Wrappers(leasing)
    patches = [
        Patch(stream, "_run_ws", _wrapped(wrappers.run_ws)),
        Patch(tts, "synthesize", _wrapped(wrappers.synthesize)),
        Patch(tts, "aclose", _wrapped(wrappers.aclose)),
    ]
    if has_pool:
        attribute = plugin_pool.PoolAttribute(tts, leasing, registry.fail)
        return [*patches, Patch(tts, plugin_pool.NAME, lambda *_: attribute, attribute.restore)]
    return [
        *patches,
        Patch(tts, "_connect_ws", _wrapped(wrappers.connect_ws)),
        Patch(tts, "prewarm", _wrapped(wrappers.prewarm)),
        Patch(tts, "update_options", _wrapped(wrappers.update_options)),
    ]


def _as_its_pool_does(tts: Any, timeout: float) -> Any:
    """Looked up for each dial, since it is not wrapped here: others may wrap it at any time."""
    return tts._connect_pooled_ws(timeout)


def _wrapped(wrapper: Callable[..., Any]) -> Callable[[Any, Callable[[], bool]], Any]:
    def bound(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if instance is None:
            # Called as the plain function that it was, by somebody who took it from the class.
            instance, *args = args
            wrapped = wrapped.__get__(instance, type(instance))
        return wrapper(wrapped, instance, args, kwargs)

    def stand_in(function: Any, is_active: Callable[[], bool]) -> Any:
        return wrapt.FunctionWrapper(function, bound, enabled=is_active)

    return stand_in


class Wrappers:
    """The wrappers of one installation. Those of `_connect_ws`, `prewarm` and `update_options` are
    for a plugin without a pool of its own."""

    def __init__(self, leasing: Leasing) -> None:
        self._leasing = leasing

    async def run_ws(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        with self._leasing.turn_of(stream):
            return await wrapped(*args, **kwargs)

    def synthesize(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        with self._leasing.synthesis() as synthesis:
            stream = wrapped(*args, **kwargs)
        synthesis.append(weakref.ref(stream))
        return stream

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
        self._leasing.prewarm(tts)

    def update_options(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        wrapped(*args, **kwargs)
        self._leasing.follow(tts)

    async def aclose(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        await self._leasing.closing(tts, lambda: wrapped(*args, **kwargs))


def _asked_for(timeout: float, opts: Any = None) -> tuple[float, Any]:
    """The arguments of `_connect_ws`, in either shape."""
    return timeout, opts
