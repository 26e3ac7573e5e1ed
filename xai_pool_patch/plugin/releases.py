"""Detects the shape of the installed plugin from its version and its code, or refuses it.

This module patches nothing and imports nothing of the plugin.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import UnsupportedPluginError

DISTRIBUTION = "livekit-plugins-xai"
FRAMEWORK = "livekit-agents"
"""LiveKit releases it together with the plugin, under the same numbers."""
MODULE = "livekit.plugins.xai.tts"
SESSION_MODULE = "livekit.agents.voice.agent_session"


class Shape(enum.Enum):
    """How the plugin gets its connections."""

    READS_OPTIONS = "reads options"
    """The plugin opens one for each segment; `TTS._connect_ws` reads `self._opts`."""
    TAKES_OPTIONS = "takes options"
    """The same, but `TTS._connect_ws` takes the stream's own copy of the options."""
    NATIVE_POOL = "native pool"
    """Each TTS has a `ConnectionPool` of livekit-agents."""


@dataclass(frozen=True)
class Release:
    """Versions of the plugin with one and the same `tts.py`, which somebody has read."""

    versions: tuple[str, ...]
    shape: Shape
    sha256: str
    """Checksum of `livekit/plugins/xai/tts.py` in the published wheels."""


def _series(minor: str, first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{minor}.{patch}" for patch in range(first, last + 1))


RELEASES = (
    Release(
        _series("1.5", 2, 18) + _series("1.6", 0, 1),
        Shape.READS_OPTIONS,
        "fd9d6112ef88d481456ed70607ee0a74be6cb34b8cb1313d19823621a2ec0e87",
    ),
    Release(
        _series("1.6", 2, 4),
        Shape.TAKES_OPTIONS,
        "5a997f858a4410c0d6a47d2d9a974b302a2eddca20c42f47611a586430d5cd17",
    ),
    Release(
        ("1.6.5",),
        Shape.NATIVE_POOL,
        "6de19bc18fa9f83020a9c6123f33be31eda85914349c948d7ac372c548d04eb1",
    ),
    Release(
        _series("1.6", 6, 10),
        Shape.NATIVE_POOL,
        "4a587c90e3f7bc35714e1222685a11bbe55e345d59aa4f54b83d4985f956c946",
    ),
    Release(
        _series("1.7", 0, 1),
        Shape.NATIVE_POOL,
        "8a8c5c282dfd429efa2e0adac2b8ee829b8de958c5082921dcc47e7de5002f12",
    ),
    Release(
        _series("1.8", 0, 9),
        Shape.NATIVE_POOL,
        "0edd02ed27abb2215d9ff08f8c534bc6653904c89cfe90e672ea9dd1c55ef5fb",
    ),
)
"""Every version that is supported, oldest first."""

SUPPORTED = f"{RELEASES[0].versions[0]} to {RELEASES[-1].versions[-1]}"


def release_of(version: str) -> Release | None:
    return next((release for release in RELEASES if version in release.versions), None)


@dataclass(frozen=True)
class _Method:
    """What a method must look like that the patch wraps or relies on."""

    owner: str
    name: str
    parameters: tuple[str, ...] | None = None
    """None if they do not matter."""
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
        unwrapped = inspect.unwrap(function)  # others may have wrapped it
        if inspect.iscoroutinefunction(unwrapped) != self.is_coroutine:
            return f"{where} is {'not ' if self.is_coroutine else ''}a coroutine function"
        code = getattr(unwrapped, "__code__", None)
        unused = self.uses - set(getattr(code, "co_names", ()))
        return f"{where} does not use {', '.join(sorted(unused))}" if unused else None


def _uses(*names: str) -> frozenset[str]:
    return frozenset(names)


_DIAL_USES = _uses("_ensure_session", "ws_connect", "_api_key")
_RUN_WS = ("self", "input_stream", "output_emitter")

_IN_EVERY_SHAPE = (
    _Method("TTS", "_close_ws", ("self", "ws"), uses=_uses("close")),
    _Method("TTS", "_ensure_session", ("self",), is_coroutine=False),
    _Method("TTS", "synthesize", is_coroutine=False, uses=_uses("_synthesize_with_stream")),
    _Method("SynthesizeStream", "__init__", is_coroutine=False, uses=_uses("_tts", "_opts")),
    _Method("SynthesizeStream", "_run", uses=_uses("ClientResponseError", "APIStatusError")),
)
_WITHOUT_POOL = (
    *_IN_EVERY_SHAPE,
    _Method("TTS", "update_options", is_coroutine=False, uses=_uses("_opts")),
    _Method("TTS", "aclose", ("self",)),
    _Method(
        "SynthesizeStream",
        "_run_ws",
        _RUN_WS,
        uses=_uses("_tts", "_connect_ws", "_close_ws", "_conn_options"),
    ),
)
_METHODS = {
    Shape.READS_OPTIONS: (
        *_WITHOUT_POOL,
        _Method("TTS", "_connect_ws", ("self", "timeout"), uses=_DIAL_USES | {"_opts"}),
    ),
    Shape.TAKES_OPTIONS: (
        *_WITHOUT_POOL,
        _Method("TTS", "_connect_ws", ("self", "timeout", "opts"), uses=_DIAL_USES),
    ),
    Shape.NATIVE_POOL: (
        *_IN_EVERY_SHAPE,
        _Method("TTS", "__init__", is_coroutine=False, uses=_uses("ConnectionPool", "_pool")),
        _Method("TTS", "_connect_ws", ("self", "timeout", "opts"), uses=_DIAL_USES),
        _Method("TTS", "_connect_pooled_ws", ("self", "timeout"), uses=_uses("_connect_ws")),
        _Method("TTS", "_close_pooled_ws", ("self", "ws"), uses=_uses("_close_ws")),
        _Method("TTS", "update_options", is_coroutine=False, uses=_uses("_pool", "invalidate")),
        _Method("TTS", "prewarm", ("self",), is_coroutine=False, uses=_uses("_pool", "prewarm")),
        _Method("TTS", "aclose", ("self",), uses=_uses("_pool", "aclose")),
        _Method(
            "SynthesizeStream",
            "_run_ws",
            _RUN_WS,
            uses=_uses("_tts", "_pool", "connection", "_conn_options")
            | _uses("last_acquire_time", "last_connection_reused"),
        ),
    ),
}


def differences(module: ModuleType, shape: Shape) -> list[str]:
    """The differences between the imported plugin and a shape, in words."""
    found = [d for method in _METHODS[shape] if (d := method.difference(module))]
    if shape is not Shape.NATIVE_POOL and _has_own_prewarm(getattr(module, "TTS", object)):
        found.append("TTS has a prewarm of its own")
    return found


def _has_own_prewarm(tts_type: type) -> bool:
    """Whether the TTS overrides `prewarm`. A wrapper around the inherited one does not count."""
    owners = [vars(owner)["prewarm"] for owner in tts_type.__mro__ if "prewarm" in vars(owner)]
    return "prewarm" in vars(tts_type) and len({inspect.unwrap(each) for each in owners}) > 1


_EMIT = _Method("AgentSession", "emit", ("self", "event", "arg"), is_coroutine=False)


def session_type() -> tuple[type | None, str | None]:
    """The framework's AgentSession; else None, and what differs from the one that is known."""
    module = sys.modules.get(SESSION_MODULE)
    if module is None:
        return None, f"{SESSION_MODULE} is not imported"
    difference = _EMIT.difference(module)
    return (None, difference) if difference else (module.AgentSession, None)


def imported_plugin() -> ModuleType | None:
    """The plugin's module; None until its import has ended."""
    module = sys.modules.get(MODULE)
    spec = getattr(module, "__spec__", None)
    # The interpreter itself uses this mark, when a second thread imports the same module.
    return None if getattr(spec, "_initializing", False) else module


def installed_version(distribution: str = DISTRIBUTION) -> str:
    """The installed version of a distribution.

    Raises:
        UnsupportedPluginError: the distribution is not installed.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedPluginError(
            f"{distribution} is not installed; xai_pool_patch supports {SUPPORTED}"
        ) from None


def check_version(version: str, *, allow_unverified: bool) -> None:
    """Check the version alone, before the plugin is imported.

    Raises:
        UnsupportedPluginError: the version is not verified, and no other is allowed.
    """
    if release_of(version) is None and not allow_unverified:
        raise UnsupportedPluginError(
            f"found {DISTRIBUTION} {version}; verified are {SUPPORTED}. If `xai-pool-patch check`"
            " finds that it looks like one of them, install(allow_unverified=True) takes it"
        )
    _check_framework(allow_unverified)


def _check_framework(allow_unverified: bool) -> None:
    version = installed_version(FRAMEWORK)
    if release_of(version) is None and not allow_unverified:
        raise UnsupportedPluginError(
            f"found {FRAMEWORK} {version}; verified are {SUPPORTED}."
            " install(allow_unverified=True) takes it"
        )


def detect(module: ModuleType, version: str, *, allow_unverified: bool) -> Shape:
    """The shape of the imported plugin.

    Raises:
        UnsupportedPluginError: the plugin is not what its version says, or has no known shape, or
            its version is neither verified nor allowed. The message names what differs.
    """
    release = release_of(version)
    if release is None:
        return _shape_of_unverified(module, version, allow_unverified)
    found = differences(module, release.shape)
    if found:
        raise UnsupportedPluginError(
            f"{DISTRIBUTION} {version} is not what its version says (edited or vendored?):"
            f" {'; '.join(found)}. xai_pool_patch supports {SUPPORTED}, as published"
        )
    _check_framework(allow_unverified)
    return release.shape


def _shape_of_unverified(module: ModuleType, version: str, allow_unverified: bool) -> Shape:
    by_shape = {shape: differences(module, shape) for shape in Shape}
    nearest = min(by_shape, key=lambda shape: len(by_shape[shape]))
    if by_shape[nearest]:
        raise UnsupportedPluginError(
            f"found {DISTRIBUTION} {version}; verified are {SUPPORTED}, and it differs from them:"
            f" {'; '.join(by_shape[nearest])}"
        )
    if not allow_unverified:
        raise UnsupportedPluginError(
            f"found {DISTRIBUTION} {version}; verified are {SUPPORTED}. It looks the same"
            f" ({nearest.value}): install(allow_unverified=True) takes it"
        )
    return nearest


def is_as_published(module: ModuleType, version: str) -> bool:
    """Whether the plugin's file is the one in the wheel of that version, byte for byte."""
    release = release_of(version)
    content = Path(module.__file__ or "").read_bytes()
    return release is not None and hashlib.sha256(content).hexdigest() == release.sha256
