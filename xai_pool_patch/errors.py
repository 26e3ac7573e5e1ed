"""The errors an application can meet. All of them derive from `XaiPoolPatchError`."""

from __future__ import annotations


class XaiPoolPatchError(Exception):
    """Base of every error that `xai_pool_patch` itself raises.

    Errors of the network are not among them: those reach the application as they would
    without the patch, as LiveKit's `APIConnectionError`, `APIStatusError` and so on.
    """


class InvalidOptionError(XaiPoolPatchError, ValueError):
    """A value in `PoolOptions`, of `install()` or in `XAI_POOL_PATCH_REDIS_URL` makes no sense.

    The message names it and what would do.
    """


class AlreadyInstalledError(XaiPoolPatchError, RuntimeError):
    """`install()` was called again with other options. The message names those that differ."""


class UnsupportedPluginError(XaiPoolPatchError, RuntimeError):
    """The installed livekit-plugins-xai, its livekit-agents, or the Python is not supported.

    The message says what was found and what is supported.
    """
