"""`stats()` and `pool_stats()`, called from wherever an operator calls them."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

import xai_pool_patch
from tests.kit import API_KEY, line_to, registry, speak
from xai_pool_patch import PoolStats, Stats, installation


@pytest.mark.parametrize("when", ["never installed", "waiting for the plugin", "installed"])
def test_every_key_is_always_there(when: str, request: pytest.FixtureRequest) -> None:
    """All zero until something happens, so nobody has to check whether a key exists."""
    if when == "waiting for the plugin":
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "livekit.plugins.xai.tts")
            xai_pool_patch.install()
    elif when == "installed":
        xai_pool_patch.install()
    request.addfinalizer(xai_pool_patch.uninstall)
    assert xai_pool_patch.stats() == dict.fromkeys(Stats.__annotations__, 0)
    assert xai_pool_patch.pool_stats() == []


async def test_pool_stats_has_an_entry_for_each_pool(patched: None) -> None:
    """They add up to stats(). Log records carry the same number of the pool."""
    async with line_to() as line:
        ttss = {voice: line.tts(voice=voice) for voice in ("ara", "a voice of somebody's own")}
        for number, tts in enumerate(ttss.values()):
            for turn in range(number + 2):
                await speak(tts, f"Turn {turn} of {number}.")
        pools, whole = xai_pool_patch.pool_stats(), xai_pool_patch.stats()
        assert [pool.keys() for pool in pools] == [PoolStats.__annotations__.keys()] * 2
        assert [pool["connections_reused"] for pool in pools] == [1, 2]
        for key in ("connections_made", "connections_reused", "idle"):
            assert whole[key] == sum(pool[key] for pool in pools)  # type: ignore[literal-required]
        assert len({pool["pool"] for pool in pools}) == whole["pools"] == 2
        text = str([pools, whole])
        assert API_KEY not in text
        assert "somebody" not in text
        for tts in ttss.values():
            await tts.aclose()


async def test_totals_include_pools_that_have_ended(patched: None) -> None:
    """Also what they do after their end: a leased connection closes later."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        await tts.aclose()
        assert xai_pool_patch.pool_stats() == []
        stats = xai_pool_patch.stats()
        assert (stats["connections_made"], stats["closed_shutdown"]) == (1, 1)
        assert (stats["pools"], stats["idle"], stats["leased"]) == (0, 0, 0)


def test_stats_may_be_called_while_loops_run_in_other_threads(patched: None) -> None:
    """No exception, no negative number, and in the end nothing uncounted."""
    jobs, turns = 3, 8
    faults: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                for snapshot in [xai_pool_patch.stats(), *xai_pool_patch.pool_stats()]:
                    negative = {k: v for k, v in snapshot.items() if v < 0}  # type: ignore[operator]
                    assert not negative, negative
        except BaseException as fault:
            faults.append(fault)

    async def job() -> None:
        async with line_to() as line:
            tts = line.tts()
            for number in range(turns):
                tts.update_options(voice=f"voice {number}")
                heard = await speak(tts, f"Turn {number}.")
                assert heard.error is None
            await tts.aclose()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the threads get into each other's way
    asking = threading.Thread(target=ask)
    asking.start()
    threads = [threading.Thread(target=asyncio.run, args=(job(),)) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    asking.join()
    sys.setswitchinterval(before)
    assert faults == []
    stats = xai_pool_patch.stats()
    handed_out = stats["connections_reused"] + stats["connections_made"]
    assert handed_out >= jobs * turns
    assert (stats["idle"], stats["leased"]) == (0, 0)


class NotHeld:
    """A lock that its thread would wait for in vain."""

    def __enter__(self) -> None:
        raise AssertionError("a lock was taken")

    acquire = __enter__

    def __exit__(self, *_: Any) -> None: ...


async def test_stats_take_no_lock(patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that calls them may have interrupted whoever holds it."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        with monkeypatch.context() as held:
            held.setattr(registry(), "_lock", NotHeld())
            held.setattr(installation, "_lock", NotHeld())
            assert xai_pool_patch.is_installed()
            assert xai_pool_patch.stats()["idle"] == 1
            assert [pool["idle"] for pool in xai_pool_patch.pool_stats()] == [1]
        await tts.aclose()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal to send oneself")
def test_stats_may_be_called_in_a_signal_handler(patched: None) -> None:
    """It runs at any moment, also while its own thread holds every lock."""
    answers: list[Stats] = []

    def ask(number: int, frame: FrameType | None) -> None:
        answers.append(xai_pool_patch.stats())

    held, before = registry()._lock, signal.signal(signal.SIGUSR1, ask)
    rescue = threading.Timer(5.0, held.release)  # a test that fails should not hang
    rescue.start()
    try:
        with held, installation._lock:
            signal.raise_signal(signal.SIGUSR1)
            assert held.locked(), "the handler waited for the lock until it was rescued"
            assert len(answers) == 1
    finally:
        rescue.cancel()
        signal.signal(signal.SIGUSR1, before)


def test_counts_of_closed_loops_are_kept_once(patched: None) -> None:
    """Each job has a loop. When the next one begins, its counts move to the totals."""

    async def job() -> None:
        async with line_to() as line:
            tts = line.tts()
            await speak(tts, "Hello.")
            await tts.aclose()

    for number in range(1, 4):
        asyncio.run(job())
        assert xai_pool_patch.stats()["connections_made"] == number
        assert xai_pool_patch.stats()["connect_ms_max"] > 0.0
    assert len(registry()._loops.managers) == 1
