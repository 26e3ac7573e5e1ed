"""The public fixture, and what `xai_pool_patch.testing` exports."""

from __future__ import annotations

import subprocess
import sys

import aiohttp
import pytest

import xai_pool_patch.testing
from xai_pool_patch.testing import FakeServer
from xai_pool_patch.testing.fixtures import fake_xai_server as fake_xai_server


@pytest.fixture
def refusing(fake_xai_server: FakeServer) -> FakeServer:
    """Changed by a fixture that is not a coroutine, hence while the event loop does not run."""
    fake_xai_server.behaviour.refuse = 503
    return fake_xai_server


async def test_a_synchronous_fixture_may_change_the_behaviour(refusing: FakeServer) -> None:
    """With effect at once, and whoever waits for a change is still woken by the next one."""
    async with refusing.client_session() as http:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
            await http.ws_connect(refusing.url)
    await refusing.wait_for(lambda server: server.handshakes)


async def test_every_test_has_a_server_of_its_own(fake_xai_server: FakeServer) -> None:
    """Nothing of another test is on its records."""
    assert (fake_xai_server.handshakes, fake_xai_server.behaviour.refuse) == ([], None)


def test_all_that_is_exported_exists_and_is_documented() -> None:
    """Somebody who tests an agent reads the docstrings."""
    for name in xai_pool_patch.testing.__all__:
        exported = getattr(xai_pool_patch.testing, name)
        assert isinstance(exported, int) or exported.__doc__


def test_without_its_extra_it_says_how_to_install_it() -> None:
    """The application's own tests import it, and most likely without having read about extras."""
    program = "import sys; sys.modules['trustme'] = None; import xai_pool_patch.testing"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.stderr.splitlines()[-1].endswith('pip install "xai_pool_patch[testing]"')
