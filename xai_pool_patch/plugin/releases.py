"""Detects the shape of the installed plugin from its version and its code, or refuses it.

The plugin is accepted by its version and its shape, livekit-agents by its shape alone: pip installs
any release of it beside a plugin that is pinned. This module patches nothing and imports nothing of
the two.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import UnsupportedPluginError
from .looks import Imported, InFile, Method, View, code_of, find

DISTRIBUTION = "livekit-plugins-xai"
FRAMEWORK = "livekit-agents"
MODULE = "livekit.plugins.xai.tts"
PACKAGES = {DISTRIBUTION: "livekit.plugins.xai", FRAMEWORK: "livekit.agents"}
"""The package of each distribution. It has a `__version__`, and a module `version` that sets it."""
NEXT_MAJOR = 2
"""Of livekit-agents: xai_pool_patch requires a version below it."""
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
    """Versions of the plugin with one and the same `tts.py`, which has been read."""

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


def _uses(*names: str) -> frozenset[str]:
    return frozenset(names)


_DIAL_USES = _uses("_ensure_session", "ws_connect", "_api_key")
_RUN_WS = ("self", "input_stream", "output_emitter")

_IN_EVERY_SHAPE = (
    Method("TTS", "_close_ws", ("self", "ws"), uses=_uses("close")),
    Method("TTS", "_ensure_session", ("self",), is_coroutine=False),
    Method("TTS", "synthesize", is_coroutine=False, uses=_uses("_synthesize_with_stream")),
    Method("SynthesizeStream", "__init__", is_coroutine=False, uses=_uses("_tts", "_opts")),
    Method("SynthesizeStream", "_run", uses=_uses("ClientResponseError", "APIStatusError")),
)
_WITHOUT_POOL = (
    *_IN_EVERY_SHAPE,
    Method("TTS", "update_options", is_coroutine=False, uses=_uses("_opts")),
    Method("TTS", "aclose", ("self",)),
    Method(
        "SynthesizeStream",
        "_run_ws",
        _RUN_WS,
        uses=_uses("_tts", "_connect_ws", "_close_ws", "_conn_options"),
    ),
)
_METHODS = {
    Shape.READS_OPTIONS: (
        *_WITHOUT_POOL,
        Method("TTS", "_connect_ws", ("self", "timeout"), uses=_DIAL_USES | {"_opts"}),
    ),
    Shape.TAKES_OPTIONS: (
        *_WITHOUT_POOL,
        Method("TTS", "_connect_ws", ("self", "timeout", "opts"), uses=_DIAL_USES),
    ),
    Shape.NATIVE_POOL: (
        *_IN_EVERY_SHAPE,
        Method("TTS", "__init__", is_coroutine=False, uses=_uses("ConnectionPool", "_pool")),
        Method("TTS", "_connect_ws", ("self", "timeout", "opts"), uses=_DIAL_USES),
        Method("TTS", "_connect_pooled_ws", ("self", "timeout"), uses=_uses("_connect_ws")),
        Method("TTS", "_close_pooled_ws", ("self", "ws"), uses=_uses("_close_ws")),
        Method("TTS", "update_options", is_coroutine=False, uses=_uses("_pool", "invalidate")),
        Method("TTS", "prewarm", ("self",), is_coroutine=False, uses=_uses("_pool", "prewarm")),
        Method("TTS", "aclose", ("self",), uses=_uses("_pool", "aclose")),
        Method(
            "SynthesizeStream",
            "_run_ws",
            _RUN_WS,
            uses=_uses("_tts", "_pool", "connection", "_conn_options")
            | _uses("last_acquire_time", "last_connection_reused"),
        ),
    ),
}


@dataclass(frozen=True)
class _Part:
    """Names of livekit-agents that the patch uses.

    Attributes:
        module: where the patch imports them from.
        defined_in: the module whose file has them, in every release that was read.
    """

    module: str
    defined_in: str
    methods: tuple[Method, ...]


_METRICS = _uses("_acquire_time", "_connection_reused")
_FRAMEWORK = (
    _Part(
        "livekit.agents",
        "livekit.agents._exceptions",
        (
            Method("APIError", "__init__", is_coroutine=False, uses=_uses("message", "retryable")),
            Method("APIConnectionError", "__init__", is_coroutine=False),
            Method("APIStatusError", "__init__", is_coroutine=False, uses=_uses("status_code")),
        ),
    ),
    _Part(
        "livekit.agents",
        "livekit.agents.job",
        (
            Method("", "get_job_context", is_coroutine=False),
            Method("JobContext", "add_shutdown_callback", is_coroutine=False),
        ),
    ),
    _Part(
        "livekit.agents.tts",
        "livekit.agents.tts.tts",
        (
            Method("ChunkedStream", "__init__", is_coroutine=False, uses=_METRICS),
            Method("ChunkedStream", "_run"),
            Method("SynthesizeStream", "__init__", is_coroutine=False, uses=_METRICS),
            Method("TTS", "prewarm", ("self",), is_coroutine=False),
        ),
    ),
    _Part(
        "livekit.agents.llm",
        "livekit.agents.llm.realtime",
        (Method("RealtimeModel", "__init__", is_coroutine=False),),
    ),
    _Part(
        "livekit.agents.utils",
        "livekit.agents.utils.misc",
        (Method("", "is_given", is_coroutine=False),),
    ),
)
_NATIVE_POOL = _Part(
    "livekit.agents.utils",
    "livekit.agents.utils.connection_pool",
    (
        Method(
            "ConnectionPool",
            "__init__",
            is_coroutine=False,
            uses=_uses("_available", "_connect_cb", "_max_session_duration", "_prewarm_task")
            | _uses("last_acquire_time", "last_connection_reused"),
        ),
        Method(
            "ConnectionPool",
            "connection",
            ("self", "timeout"),
            is_coroutine=False,
            uses=_uses("get", "put", "remove"),
        ),
        Method("ConnectionPool", "get", ("self", "timeout")),
        Method("ConnectionPool", "put", ("self", "conn"), is_coroutine=False),
        Method("ConnectionPool", "remove", ("self", "conn"), is_coroutine=False),
        Method("ConnectionPool", "invalidate", ("self",), is_coroutine=False),
        Method("ConnectionPool", "prewarm", ("self",), is_coroutine=False),
        Method("ConnectionPool", "aclose", ("self",)),
        Method("ConnectionPool", "_drain_to_close", ("self",)),
    ),
)
"""Used beside a plugin with a native pool. The last method closes what that pool has open."""


def differences(view: View, shape: Shape) -> list[str]:
    """The differences between the plugin and a shape, in words."""
    found = [d for method in _METHODS[shape] if (d := method.difference(view))]
    if shape is not Shape.NATIVE_POOL and view.overrides("TTS", "prewarm"):
        found.append("TTS has a prewarm of its own")
    return found


_EMIT = Method("AgentSession", "emit", ("self", "event", "arg"), is_coroutine=False)


def session_type() -> tuple[type | None, str | None]:
    """The framework's AgentSession; else None, and what differs from the one that is known."""
    module = sys.modules.get(SESSION_MODULE)
    if module is None:
        return None, f"{SESSION_MODULE} is not imported"
    difference = _EMIT.difference(Imported(module))
    return (None, difference) if difference else (module.AgentSession, None)


def imported_plugin() -> ModuleType | None:
    """The plugin's module; None until its import has ended."""
    module = sys.modules.get(MODULE)
    spec = getattr(module, "__spec__", None)
    # The interpreter itself uses this mark, when a second thread imports the same module.
    return None if getattr(spec, "_initializing", False) else module


def installed_version(distribution: str = DISTRIBUTION) -> str:
    """The installed version of a distribution, as its metadata say it, else as its package does.

    Raises:
        UnsupportedPluginError: the distribution is not installed, or nothing says its version.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    version = _said_version(PACKAGES[distribution])
    if version is None:
        raise UnsupportedPluginError(_why_no_version(distribution))
    return version


def _said_version(package: str) -> str | None:
    """The version in the code of a package. A frozen application may have no other."""
    said = getattr(sys.modules.get(package), "__version__", None)
    if said is None and (code := code_of(f"{package}.version")) is not None:
        scope: dict[str, object] = {}
        exec(code, scope)  # one assignment; an import would run the package above it
        said = scope.get("__version__")
    return said if isinstance(said, str) else None


def _why_no_version(distribution: str) -> str:
    if find(PACKAGES[distribution]) is None:
        return f"{distribution} is not installed; xai_pool_patch supports {SUPPORTED}"
    return (
        f"{distribution} is there, but nothing says its version: its metadata are missing, as in a"
        f" frozen application. Add them (PyInstaller: --copy-metadata {distribution})"
    )


def check_files(version: str, *, allow_unverified: bool) -> None:
    """Check the plugin before it is imported, as far as its files show what `detect` will find.

    Raises:
        UnsupportedPluginError: as from `detect`.
    """
    code = code_of(MODULE)
    if code is not None:
        shape = _shape_of(InFile(code), version, allow_unverified)
    elif (release := release_of(version)) is not None:
        shape = release.shape
    elif allow_unverified:
        return
    else:
        raise UnsupportedPluginError(f"{_found(version)}. install(allow_unverified=True) takes it")
    _check_framework(shape, _view_of_file)


def detect(module: ModuleType, version: str, *, allow_unverified: bool) -> Shape:
    """The shape of the imported plugin.

    Raises:
        UnsupportedPluginError: the plugin is not what its version says, or has no known shape, or
            its version is neither verified nor allowed; or livekit-agents has another shape than
            the patch relies on. The message names what differs.
    """
    shape = _shape_of(Imported(module), version, allow_unverified)
    _check_framework(shape, _view_of_import)
    return shape


def _shape_of(view: View, version: str, allow_unverified: bool) -> Shape:
    release = release_of(version)
    if release is None:
        return _shape_of_unverified(view, version, allow_unverified)
    found = differences(view, release.shape)
    if found:
        raise UnsupportedPluginError(
            f"{DISTRIBUTION} {version} is not what its version says (edited or vendored?):"
            f" {'; '.join(found)}. xai_pool_patch supports {SUPPORTED}, as published"
        )
    return release.shape


def _shape_of_unverified(view: View, version: str, allow_unverified: bool) -> Shape:
    by_shape = {shape: differences(view, shape) for shape in Shape}
    nearest = min(by_shape, key=lambda shape: len(by_shape[shape]))
    if by_shape[nearest]:
        raise UnsupportedPluginError(
            f"{_found(version)}, and it differs from them: {'; '.join(by_shape[nearest])}"
        )
    if not allow_unverified:
        raise UnsupportedPluginError(
            f"{_found(version)}. It looks the same ({nearest.value}):"
            " install(allow_unverified=True) takes it"
        )
    return nearest


def _found(version: str) -> str:
    return f"found {DISTRIBUTION} {version}; verified are {SUPPORTED}"


def _check_framework(shape: Shape, view_of: Callable[[_Part], View | None]) -> None:
    parts = (*_FRAMEWORK, _NATIVE_POOL) if shape is Shape.NATIVE_POOL else _FRAMEWORK
    found = [d for part in parts for d in _differences_of_part(part, view_of(part))]
    version = _framework_version()
    major = version.partition(".")[0]
    if major.isdigit() and int(major) >= NEXT_MAJOR:
        found.insert(0, f"it is not below {NEXT_MAJOR}")
    if found:
        raise UnsupportedPluginError(
            f"found {FRAMEWORK} {version}, which differs from what xai_pool_patch relies on"
            f" beside this plugin: {'; '.join(found)}. Releases up to"
            f" {RELEASES[-1].versions[-1]} do not"
        )


def _differences_of_part(part: _Part, view: View | None) -> list[str]:
    if view is None:
        return []
    return [d for method in part.methods if (d := method.difference(view))]


def _view_of_import(part: _Part) -> View | None:
    module = sys.modules.get(part.module)
    return None if module is None else Imported(module)


def _view_of_file(part: _Part) -> View | None:
    """None if that file has not what it had: another may. The import shows it."""
    code = code_of(part.defined_in)
    view = None if code is None else InFile(code)
    moved = view is None or not all(view.has(method.owner) for method in part.methods)
    return None if moved else view


def _framework_version() -> str:
    try:
        return installed_version(FRAMEWORK)
    except UnsupportedPluginError:
        return "of unknown version"


def is_as_published(module: ModuleType, version: str) -> bool:
    """Whether the plugin's file is the one in the wheel of that version, byte for byte."""
    release = release_of(version)
    try:
        content = Path(module.__file__ or "").read_bytes()
    except OSError:  # a frozen application has no such file
        return False
    return release is not None and hashlib.sha256(content).hexdigest() == release.sha256
