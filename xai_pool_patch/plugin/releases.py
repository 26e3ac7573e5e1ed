"""Detects the shape of the installed plugin from its version and its code, or refuses it.

The plugin is accepted by its version and its shape, livekit-agents by its shape alone: pip installs
any release of it beside a plugin that is pinned. This module patches nothing and imports nothing of
the two.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from ..errors import UnsupportedPluginError
from ..telemetry.log import LogEvent, log_event
from .looks import Imported, InFile, Method, View, code_of, differences_of, find, methods_by_title

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


def _release(row: str) -> Release:
    shape, versions, sha256 = row.split(": ")
    return Release(tuple(_each_version(versions)), Shape(shape), sha256)


def _each_version(versions: str) -> Iterator[str]:
    """Of "1.5.17-18 1.6.0": 1.5.17, 1.5.18 and 1.6.0."""
    for series in versions.split():
        minor, _, patches = series.rpartition(".")
        first, _, last = patches.partition("-")
        yield from (f"{minor}.{patch}" for patch in range(int(first), int(last or first) + 1))


_ROWS = """
reads options: 1.5.2-18 1.6.0-1: fd9d6112ef88d481456ed70607ee0a74be6cb34b8cb1313d19823621a2ec0e87
takes options: 1.6.2-4: 5a997f858a4410c0d6a47d2d9a974b302a2eddca20c42f47611a586430d5cd17
native pool: 1.6.5: 6de19bc18fa9f83020a9c6123f33be31eda85914349c948d7ac372c548d04eb1
native pool: 1.6.6-10: 4a587c90e3f7bc35714e1222685a11bbe55e345d59aa4f54b83d4985f956c946
native pool: 1.7.0-1: 8a8c5c282dfd429efa2e0adac2b8ee829b8de958c5082921dcc47e7de5002f12
native pool: 1.8.0-9: 0edd02ed27abb2215d9ff08f8c534bc6653904c89cfe90e672ea9dd1c55ef5fb
"""
RELEASES = tuple(map(_release, _ROWS.strip().splitlines()))
"""Every version that is supported, oldest first."""

SUPPORTED = f"{RELEASES[0].versions[0]} to {RELEASES[-1].versions[-1]}"


def release_of(version: str) -> Release | None:
    return next((release for release in RELEASES if version in release.versions), None)


_PLUGIN = methods_by_title("""
reads options, takes options, native pool
    async TTS._close_ws(self, ws): close
    TTS._ensure_session(self)
    TTS.synthesize: _synthesize_with_stream
    SynthesizeStream.__init__: _tts _opts
    async SynthesizeStream._run: ClientResponseError APIStatusError
reads options, takes options
    TTS.update_options: _opts
    async TTS.aclose(self)
    async SynthesizeStream._run_ws(self, input_stream, output_emitter): \
        _tts _connect_ws _close_ws _conn_options
reads options
    async TTS._connect_ws(self, timeout): _ensure_session ws_connect _api_key _opts
takes options
    async TTS._connect_ws(self, timeout, opts): _ensure_session ws_connect _api_key
native pool
    TTS.__init__: ConnectionPool _pool
    async TTS._connect_ws(self, timeout, opts): _ensure_session ws_connect _api_key
    async TTS._connect_pooled_ws(self, timeout): _connect_ws
    async TTS._close_pooled_ws(self, ws): _close_ws
    TTS.update_options: _pool invalidate
    TTS.prewarm(self): _pool prewarm
    async TTS.aclose(self): _pool aclose
    async SynthesizeStream._run_ws(self, input_stream, output_emitter): \
        _tts _pool connection _conn_options last_acquire_time last_connection_reused
""")
"""What each shape of the plugin looks like."""
_METHODS = {
    shape: [each for title, methods in _PLUGIN.items() if shape.value in title for each in methods]
    for shape in Shape
}

_FRAMEWORK = methods_by_title("""
livekit.agents._exceptions as livekit.agents
    APIError.__init__: message retryable
    APIConnectionError.__init__
    APIStatusError.__init__: status_code
livekit.agents.job as livekit.agents
    get_job_context
    JobContext.add_shutdown_callback
livekit.agents.tts.tts as livekit.agents.tts
    ChunkedStream.__init__: _acquire_time _connection_reused
    async ChunkedStream._run
    SynthesizeStream.__init__: _acquire_time _connection_reused
    TTS.prewarm(self)
livekit.agents.llm.realtime as livekit.agents.llm
    RealtimeModel.__init__
livekit.agents.utils.misc as livekit.agents.utils
    is_given
""")
"""What the patch uses of livekit-agents: the module whose file has it in every release that was
read, and the one that the patch imports it from."""
_NATIVE_POOL = methods_by_title("""
livekit.agents.utils.connection_pool as livekit.agents.utils
    ConnectionPool.__init__: _available _connect_cb _max_session_duration _prewarm_task \
        last_acquire_time last_connection_reused
    ConnectionPool.connection(self, timeout): get put remove
    async ConnectionPool.get(self, timeout)
    ConnectionPool.put(self, conn)
    ConnectionPool.remove(self, conn)
    ConnectionPool.invalidate(self)
    ConnectionPool.prewarm(self)
    async ConnectionPool.aclose(self)
    async ConnectionPool._drain_to_close(self)
""")
"""Used beside a plugin with a native pool. The last method closes what that pool has open."""


def differences(view: View, shape: Shape) -> list[str]:
    """The differences between the plugin and a shape, in words."""
    found = differences_of(view, _METHODS[shape])
    if shape is not Shape.NATIVE_POOL and view.overrides("TTS", "prewarm"):
        found.append("TTS has a prewarm of its own")
    return found


_EMIT = Method.of("AgentSession.emit(self, event, arg)")


def session_type() -> type | None:
    """The framework's AgentSession; None if the signs of its replies cannot be had."""
    module: Any = sys.modules.get(SESSION_MODULE)
    missing = f"{SESSION_MODULE} is not imported"
    difference = missing if module is None else _EMIT.difference(Imported(module))
    if difference is not None:
        log_event(LogEvent.NO_SIGNS, reason=difference)
        return None
    return cast("type", module.AgentSession)


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
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    version = _said_version(PACKAGES[distribution])
    if version is not None:
        return version
    if find(PACKAGES[distribution]) is None:
        raise UnsupportedPluginError(
            f"{distribution} is not installed; xai_pool_patch supports {SUPPORTED}"
        )
    raise UnsupportedPluginError(
        f"{distribution} is there, but nothing says its version: its metadata are missing, as in a"
        f" frozen application. Add them (PyInstaller: --copy-metadata {distribution})"
    )


def _said_version(package: str) -> str | None:
    """The version in the code of a package. A frozen application may have no other."""
    said = getattr(sys.modules.get(package), "__version__", None)
    if said is None and (code := code_of(f"{package}.version")) is not None:
        scope: dict[str, object] = {}
        exec(code, scope)  # one assignment; an import would run the package above it
        said = scope.get("__version__")
    return said if isinstance(said, str) else None


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
    expected = [release.shape] if release is not None else list(Shape)
    by_shape = {shape: differences(view, shape) for shape in expected}
    nearest = min(expected, key=lambda shape: len(by_shape[shape]))
    found = "; ".join(by_shape[nearest])
    if found and release is not None:
        raise UnsupportedPluginError(
            f"{DISTRIBUTION} {version} is not what its version says (edited or vendored?): {found}."
            f" xai_pool_patch supports {SUPPORTED}, as published"
        )
    if found:
        raise UnsupportedPluginError(f"{_found(version)}, and it differs from them: {found}")
    if release is None and not allow_unverified:
        raise UnsupportedPluginError(
            f"{_found(version)}. It looks the same ({nearest.value}):"
            " install(allow_unverified=True) takes it"
        )
    return nearest


def _found(version: str) -> str:
    return f"found {DISTRIBUTION} {version}; verified are {SUPPORTED}"


def _check_framework(shape: Shape, view_of: Callable[[str, list[Method]], View | None]) -> None:
    parts = {**_FRAMEWORK, **_NATIVE_POOL} if shape is Shape.NATIVE_POOL else _FRAMEWORK
    views = ((view_of(title, methods), methods) for title, methods in parts.items())
    found = [d for view, methods in views if view for d in differences_of(view, methods)]
    version = "of unknown version"
    with contextlib.suppress(UnsupportedPluginError):
        version = installed_version(FRAMEWORK)
    major = version.partition(".")[0]
    if major.isdigit() and int(major) >= NEXT_MAJOR:
        found.insert(0, f"it is not below {NEXT_MAJOR}")
    if found:
        raise UnsupportedPluginError(
            f"found {FRAMEWORK} {version}, which differs from what xai_pool_patch relies on"
            f" beside this plugin: {'; '.join(found)}. Releases up to"
            f" {RELEASES[-1].versions[-1]} do not"
        )


def _view_of_import(title: str, methods: list[Method]) -> View | None:
    module = sys.modules.get(title.split()[-1])
    return None if module is None else Imported(module)


def _view_of_file(title: str, methods: list[Method]) -> View | None:
    """None if that file has not what it had: another may. The import shows it."""
    code = code_of(title.split()[0])
    if code is None or not all(InFile(code).has(each.owner) for each in methods):
        return None
    return InFile(code)
