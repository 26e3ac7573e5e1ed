"""Recognises the installed plugin: version and capabilities in, a shape or a refusal out.

Nothing is patched here, and nothing is imported: what is looked at has been imported already.
"""

from __future__ import annotations

import enum
import importlib.metadata
import inspect
from dataclasses import dataclass
from types import ModuleType

from .errors import UnsupportedPluginError

DISTRIBUTION = "livekit-plugins-xai"
MODULE = "livekit.plugins.xai.tts"


class Shape(enum.Enum):
    """How the plugin's `TTS._connect_ws` is told what to connect for."""

    READS_OPTIONS = ("self", "timeout")
    """It reads `self._opts` itself."""
    TAKES_OPTIONS = ("self", "timeout", "opts")
    """It is given the stream's own copy."""


VERIFIED: dict[str, Shape] = {
    **dict.fromkeys([f"1.5.{patch}" for patch in range(2, 19)], Shape.READS_OPTIONS),
    **dict.fromkeys(["1.6.0", "1.6.1"], Shape.READS_OPTIONS),
    **dict.fromkeys(["1.6.2", "1.6.3", "1.6.4"], Shape.TAKES_OPTIONS),
}
"""Every version whose `tts.py` has been read. Within a shape it is the same to the letter, but
for the options added in 1.6.2."""

_SUPPORTED = (
    "xai_pool_patch supports 1.5.2 to 1.6.4; from 1.6.5 on the plugin has a pool of its own,"
    " which this version does not replace"
)


@dataclass(frozen=True)
class _Method:
    """What a method that is wrapped or relied on must look like."""

    owner: str
    name: str
    parameters: tuple[str, ...] | None = None
    """None where they do not matter."""
    is_coroutine: bool = True
    uses: frozenset[str] = frozenset()

    def difference(self, module: ModuleType) -> str | None:
        where = f"{self.owner}.{self.name}"
        function = vars(getattr(module, self.owner, object)).get(self.name)
        if function is None:
            return f"{where} is missing"
        parameters = tuple(inspect.signature(function).parameters)
        if self.parameters is not None and parameters != self.parameters:
            return f"{where} takes {parameters}, not {self.parameters}"
        if inspect.iscoroutinefunction(function) != self.is_coroutine:
            return f"{where} is {'not ' if self.is_coroutine else ''}a coroutine function"
        code = getattr(inspect.unwrap(function), "__code__", None)
        unused = self.uses - set(getattr(code, "co_names", ()))
        return f"{where} does not use {', '.join(sorted(unused))}" if unused else None


def _methods(shape: Shape) -> list[_Method]:
    dialled_by = frozenset({"_ensure_session", "ws_connect", "_api_key"})
    used_per_turn = frozenset({"_tts", "_connect_ws", "_close_ws", "_conn_options"})
    return [
        _Method("TTS", "_connect_ws", shape.value, uses=dialled_by),
        _Method("TTS", "_close_ws", ("self", "ws"), uses=frozenset({"close"})),
        _Method("TTS", "_ensure_session", ("self",), is_coroutine=False),
        _Method("TTS", "update_options", is_coroutine=False, uses=frozenset({"_opts"})),
        _Method("TTS", "aclose", ("self",)),
        _Method(
            "SynthesizeStream",
            "_run_ws",
            ("self", "input_stream", "output_emitter"),
            uses=used_per_turn,
        ),
    ]


def check_version() -> Shape:
    """The shape of the installed distribution, by its version alone.

    Raises:
        UnsupportedPluginError: it is not installed, or not a verified version.
    """
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedPluginError(f"{DISTRIBUTION} is not installed; {_SUPPORTED}") from None
    if version not in VERIFIED:
        raise UnsupportedPluginError(f"found {DISTRIBUTION} {version}; {_SUPPORTED}")
    return VERIFIED[version]


def check_module(module: ModuleType, shape: Shape) -> None:
    """Compares the imported plugin with what its version promises.

    Raises:
        UnsupportedPluginError: something differs; the message names it.
    """
    differences = [d for method in _methods(shape) if (d := method.difference(module))]
    if "prewarm" in vars(getattr(module, "TTS", object)):
        differences.append("TTS has a prewarm of its own")
    if differences:
        raise UnsupportedPluginError(
            f"{DISTRIBUTION} is not what its version says (edited or vendored?):"
            f" {'; '.join(differences)}. {_SUPPORTED}"
        )
