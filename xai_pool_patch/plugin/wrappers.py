"""The wrappers of the plugin's methods. `installation` decides when they are applied.

Each calls the original, and ours through `Registry.attempt` or something that fails open itself. So
no fault of ours reaches the agent, and nothing here can fail.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt
from livekit.agents.tts import ChunkedStream

from ..pool.entries import Outcome
from ..registry import Registry
from .asking import Asking
from .native_pool import PoolAttribute
from .patching import Patch
from .provider import ConnectionProvider
from .releases import Shape, session_type
from .signs import Signs
from .turn import Turn, current_turn, enter_turn, leave_turn, report_on


def patches_for(module: ModuleType, shape: Shape, registry: Registry) -> tuple[list[Patch], Asking]:
    """The patches for a plugin of this shape, and what has to know when they are applied."""
    tts, stream = module.TTS, module.SynthesizeStream
    asking = Asking(module, shape)
    provider = ConnectionProvider(registry, asking)
    wrappers = Wrappers(provider)
    patches = [
        Patch(stream, "_run_ws", wrappers.run_ws),
        Patch(tts, "synthesize", wrappers.after("synthesize", wrappers.synthesized)),
        Patch(tts, "aclose", wrappers.aclose),
    ]
    session = session_type()
    if session is not None:
        signs = Signs(provider)
        patches.append(Patch(session, "start", signs.start))
        patches.append(Patch(session, "emit", wrappers.after("a sign", signs.emitted)))
    if shape is Shape.NATIVE_POOL:
        return [*patches, PoolAttribute(tts, provider)], asking
    return [
        *patches,
        Patch(tts, "_connect_ws", wrappers.connect_ws),
        Patch(tts, "prewarm", wrappers.after("prewarm", lambda tts, _: provider.prewarm(tts))),
        Patch(tts, "update_options", wrappers.after("update_options", wrappers.options_updated)),
    ], asking


class Wrappers:
    """The wrappers of one installation.

    Those of `_connect_ws`, `prewarm` and `update_options` are for a plugin without a native pool.
    From 1.6.5 on `native_pool` does what they do.
    """

    def __init__(self, provider: ConnectionProvider) -> None:
        self._provider = provider
        self._registry = provider.registry

    def after(self, operation: str, hook: Callable[..., object]) -> Callable[..., Any]:
        """A wrapper that calls the original, and then a hook with its result."""

        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            result = wrapped(*args, **kwargs)
            self._registry.attempt(operation, lambda: hook(instance, result, *args, **kwargs))
            return result

        return wrapper

    async def run_ws(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        """The turn. How the utterance ended is known from the exception that leaves it."""
        turn = self._registry.attempt("beginning a turn", Turn, stream)
        if turn is None:
            return await wrapped(*args, **kwargs)
        token = enter_turn(turn)
        outcome = Outcome.FAILED
        try:
            result = await wrapped(*args, **kwargs)
            outcome = Outcome.FINISHED
            return result
        except asyncio.CancelledError:
            outcome = Outcome.INTERRUPTED
            raise
        finally:
            leave_turn(token)
            end = self._provider.end_turn
            self._registry.attempt("ending a turn", end, turn, stream._tts, outcome)
            await self._provider.close_if_over(turn)

    async def connect_ws(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        turn = current_turn()
        if turn is None:  # nothing would end the lease
            return await wrapped(*args, **kwargs)
        lease = await self._provider.lease(turn, tts, *args, **kwargs)
        if lease is not None:
            return lease
        began = asyncio.get_running_loop().time()
        ws = await wrapped(*args, **kwargs)
        turn.note(asyncio.get_running_loop().time() - began)
        return ws

    async def aclose(self, wrapped: Any, tts: Any, args: Any, kwargs: Any) -> Any:
        await self._provider.close(tts, functools.partial(wrapped, *args, **kwargs))

    def synthesized(self, tts: Any, stream: Any, *args: Any, **kwargs: Any) -> None:
        """`synthesize()` reports metrics on one stream and works on another, in its `_run`."""
        if isinstance(stream, ChunkedStream):
            stream._run = wrapt.FunctionWrapper(stream._run, self._run_synthesis)  # type: ignore[method-assign]

    async def _run_synthesis(self, wrapped: Any, stream: Any, args: Any, kwargs: Any) -> Any:
        self._registry.attempt("synthesize", report_on, stream)
        return await wrapped(*args, **kwargs)

    def options_updated(self, tts: Any, _: None, *args: Any, **kwargs: Any) -> None:
        self._provider.follow(tts)
