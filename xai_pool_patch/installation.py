"""The public verbs: `install`, `uninstall`, `is_installed`, `stats`, `pool_stats`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from ._version import __version__
from .errors import (
    AlreadyInstalledError,
    InvalidOptionError,
    UnsupportedPluginError,
    XaiPoolPatchError,
)
from .options import PoolOptions
from .python import check_python
from .telemetry import announce
from .telemetry.log import LogEvent, log_event, prepare
from .telemetry.usage import Counters, PoolStats, Stats, stats_of

if TYPE_CHECKING:
    from .plugin.patching import Patch
    from .registry import Registry
    from .sessions import Store

OFF_SWITCH = "XAI_POOL_PATCH"
REDIS_URL = "XAI_POOL_PATCH_REDIS_URL"
"""The variable with the URL of a Redis, if the option `redis_url` has none."""
OFF = ("off", "0", "false", "no")
"""The values that switch the patch off, in either case."""


@dataclass(eq=False)
class Installation:
    """What `install()` sets up and `uninstall()` undoes."""

    options: PoolOptions
    version: str
    allow_unverified: bool
    on_unsupported: str
    store: Store | None
    registry: Registry | None = None
    patches: list[Patch] = field(default_factory=list)

    def apply(self, module: ModuleType) -> None:
        """Patch the imported plugin. If that fails, leave the plugin as it was.

        Raises:
            UnsupportedPluginError: this plugin may not be patched.
        """
        from .plugin.releases import FRAMEWORK, detect, installed_version
        from .plugin.wrappers import patches_for
        from .registry import Registry
        from .telemetry import metrics

        shape = detect(module, self.version, allow_unverified=self.allow_unverified)
        self.registry = Registry(self.options, self.store)
        try:
            patches, asking = patches_for(module, shape, self.registry)
            for patch in patches:
                patch.apply()
                self.patches.append(patch)
            asking.patched()
        except BaseException:
            self.undo()
            raise
        agents = installed_version(FRAMEWORK)
        metrics.install({"version": __version__, "plugin": self.version, "agents": agents})
        told = announce.changed(self.options)
        announce.announce(
            LogEvent.INSTALLED, plugin=self.version, agents=agents, shape=shape.value, options=told
        )

    def on_import(self, module: ModuleType) -> None:
        """Patch the plugin when it has been imported.

        `install()` has checked the files, so only a plugin that was changed while it was imported,
        or whose files cannot be read, is refused here. An exception would make the plugin's import
        fail, and the application would lose its agent over a speed-up. So a problem is logged, and
        the plugin stays as it is.
        """
        global _installation
        with _lock:
            if _installation is not self or self.patches:
                return
            try:
                self.apply(module)
            except XaiPoolPatchError as error:
                _installation = None
                level = None if self.on_unsupported == "skip" else logging.ERROR
                announce.announce(LogEvent.REFUSED, level=level, reason=str(error))
            except Exception as fault:
                _installation = None
                log_event(LogEvent.FAULT, operation="install", error=fault)

    def undo(self) -> None:
        """Undo everything, in reverse order. An exception of one step comes after the last step."""
        from .telemetry import metrics

        with contextlib.ExitStack() as steps:
            steps.callback(metrics.uninstall)
            if self.registry is not None:
                steps.callback(self.registry.close)
            for patch in self.patches:
                steps.callback(patch.undo)
            self.patches = []


_lock = threading.RLock()
_installation: Installation | None = None


def install(
    options: PoolOptions | None = None,
    *,
    allow_unverified: bool = False,
    on_unsupported: Literal["raise", "skip"] = "raise",
) -> None:
    """Make every TTS of livekit-plugins-xai in this process take its connections from a pool.

    Call it before or after the plugin is imported; it does not import the plugin. A second call
    with the same options does nothing. With `XAI_POOL_PATCH=off` in the environment (or `0`,
    `false`, `no`), `install()` only logs that it is switched off; if a parent process has installed
    the patch, it uninstalls it.

    Args:
        options: how the pool behaves; the defaults suit one conversation per TTS.
        allow_unverified: accept a version of the plugin that is not among the verified ones, if
            everything that is wrapped or relied on looks the same.
        on_unsupported: what to do if the plugin, livekit-agents or the Python is not supported:
            `"raise"`, or `"skip"` to log a warning and leave the plugin as it is. With `"skip"`, a
            Redis URL that cannot be used is a warning, too, and the pools keep nothing between
            replies.

    Raises:
        UnsupportedPluginError: the plugin is missing, or it, livekit-agents or the Python is not
            supported. What the files of a plugin do not show before its import is logged instead.
        AlreadyInstalledError: the patch is installed with other options.
        InvalidOptionError: an argument has a wrong type or value.
    """
    try:
        _install(options, allow_unverified, on_unsupported)
    except XaiPoolPatchError:
        raise
    except Exception as fault:
        # The application would lose its agent over a speed-up.
        log_event(LogEvent.FAULT, operation="install", error=fault)


def _install(options: PoolOptions | None, allow_unverified: bool, on_unsupported: str) -> None:
    global _installation
    options = _checked(options, allow_unverified, on_unsupported)
    prepare()
    if is_switched_off():
        uninstall()  # a parent process, or a preload, may have installed it
        announce.announce(LogEvent.SWITCHED_OFF, variable=OFF_SWITCH)
        return
    with _lock:
        if _installation is not None:
            _check_same(_installation.options, options)
            return
        try:
            _installation = _prepare(options, allow_unverified, on_unsupported)
        except UnsupportedPluginError as error:
            if on_unsupported == "raise":
                raise
            announce.announce(LogEvent.REFUSED, reason=str(error))


def uninstall() -> None:
    """Restore the plugin as it was.

    Current utterances are spoken to their end. Idle connections are closed in the background,
    leased ones when their utterance ends. If nothing is installed, this does nothing.
    """
    global _installation
    # The lock is held to the end. An install() in another thread would otherwise wrap attributes
    # that this call is about to restore.
    with _lock:
        installation, _installation = _installation, None
        if installation is None:
            return
        for patch in installation.patches:
            patch.switch.clear()  # a wrapper that cannot be removed then only passes calls on
        try:
            installation.undo()
        except Exception as fault:
            log_event(LogEvent.FAULT, operation="uninstall", error=fault)
    announce.withdraw()
    log_event(LogEvent.UNINSTALLED)


def is_switched_off() -> bool:
    """Whether the environment switches the patch off."""
    return os.environ.get(OFF_SWITCH, "").strip().lower() in OFF


def is_installed() -> bool:
    """Whether the plugin is patched, or will be as soon as it is imported."""
    return _installation is not None


def stats() -> Stats:
    """A snapshot of all pools of this process; all zero while nothing is installed.

    Every key is always there. Times are in milliseconds. Any thread may call this.
    """
    registry = _registry()
    return registry.stats() if registry is not None else stats_of([], Counters())


def pool_stats() -> list[PoolStats]:
    """A snapshot of each pool. Units and threads as with `stats()`.

    There is a pool for every event loop and everything that a TTS asks for when it connects: API
    key, HTTP session, voice and so on. Each has a number, `pool`, which its log records carry too,
    as `xai_pool_number`. A snapshot holds no secret.
    """
    registry = _registry()
    return registry.pool_stats() if registry is not None else []


def _registry() -> Registry | None:
    installation = _installation  # another thread may uninstall meanwhile
    return installation.registry if installation is not None else None


def _checked(options: object, allow_unverified: bool, on_unsupported: str) -> PoolOptions:
    options = PoolOptions() if options is None else options
    if not isinstance(allow_unverified, bool):
        problem = f"allow_unverified must be True or False, not {allow_unverified!r}"
    elif on_unsupported not in ("raise", "skip"):
        problem = f"on_unsupported must be 'raise' or 'skip', not {on_unsupported!r}"
    elif not isinstance(options, PoolOptions):
        problem = f"options must be PoolOptions or None, not {type(options)!r}"
    else:
        return options
    raise InvalidOptionError(problem)


def _check_same(installed: PoolOptions, wanted: PoolOptions) -> None:
    found = []
    for option in fields(PoolOptions):
        one, other = getattr(installed, option.name), getattr(wanted, option.name)
        if one != other and option.repr:
            found.append(f"{option.name}={one!r}, not {other!r}")
        elif one != other:  # a URL may contain a password
            found.append(f"another {option.name}")
    if found:
        raise AlreadyInstalledError(
            f"already installed with {'; '.join(found)}; to change that, call uninstall() first,"
            " or install() only once"
        )


def _prepare(options: PoolOptions, allow_unverified: bool, on_unsupported: str) -> Installation:
    from .plugin.releases import check_files, imported_plugin, installed_version

    store = _store(options, on_unsupported)
    check_python()
    version = installed_version()
    installation = Installation(options, version, allow_unverified, on_unsupported, store)
    if imported_plugin() is None:
        check_files(version, allow_unverified=allow_unverified)
        _hook_import(installation.on_import)
    # Again, since another thread's import may have ended after the first look and before the hook
    # was in place. Nothing would patch that plugin.
    module = imported_plugin()
    if module is not None:
        installation.apply(module)
    return installation


def _store(options: PoolOptions, on_unsupported: str) -> Store | None:
    """
    Raises:
        InvalidOptionError: the Redis that the option or the environment names cannot be used.
    """
    from .sessions import store_from

    named, url = "redis_url", options.redis_url
    if url is None:
        named, url = REDIS_URL, os.environ.get(REDIS_URL, "").strip() or None
    try:
        return store_from(url, named)
    except InvalidOptionError as error:
        if on_unsupported == "raise":
            raise
        log_event(LogEvent.STORE_FAILED, store="redis", operation="open", reason=str(error))
        return None


def _hook_import(hook: Callable[[ModuleType], None]) -> None:
    """Call a hook with the plugin's module when its import ends, even if it has begun already."""
    import wrapt

    from .plugin.releases import MODULE

    wrapt.register_post_import_hook(hook, MODULE)
    package, _, name = MODULE.rpartition(".")
    parent = sys.modules.get(package)
    if parent is not None and not hasattr(parent, name):
        # The import may have begun, and be past the point at which wrapt notices it. Waiting for
        # its end could be a deadlock: this thread may run it, or hold a lock that it needs.
        _hook_binding(parent, name, hook)


def _hook_binding(parent: ModuleType, name: str, hook: Callable[[ModuleType], None]) -> None:
    """Call a hook with a submodule when its import ends, by binding its name in the parent."""
    original: Any = type(parent)

    class Watched(original):  # type: ignore[misc]
        def __setattr__(self, attribute: str, value: Any) -> None:
            super().__setattr__(attribute, value)
            if attribute == name and type(self) is Watched:
                self.__class__ = original
                hook(value)

    parent.__class__ = Watched
