"""Warm WebSocket connections for livekit-plugins-xai.

import xai_pool_patch

xai_pool_patch.install()
"""

from . import python  # noqa: F401 - ahead of what an older Python cannot import
from ._version import __version__ as __version__
from .errors import (
    AlreadyInstalledError,
    InvalidOptionError,
    UnsupportedPluginError,
    XaiPoolPatchError,
)
from .installation import install, is_installed, pool_stats, stats, uninstall
from .options import PoolOptions
from .telemetry.usage import PoolStats, Stats

__all__ = [
    "AlreadyInstalledError",
    "InvalidOptionError",
    "PoolOptions",
    "PoolStats",
    "Stats",
    "UnsupportedPluginError",
    "XaiPoolPatchError",
    "install",
    "is_installed",
    "pool_stats",
    "stats",
    "uninstall",
]
