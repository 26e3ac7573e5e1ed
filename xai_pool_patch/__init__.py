"""Warm WebSocket connections for livekit-plugins-xai.

import xai_pool_patch

xai_pool_patch.install()
"""

from . import python  # noqa: F401 - ahead of what an older Python cannot import
from .errors import (
    AlreadyInstalledError,
    InvalidOptionError,
    UnsupportedPluginError,
    XaiPoolPatchError,
)
from .options import PoolOptions
from .patch import install, is_installed, pool_stats, stats, uninstall
from .telemetry.stats import PoolStats, Stats

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
__version__ = "0.1.0"
