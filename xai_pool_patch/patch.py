"""Puts the wrappers into the plugin and takes them out again.

The only module that changes the plugin's classes. What is changed is kept as data, one record
each, so that putting in and taking out walk the same list.
"""

from __future__ import annotations

import enum
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
from .telemetry import Counters, Stats, describe, log, stats_of

if TYPE_CHECKING:
    from .plugin import Shape
    from .shared import Registry

OFF_SWITCH = "XAI_POOL_PATCH"


class _Missing(enum.Enum):
    MISSING = "missing"


@dataclass(eq=False)
class Patch:
    """One method of one class, and what stands in for it."""

    owner: type
    name: str
    wrapper: Callable[..., Any]
    is_active: bool = False
    _original: Any = _Missing.MISSING
    _ours: Any = None

    def apply(self) -> None:
        import wrapt

        self._original = vars(self.owner).get(self.name, _Missing.MISSING)
        self._ours = wrapt.FunctionWrapper(
            getattr(self.owner, self.name), self.wrapper, enabled=lambda: self.is_active
        )
        setattr(self.owner, self.name, self._ours)
        self.is_active = True

    def undo(self) -> None:
        """Takes out what is ours. Beneath somebody else's wrapper it only passes through."""
        self.is_active = False
        if vars(self.owner).get(self.name) is not self._ours:
            log().warning(
                "wrapped by others, left in place to pass calls through",
                method=f"{self.owner.__name__}.{self.name}",
            )
        elif self._original is _Missing.MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._original)


@dataclass(eq=False)
class Installation:
    """From `install()` to `uninstall()`."""

    options: PoolOptions
    shape: Shape
    registry: Registry | None = None
    patches: list[Patch] = field(default_factory=list)

    def apply(self, module: ModuleType) -> None:
        """Patches the imported plugin, or leaves it as it was.

        Raises:
            UnsupportedPluginError: it is not what its version says.
        """
        from .plugin import check_module
        from .shared import Registry
        from .wrappers import Wrappers

        check_module(module, self.shape)
        self.registry = Registry(self.options)
        wrappers = Wrappers(self.registry, self.shape, vars(module.TTS)["_connect_ws"])
        patches = [
            Patch(module.SynthesizeStream, "_run_ws", wrappers.run_ws),
            Patch(module.TTS, "_connect_ws", wrappers.connect_ws),
            Patch(module.TTS, "prewarm", wrappers.prewarm),
            Patch(module.TTS, "update_options", wrappers.update_options),
            Patch(module.TTS, "aclose", wrappers.aclose),
        ]
        try:
            for patch in patches:
                patch.apply()
                self.patches.append(patch)
        except BaseException:
            self.undo()
            raise
        log().info("installed", shape=self.shape.name.lower())

    def on_import(self, module: ModuleType) -> None:
        """Patches the plugin as soon as it has been imported.

        Whatever is wrong must not make that import fail: the application would lose its agent
        over a speed-up. It is told in the log, and the plugin stays as it is.
        """
        global _installation
        with _lock:
            if _installation is not self:
                return
            try:
                self.apply(module)
            except Exception as error:
                _installation = None
                told = str(error) if isinstance(error, XaiPoolPatchError) else describe(error)
                log().error("not installed", reason=told)

    def undo(self) -> None:
        while self.patches:
            self.patches.pop().undo()
        if self.registry is not None:
            self.registry.close()


_lock = threading.RLock()
_installation: Installation | None = None


def install(
    options: PoolOptions | None = None,
    *,
    on_unsupported: Literal["raise", "skip"] = "raise",
) -> None:
    """Makes every TTS of livekit-plugins-xai in this process draw its connections from a pool.

    May be called before or after the plugin is imported, and does not import it. Calling it again
    with the same options does nothing. With `XAI_POOL_PATCH=off` in the environment it logs that
    and does nothing else.

    Args:
        options: how the pool behaves; the defaults suit one conversation per TTS.
        on_unsupported: what to do about a plugin that is not supported: `"raise"`, or `"skip"` to
            log a warning and leave the plugin as it is.

    Raises:
        UnsupportedPluginError: the plugin is missing or not supported.
        AlreadyInstalledError: it is installed with other options.
        InvalidOptionError: `options` or `on_unsupported` is not what it should be.
    """
    global _installation
    options = _checked(options, on_unsupported)
    if os.environ.get(OFF_SWITCH, "").strip().lower() == "off":
        log().warning("not installed, switched off by the environment", variable=OFF_SWITCH)
        return
    with _lock:
        if _installation is not None:
            _check_same(_installation.options, options)
            return
        try:
            _installation = _prepare(options)
        except UnsupportedPluginError as error:
            if on_unsupported == "raise":
                raise
            log().warning("not installed", reason=str(error))


def uninstall() -> None:
    """Gives the plugin back as it was.

    Utterances under way are spoken to their end; idle connections are closed in the background,
    the others when their utterance ends. Without an installation it does nothing.
    """
    global _installation
    with _lock:
        installation, _installation = _installation, None
    if installation is not None:
        installation.undo()
        log().info("uninstalled")


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


def _checked(options: PoolOptions | None, on_unsupported: str) -> PoolOptions:
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


def _prepare(options: PoolOptions) -> Installation:
    import wrapt

    from .plugin import MODULE, check_version

    installation = Installation(options, check_version())
    module = sys.modules.get(MODULE)
    if module is not None:
        installation.apply(module)
    else:
        wrapt.register_post_import_hook(installation.on_import, MODULE)
    return installation
