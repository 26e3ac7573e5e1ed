"""A pytest fixture: import it in a test module or a `conftest.py`.

    from xai_pool_patch.testing.fixtures import fake_xai_server

It needs pytest and pytest-asyncio, in either mode of it. With other plugins, or unittest, write
`with isolated():` and `async with FakeServer() as server:` in the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from .patch import isolated
from .server import FakeServer

__all__ = ["fake_xai_server"]


@pytest_asyncio.fixture
async def fake_xai_server() -> AsyncIterator[FakeServer]:
    """A `FakeServer` of the test's own, without any distance, in a test that is `isolated`.

    `fake_xai_server.network.round_trip = 0.15` moves it away, `fake_xai_server.behaviour` has all
    else that can be changed.
    """
    with isolated():
        async with FakeServer() as server:
            yield server
