"""Puts the wrappers into the plugin and takes them out again.

The only module that changes the plugin's classes. What is changed is kept as data, one record
each, so that putting in and taking out walk the same list.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .errors import (
    AlreadyInstalledError,
    InvalidOptionError,
    UnsupportedPluginError,
    XaiPoolPatchError,
)
from .options import PoolOptions
from .python import check_python
from .telemetry.log import Event, tell
from .telemetry.stats import Counters, PoolStats, Stats, stats_of

if TYPE_CHECKING:
    from .shared import Registry

OFF_SWITCH = "XAI_POOL_PATCH"


class _Missing(enum.Enum):
    MISSING = "missing"


@dataclass(eq=False)
class Patch:
    """One attribute of one class, and what stands in for it.

    Args:
        stand_in: makes it from what there was, and from the switch.
        after: what else there is to undo.
        switch: not empty while what stands in is to be used. wrapt looks at it in each call; a list
            needs no call of ours, which could fail.
    """

    owner: type
    name: str
    stand_in: Callable[[Any, list[str]], Any]
    after: Callable[[], None] = lambda: None
    switch: list[str] = field(default_factory=list)
    _original: Any = _Missing.MISSING
    _ours: Any = None

    def apply(self) -> None:
        self._original = vars(self.owner).get(self.name, _Missing.MISSING)
        inherited = getattr(self.owner, self.name, None)
        self._ours = self.stand_in(inherited, self.switch)
        setattr(self.owner, self.name, self._ours)
        self.switch.append("on")

    def undo(self) -> None:
        """Takes out what is ours. Beneath somebody else's wrapper it only passes through."""
        self.switch.clear()
        try:
            if vars(self.owner).get(self.name) is not self._ours:
                tell(Event.COVERED, attribute=f"{self.owner.__name__}.{self.name}")
            elif self._original is _Missing.MISSING:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._original)
        finally:
            self.after()


@dataclass(eq=False)
class Installation:
    """From `install()` to `uninstall()`."""

    options: PoolOptions
    version: str
    allow_unverified: bool
    registry: Registry | None = None
    patches: list[Patch] = field(default_factory=list)

    def apply(self, module: ModuleType) -> None:
        """Patches the imported plugin, or leaves it as it was.

        Raises:
            UnsupportedPluginError: it is not a plugin that may be patched.
        """
        from .plugin import recognise
        from .shared import Registry
        from .wrappers import patches_for

        shape = recognise(module, self.version, allow_unverified=self.allow_unverified)
        self.registry = Registry(self.options)
        try:
            for patch in patches_for(module, shape, self.registry):
                patch.apply()
                self.patches.append(patch)
        except BaseException:
            self.undo()
            raise
        tell(Event.INSTALLED, plugin=self.version, shape=shape.value)

    def on_import(self, module: ModuleType) -> None:
        """Patches the plugin as soon as it has been imported.

        Whatever is wrong must not make that import fail: the application would lose its agent
        over a speed-up. It is told in the log, and the plugin stays as it is.
        """
        global _installation
        with _lock:
            if _installation is not self or self.patches:
                return
            try:
                self.apply(module)
            except XaiPoolPatchError as error:
                _installation = None
                tell(Event.REFUSED, level=logging.ERROR, reason=str(error))
            except Exception as fault:
                _installation = None
                tell(Event.FAULT, operation="install", error=fault)

    def undo(self) -> None:
        """Backwards, to the end: what one step raises comes out when all have been taken."""
        with contextlib.ExitStack() as steps:
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
    """Makes every TTS of livekit-plugins-xai in this process draw its connections from a pool.

    May be called before or after the plugin is imported, and does not import it. Calling it again
    with the same options does nothing. With `XAI_POOL_PATCH=off` in the environment it logs that
    and does nothing else.

    Args:
        options: how the pool behaves; the defaults suit one conversation per TTS.
        allow_unverified: takes a version of the plugin or of livekit-agents that is not among the
            verified ones, as long as everything that is wrapped or relied on looks the same.
        on_unsupported: what to do about a plugin or a Python that is not supported: `"raise"`, or
            `"skip"` to log a warning and leave the plugin as it is.

    Raises:
        UnsupportedPluginError: the plugin is missing, or it or the Python is not supported.
        AlreadyInstalledError: it is installed with other options.
        InvalidOptionError: an argument is not what it should be.
    """
    try:
        _install(options, allow_unverified, on_unsupported)
    except XaiPoolPatchError:
        raise
    except Exception as fault:
        # The application would lose its agent over a speed-up.
        tell(Event.FAULT, operation="install", error=fault)


def _install(options: PoolOptions | None, allow_unverified: bool, on_unsupported: str) -> None:
    global _installation
    options = _checked(options, allow_unverified, on_unsupported)
    if is_switched_off():
        tell(Event.SWITCHED_OFF, variable=OFF_SWITCH)
        return
    with _lock:
        if _installation is not None:
            _check_same(_installation.options, options)
            return
        try:
            _installation = _prepare(options, allow_unverified)
        except UnsupportedPluginError as error:
            if on_unsupported == "raise":
                raise
            tell(Event.REFUSED, reason=str(error))


def uninstall() -> None:
    """Gives the plugin back as it was.

    Utterances under way are spoken to their end; idle connections are closed in the background,
    the others when their utterance ends. Without an installation it does nothing.
    """
    global _installation
    with _lock:  # to its end: nobody installs on top of what is half undone
        installation, _installation = _installation, None
        if installation is None:
            return
        for patch in installation.patches:
            patch.switch.clear()  # whatever fails from here on, what is left passes calls through
        try:
            installation.undo()
        except Exception as fault:
            tell(Event.FAULT, operation="uninstall", error=fault)
    tell(Event.UNINSTALLED)


def is_switched_off() -> bool:
    """Whether the environment keeps the patch out."""
    return os.environ.get(OFF_SWITCH, "").strip().lower() == "off"


def is_installed() -> bool:
    """Whether the plugin is patched, or will be as soon as it is imported."""
    return _installation is not None


def stats() -> Stats:
    """A snapshot of all pools of this process; all zero while nothing is installed.

    Every key is always there. Times are in milliseconds. May be called from any thread.
    """
    installation = _installation
    if installation is None or installation.registry is None:
        return stats_of([], Counters())
    return installation.registry.stats()


def pool_stats() -> list[PoolStats]:
    """A snapshot of each pool that there is; like `stats()` otherwise.

    There is one for every event loop, API key, HTTP session and set of options in use. They are
    told apart by the number that their log records carry, and by nothing that would be secret.
    """
    installation = _installation
    if installation is None or installation.registry is None:
        return []
    return installation.registry.pool_stats()


def _checked(
    options: PoolOptions | None, allow_unverified: bool, on_unsupported: str
) -> PoolOptions:
    if not isinstance(allow_unverified, bool):
        raise InvalidOptionError(
            f"allow_unverified must be True or False, not {allow_unverified!r}"
        )
    if on_unsupported not in ("raise", "skip"):
        raise InvalidOptionError(
            f"on_unsupported must be 'raise' or 'skip', not {on_unsupported!r}"
        )
    if options is None:
        return PoolOptions()
    if not isinstance(options, PoolOptions):
        raise InvalidOptionError(f"options must be PoolOptions or None, not {type(options)!r}")
    return options


def _check_same(installed: PoolOptions, wanted: PoolOptions) -> None:
    if wanted != installed:
        raise AlreadyInstalledError(
            f"already installed with {installed}; to change that to {wanted},"
            " call uninstall() first, or install() only once"
        )


def _prepare(options: PoolOptions, allow_unverified: bool) -> Installation:
    from .plugin import check_version, imported_plugin, installed_version

    check_python()
    version = installed_version()
    installation = Installation(options, version, allow_unverified)
    if imported_plugin() is None:
        check_version(version, allow_unverified=allow_unverified)
        _hook_import(installation.on_import)
    # Looked at again: another thread's import may have ended before it was hooked.
    module = imported_plugin()
    if module is not None:
        installation.apply(module)
    return installation


def _hook_import(hook: Callable[[ModuleType], None]) -> None:
    """Calls it with the plugin's module at the end of its import, be it to come or under way."""
    import wrapt

    from .plugin import MODULE

    wrapt.register_post_import_hook(hook, MODULE)
    package, _, name = MODULE.rpartition(".")
    parent = sys.modules.get(package)
    if parent is not None and not hasattr(parent, name):
        # That import may be past the point where wrapt hears of it. It is not waited for: it may be
        # this very thread's, or wait for a lock that this one holds.
        _hook_binding(parent, name, hook)


def _hook_binding(parent: ModuleType, name: str, hook: Callable[[ModuleType], None]) -> None:
    """Calls it with the submodule when that is bound in its parent, as each is when imported."""
    original: Any = type(parent)

    class Watched(original):  # type: ignore[misc]
        def __setattr__(self, attribute: str, value: Any) -> None:
            super().__setattr__(attribute, value)
            if attribute == name and type(self) is Watched:
                self.__class__ = original
                hook(value)

    parent.__class__ = Watched
