"""For tests of an agent that is patched: wait for the pool, and share nothing with other processes.

Only this module of the package and the fixture know the patch; the server serves any client.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from .. import installation

POLL_INTERVAL = 0.005
"""Seconds. The statistics have no event to wait for."""


async def pool_is_ready(connections: int = 1, timeout: float = 5.0) -> None:
    """Wait until so many connections are idle, so that as many turns need no dial.

    Use it after `tts.prewarm()` or `AgentSession.start()`, and after a turn or an interruption,
    when the pool may still be connecting in the background. That the server has accepted a
    connection is not enough: the client may not have read that yet.

    Args:
        connections: how many, in all pools of the process together.
        timeout: seconds.

    Raises:
        RuntimeError: the patch is not installed.
        TimeoutError: there were fewer within that time. The message has what `stats()` says.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + timeout
    while (stats := installation.stats())["idle"] < connections:
        if not installation.is_installed():
            raise RuntimeError("the patch is not installed: call xai_pool_patch.install() first")
        if loop.time() >= give_up_at:
            counted = {name: value for name, value in stats.items() if value}
            raise TimeoutError(
                f"after {timeout} s {stats['idle']} of {connections} connections are ready:"
                f" {counted}. A pool begins with the first turn or prewarm() of a TTS, and keeps no"
                " connection while it is lean or with min_size=0"
            )
        await asyncio.sleep(POLL_INTERVAL)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Let the patch share nothing with other processes, nor with what was before.

    Otherwise a refusal by the fake server (HTTP 429) would be told to every process of this user,
    or in the Redis of the environment, and change what they do for minutes; and theirs would change
    a test. Within the `with`, XDG_RUNTIME_DIR is a folder of its own and no Redis is used. If the
    patch is installed, it is installed anew at the beginning and at the end, so that pools and
    statistics begin empty.

    The fixture `fake_xai_server` does this for each test.
    """
    with (
        tempfile.TemporaryDirectory(prefix="xai_pool_patch.", ignore_cleanup_errors=True) as folder,
        _environment({"XDG_RUNTIME_DIR": folder, installation.REDIS_URL: None}),
        _renewed(redis_url=None),
    ):
        yield


@contextlib.contextmanager
def _renewed(**changes: Any) -> Iterator[None]:
    """Install what is installed anew with changed options; at the end, with those it had before.

    Without an installation this does nothing at the beginning. What is installed meanwhile is
    renewed at the end, too.
    """
    before = installation._installation
    if before is not None:
        _reinstall(before, dataclasses.replace(before.options, **changes))
    try:
        yield
    finally:
        after = installation._installation
        if after is not None:
            _reinstall(after, (before or after).options)


def _reinstall(known: installation.Installation, options: Any) -> None:
    installation.uninstall()
    installation._install(options, known.allow_unverified, known.on_unsupported)


@contextlib.contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
