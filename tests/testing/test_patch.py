"""What the test kit has for tests of a patched agent: `pool_is_ready()` and `isolated()`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xai_pool_patch
from tests.kit import line_to, quick, registry, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import isolated, pool_is_ready


async def test_it_waits_until_the_pool_is_ready(patched: None) -> None:
    """Longer than the server takes to accept: the turn that follows dials nothing."""
    async with line_to(quick(), round_trip=0.1) as line:
        tts = line.tts()
        tts.prewarm()
        await line.server.wait_for(lambda server: server.open_count == 1)
        assert xai_pool_patch.stats()["idle"] == 0
        await pool_is_ready()
        assert xai_pool_patch.stats()["idle"] == 1
        await speak(tts, "Hello.")
        assert len(line.server.handshakes) == 1
        assert line.metrics[0].connection_reused
        await tts.aclose()


async def test_it_gives_up_with_the_statistics(patched: None) -> None:
    """So that a failing test can be understood."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        with pytest.raises(TimeoutError, match=r"after 0\.2 s 1 of 3 .*'connections_made': 1"):
            await pool_is_ready(3, timeout=0.2)
        await tts.aclose()


async def test_without_the_patch_it_raises_at_once() -> None:
    """No pool will ever be ready."""
    with pytest.raises(RuntimeError, match=r"call xai_pool_patch\.install\(\) first"):
        await pool_is_ready()


def test_nothing_is_shared_with_other_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the user's folder nor a Redis of the environment. Both are back afterwards."""
    monkeypatch.setenv("XAI_POOL_PATCH_REDIS_URL", "redis://production")
    before = dict(os.environ)
    with isolated():
        folder = Path(os.environ["XDG_RUNTIME_DIR"])
        assert folder.is_dir()
        assert folder != tmp_path
        assert "XAI_POOL_PATCH_REDIS_URL" not in os.environ
    assert dict(os.environ) == before
    assert not folder.exists()


def test_what_is_installed_is_installed_anew() -> None:
    """Without the Redis of its options, and afterwards with it."""
    options = PoolOptions(redis_url="redis://localhost", heartbeat=15.0)
    xai_pool_patch.install(options)
    before = registry()
    with isolated():
        during = registry()
        assert during is not before
        assert during.options == PoolOptions(heartbeat=15.0)
    assert registry() is not during
    assert registry().options == options
    xai_pool_patch.uninstall()


def test_what_is_not_installed_stays_so() -> None:
    """The test may install it, and uninstall it, itself."""
    with isolated():
        assert not xai_pool_patch.is_installed()
        xai_pool_patch.install()
        xai_pool_patch.uninstall()
    assert not xai_pool_patch.is_installed()


TESTS = """
import pytest, xai_pool_patch
from livekit.agents import APIConnectOptions, APIError
from livekit.plugins import xai
from xai_pool_patch.testing import pool_is_ready
from xai_pool_patch.testing.fixtures import fake_xai_server

xai_pool_patch.install()  # as the agent's module does, at its import
ONCE = APIConnectOptions(max_retry=0)

async def say(tts, text):
    async with tts.stream(conn_options=ONCE) as stream:
        stream.push_text(text)
        stream.end_input()
        async for _ in stream:
            pass

@pytest.mark.asyncio
@pytest.mark.parametrize("attempt", range(2))
async def test_a_refused_session(fake_xai_server, attempt):
    assert xai_pool_patch.stats()["lean"] == xai_pool_patch.stats()["rate_limited"] == 0
    async with fake_xai_server.client_session() as http:
        tts = xai.TTS(api_key=fake_xai_server.behaviour.api_key, http_session=http)
        tts.prewarm()
        await pool_is_ready()  # the pool is as warm as if nobody had ever been refused
        await tts.aclose()
        fake_xai_server.behaviour.refuse = 429
        tts = xai.TTS(api_key=fake_xai_server.behaviour.api_key, http_session=http, voice="eve")
        with pytest.raises(APIError):
            await say(tts, "Hello.")
        assert xai_pool_patch.stats()["rate_limited"] > 0
        await tts.aclose()
"""


def test_a_refusal_has_no_consequence_for_the_next_test(tmp_path: Path) -> None:
    """Nor for any other process of this user: the patch is installed once, for all tests."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "runtime").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", "-q"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(xai_pool_patch.__file__).parents[1]),
            "XDG_RUNTIME_DIR": str(tmp_path / "runtime"),
        },
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert "2 passed" in done.stdout, done.stdout
    assert list((tmp_path / "runtime").iterdir()) == []
