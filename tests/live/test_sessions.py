"""Rules S1 to S5 and P11 with the real plugin: a limited number of sessions, and who holds them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path

import pytest
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import Line, hear_whole, line_to, quick, registry, speak
from xai_pool_patch import InvalidOptionError, PoolOptions, installation
from xai_pool_patch.sessions.machine import MachineStore
from xai_pool_patch.sessions.redis import RedisStore

LINGER = 0.1

reply = pytest.mark.parametrize("patched", [PoolOptions(warm="reply")], indirect=True)


async def until_idle(count: int) -> None:
    while xai_pool_patch.stats()["idle"] != count or xai_pool_patch.stats()["connecting"]:
        await asyncio.sleep(0.01)


async def talk(line: Line, tts: xai.TTS, *texts: str) -> None:
    for text in texts:
        await hear_whole(line, tts, text)


@reply
async def test_a_call_holds_a_session_only_while_it_speaks(patched: None) -> None:
    """S1: and for a moment afterwards, so that the next sentence of a reply finds it."""
    async with line_to() as line:
        tts = line.tts()
        await talk(line, tts, "First.", "Second.")
        assert len(line.server.connections) == 1
        await line.server.wait_for(lambda server: server.open_count == 0)
        await talk(line, tts, "Third.")
        assert len(line.server.connections) == 2
        await tts.aclose()


@reply
async def test_prewarm_is_a_sign_of_a_reply(patched: None) -> None:
    """S2: the connection is there when the greeting asks for it."""
    async with line_to() as line:
        tts = line.tts()
        tts.prewarm()
        await until_idle(1)
        await asyncio.sleep(2 * LINGER)
        await talk(line, tts, "Hello.")
        assert xai_pool_patch.stats()["connections_reused"] == 1
        await tts.aclose()


async def test_a_refused_caller_makes_room(patched: None) -> None:
    """S4: it closes what is idle in this process, and dials once more. Nobody hears of it."""
    async with line_to(quick(max_sessions=1)) as line:
        first, second = line.tts(voice="ara"), line.tts(voice="eve")
        await talk(line, first, "First.")
        await until_idle(1)
        await talk(line, second, "Second.")
        assert [shake.status for shake in line.server.handshakes] == [101, 429, 101]
        assert line.errors == []
        assert xai_pool_patch.stats()["rate_limited"] == 1
        await first.aclose()
        await second.aclose()


async def test_a_refused_caller_without_anything_to_close_hears_so_at_once(patched: None) -> None:
    """S4, A6: the refusal is the plugin's, after one dial."""
    async with line_to(quick(max_sessions=0)) as line:
        tts = line.tts()
        heard = await speak(tts, "Hello.")
        assert getattr(heard.error, "status_code", None) == 429
        assert len(line.server.handshakes) == 1
        await tts.aclose()


async def test_after_a_refusal_nothing_is_kept_between_replies(patched: None) -> None:
    """S1, S3: until the shortage is over. And nothing is dialled speculatively."""
    async with line_to(quick(max_sessions=1)) as line:
        tts, other = line.tts(voice="ara"), line.tts(voice="eve")
        await talk(line, tts, "First.")
        await talk(line, other, "Second.")
        assert xai_pool_patch.stats()["lean"] == 2
        await line.server.wait_for(lambda server: server.open_count == 0)
        seen = len(line.server.handshakes)
        await talk(line, tts, "Third.")
        await talk(line, other, "Fourth.")
        assert [shake.status for shake in line.server.handshakes[seen:]] in (
            [101, 101],
            [101, 429, 101],
        )
        await tts.aclose()
        await other.aclose()


@pytest.mark.parametrize("patched", [PoolOptions(warm="always")], indirect=True)
async def test_always_warm_stays_warm(patched: None) -> None:
    """S1: after a refusal, too."""
    async with line_to(quick(max_sessions=1)) as line:
        first, second = line.tts(voice="ara"), line.tts(voice="eve")
        await talk(line, first, "First.")
        await talk(line, second, "Second.")
        assert xai_pool_patch.stats()["lean"] == 0
        await until_idle(1)
        await first.aclose()
        await second.aclose()


async def test_an_error_frame_that_names_the_limit_is_a_refusal(patched: None) -> None:
    """S3: a server may accept the handshake and refuse the session then."""
    async with line_to(quick(error_on_text="Too many concurrent sessions.")) as line:
        tts = line.tts()
        assert (await speak(tts, "Hello.")).error is not None
        assert xai_pool_patch.stats()["lean"] == 1
        assert xai_pool_patch.stats()["rate_limited"] >= 1
        await tts.aclose()


async def test_an_error_frame_of_another_kind_is_none(patched: None) -> None:
    """S3: a text that is too long, or a pipeline that timed out, says nothing about sessions."""
    for message in ("Text exceeds the limit of 15000 characters.", "Deadline expired after 2101s"):
        async with line_to(quick(error_on_text=message)) as line:
            tts = line.tts()
            assert (await speak(tts, "Hello.")).error is not None
            assert xai_pool_patch.stats()["lean"] == 0
            await tts.aclose()


async def test_another_voice_for_each_turn(patched: None) -> None:
    """P11: each is heard on a limit of six, and three at most are open at any time."""
    async with line_to(quick(max_sessions=6)) as line:
        tts, peak = line.tts(), 0
        for turn in range(20):
            tts.update_options(voice=f"voice {turn}")
            await hear_whole(line, tts, f"Turn {turn}.")
            peak = max(peak, line.server.open_count)
        assert peak <= 3
        assert line.errors == []
        assert {shake.status for shake in line.server.handshakes} == {101}
        await tts.aclose()


async def test_sixty_voices_without_a_word(patched: None) -> None:
    """P11: leave two connections at most, however far their dials were."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        await hear_whole(line, tts, "Hello.")
        for turn in range(60):
            tts.update_options(voice=f"voice {turn}")
            await asyncio.sleep(0.01)
        await line.server.wait_for(lambda server: server.open_count <= 2)
        await until_idle(1)
        assert len(registry().here().pools) <= 2
        await tts.aclose()


@reply
async def test_a_voice_changed_before_the_first_word_is_the_one_that_is_dialled(
    patched: None,
) -> None:
    """S2, P11: the reply is expected at the new voice then."""
    async with line_to() as line:
        tts = line.tts()
        tts.prewarm()
        tts.update_options(voice="eve")
        await until_idle(1)
        await hear_whole(line, tts, "Hello.")
        assert xai_pool_patch.stats()["connections_reused"] == 1
        await tts.aclose()


def file_of_the_machine(tmp_path: Path) -> Path:
    """Where the processes of this test leave word."""
    return tmp_path / "xai_pool_patch" / "api.x.ai_443"


async def test_others_hear_of_a_refusal(tmp_path: Path) -> None:
    """S3: by a file, which says nothing of the API key."""
    file = file_of_the_machine(tmp_path)
    xai_pool_patch.install()
    async with line_to(quick(max_sessions=0)) as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        while not file.exists():
            await asyncio.sleep(0.01)
        assert 60.0 < file.stat().st_mtime - time.time() < 135.0
        assert file.read_bytes() == b""
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_a_process_hears_of_a_refusal_of_others(tmp_path: Path) -> None:
    """S3: it lets go of its idle connections within two seconds, and says why."""
    file = file_of_the_machine(tmp_path)
    xai_pool_patch.install()
    async with line_to() as line:
        tts = line.tts()
        await hear_whole(line, tts, "Hello.")
        await until_idle(1)
        file.touch(0o600)
        os.utime(file, (time.time() + 60.0,) * 2)
        await line.server.wait_for(lambda server: server.open_count == 0)
        assert xai_pool_patch.stats()["lean"] == 1
        await hear_whole(line, tts, "Hello again.")
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_who_can_hear_of_nobody_keeps_nothing(tmp_path: Path) -> None:
    """S3b: others may be refused for what it keeps. It is warm again as soon as it would hear."""
    in_the_way = tmp_path / "xai_pool_patch"
    in_the_way.write_text("a file where the folder would be")
    xai_pool_patch.install()
    async with line_to() as line:
        tts = line.tts()
        await hear_whole(line, tts, "Hello.")
        await line.server.wait_for(lambda server: server.open_count == 0)
        assert (xai_pool_patch.stats()["lean"], xai_pool_patch.stats()["rate_limited"]) == (1, 0)
        await hear_whole(line, tts, "Hello again.")
        in_the_way.unlink()
        while xai_pool_patch.stats()["lean"]:
            await asyncio.sleep(0.01)
        await until_idle(1)
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_a_redis_is_asked_instead_of_the_file(tmp_path: Path, unused_tcp_port: int) -> None:
    """S3b: if it is down, that the file would work helps nobody on another machine."""
    xai_pool_patch.install(PoolOptions(redis_url=f"redis://127.0.0.1:{unused_tcp_port}"))
    async with line_to() as line:
        tts = line.tts()
        await hear_whole(line, tts, "Hello.")
        await line.server.wait_for(lambda server: server.open_count == 0)
        assert xai_pool_patch.stats()["lean"] == 1
        assert not (tmp_path / "xai_pool_patch").exists()
        await tts.aclose()
    xai_pool_patch.uninstall()


WRONG = "http://user:secret@host"


def test_the_variable_names_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the option names another, or the variable is blank."""
    monkeypatch.setenv("XAI_POOL_PATCH_REDIS_URL", " redis://host ")
    xai_pool_patch.install()
    assert isinstance(installation._installation.store, RedisStore)  # type: ignore[union-attr]
    xai_pool_patch.uninstall()
    monkeypatch.setenv("XAI_POOL_PATCH_REDIS_URL", WRONG)
    xai_pool_patch.install(PoolOptions(redis_url="redis://host"))
    xai_pool_patch.uninstall()
    monkeypatch.setenv("XAI_POOL_PATCH_REDIS_URL", " ")
    xai_pool_patch.install()
    assert isinstance(installation._installation.store, MachineStore)  # type: ignore[union-attr]
    xai_pool_patch.uninstall()


def named_by(name: str, monkeypatch: pytest.MonkeyPatch) -> PoolOptions | None:
    """The options that name a URL that is wrong, or None if a variable does."""
    if name == "redis_url":
        return PoolOptions(redis_url=WRONG)
    monkeypatch.setenv(name, WRONG)
    return None


NAMES = pytest.mark.parametrize("name", ["redis_url", "XAI_POOL_PATCH_REDIS_URL"])


@NAMES
def test_a_redis_that_cannot_be_used_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one error that names it, says what would be right, and quotes nothing."""
    options = named_by(name, monkeypatch)
    with pytest.raises(InvalidOptionError, match=rf"^{name} .*redis://") as refusal:
        xai_pool_patch.install(options)
    assert "secret" not in str(refusal.value)
    assert "secret" not in repr(options)
    assert not xai_pool_patch.is_installed()


@NAMES
async def test_an_agent_that_said_skip_speaks_all_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, and as if nobody could be heard: the pools keep nothing between replies."""
    xai_pool_patch.install(named_by(name, monkeypatch), on_unsupported="skip")
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.xai_pool_reason.startswith(f"{name} ")  # type: ignore[attr-defined]
    assert "secret" not in str(vars(record))
    async with line_to() as line:
        tts = line.tts()
        await hear_whole(line, tts, "Hello.")
        assert xai_pool_patch.stats()["lean"] == 1
        await line.server.wait_for(lambda server: server.open_count == 0)
        await hear_whole(line, tts, "Hello again.")
        await tts.aclose()
    xai_pool_patch.uninstall()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable, and what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setenv("XAI_POOL_PATCH_REDIS_URL", "redis://:secret@host")
    with pytest.raises(InvalidOptionError, match=r"^XAI_POOL_PATCH_REDIS_URL .*pip install") as e:
        xai_pool_patch.install()
    assert "secret" not in str(e.value)
