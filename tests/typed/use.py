"""Every public name as an application uses it. For the type checkers: nothing runs this."""

from __future__ import annotations

from typing_extensions import assert_type

import xai_pool_patch
from xai_pool_patch import (
    AlreadyInstalledError,
    InvalidOptionError,
    PoolOptions,
    PoolStats,
    Stats,
    UnsupportedPluginError,
    XaiPoolPatchError,
)


def options() -> None:
    options = PoolOptions(min_size=2, max_age=600, answer_timeout=2.5, interruption="clear")
    assert_type(options.min_size, int)
    assert_type(options.max_idle_time, float)
    options.min_size = 3  # type: ignore[misc]
    PoolOptions(2)  # type: ignore[call-arg]
    PoolOptions(heartbeat="20")  # type: ignore[arg-type]
    PoolOptions(interruption="pause")  # type: ignore[arg-type]
    PoolOptions(warm="sometimes")  # type: ignore[arg-type]


def redis() -> None:
    PoolOptions(redis_url="redis://localhost")
    PoolOptions(redis_url=object())  # type: ignore[arg-type]


def installing() -> None:
    assert_type(xai_pool_patch.install(), None)
    xai_pool_patch.install(PoolOptions(), allow_unverified=True, on_unsupported="skip")
    xai_pool_patch.install(on_unsupported="ignore")  # type: ignore[arg-type]
    xai_pool_patch.install(min_size=2)  # type: ignore[call-arg]
    assert_type(xai_pool_patch.is_installed(), bool)
    assert_type(xai_pool_patch.uninstall(), None)


def statistics() -> None:
    stats: Stats = xai_pool_patch.stats()
    assert_type(stats["idle"], int)
    assert_type(stats["acquire_wait_ms_max"], float)
    pools: list[PoolStats] = xai_pool_patch.pool_stats()
    assert_type(pools[0]["pool"], int)
    stats["busy"]  # type: ignore[typeddict-item]


def errors() -> None:
    all_of_them: list[type[XaiPoolPatchError]] = [
        AlreadyInstalledError,
        InvalidOptionError,
        UnsupportedPluginError,
    ]
    of_the_standard_library: tuple[RuntimeError, ValueError] = (
        AlreadyInstalledError(),
        InvalidOptionError(),
    )
    assert_type(xai_pool_patch.__version__, str)
    del all_of_them, of_the_standard_library
