"""The pool that the plugin has from 1.6.5 on, and `PooledConnections` in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from livekit.agents.utils import ConnectionPool
from livekit.plugins import xai

import xai_pool_patch
from tests.kit import API_KEY, HAS_NATIVE_POOL, ONCE, all_closed, line_to, quick, speak
from xai_pool_patch.plugin import patching
from xai_pool_patch.testing import End

pytestmark = pytest.mark.skipif(not HAS_NATIVE_POOL, reason="this plugin has no native pool")


def pool_of(tts: xai.TTS) -> Any:
    return tts._pool  # type: ignore[attr-defined,unused-ignore]


async def say(ws: Any, text: str) -> None:
    """One utterance, spoken by hand to its end."""
    await ws.send_json({"type": "text.delta", "delta": text})
    await ws.send_json({"type": "text.done"})
    while (await ws.receive_json())["type"] != "audio.done":
        pass


async def test_the_methods_of_the_plugins_pool_work(patched: None, no_tasks_left: None) -> None:
    """get, put, remove and connection() outside of any stream, and what the last get() reports."""
    async with line_to() as line:
        tts = line.tts()
        pool = pool_of(tts)
        assert isinstance(pool, ConnectionPool)
        ws = await pool.get(timeout=5.0)
        assert not pool.last_connection_reused
        assert pool.last_acquire_time > 0.0
        await say(ws, "Given back.")
        pool.put(ws)
        async with pool.connection(timeout=5.0) as ws:
            assert pool.last_connection_reused
            assert pool.last_acquire_time == 0.0
            await say(ws, "Again.")
        ws = await pool.get(timeout=5.0)
        await say(ws, "Taken out.")
        pool.remove(ws)
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE)
        with pytest.raises(ZeroDivisionError):
            async with pool.connection(timeout=5.0) as ws:
                raise ZeroDivisionError
        await line.server.wait_for(lambda s: s.connections[1].ended is End.CLIENT_CLOSE)
        await pool.aclose()
        await all_closed(line.server)


async def test_a_connection_put_back_before_its_end_is_discarded(patched: None) -> None:
    """L2: put() says that it may be used again. The protocol says otherwise."""
    async with line_to() as line:
        tts = line.tts()
        ws = await pool_of(tts).get(timeout=5.0)
        await ws.send_json({"type": "text.delta", "delta": "Half an utter"})
        pool_of(tts).put(ws)
        heard = await speak(tts, "Whole.")
        assert heard.samples == {line.server.utterance_for("Whole.").number}
        assert line.server.utterances[0].connection != line.server.utterances[-1].connection
        await tts.aclose()


async def test_invalidate_warms_the_new_options_and_keeps_the_old(patched: None) -> None:
    """With the same options it changes nothing."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "One.")
        pool_of(tts).invalidate()
        await speak(tts, "Two.")
        assert line.metrics[-1].connection_reused
        tts.update_options(voice="eve")
        await line.server.wait_for(lambda s: s.open_count == 2)
        tts.update_options(voice="ara")
        await speak(tts, "Three.")
        assert line.metrics[-1].connection_reused
        assert line.server.utterances[-1].connection == 1
        await tts.aclose()


async def test_a_stream_speaks_with_the_options_of_its_first_word(patched: None) -> None:
    """K6: as without the patch, not with those of its making."""
    async with line_to() as line:
        tts = line.tts(voice="ara")
        async with tts.stream(conn_options=ONCE) as stream:
            tts.update_options(voice="eve")
            stream.push_text("First.")
            stream.end_input()
            async for _ in stream:
                pass
        await speak(tts, "Second.")
        voices = {
            text: line.server.connections[line.server.utterance_for(text).connection - 1].query[
                "voice"
            ]
            for text in ("First.", "Second.")
        }
        assert voices == {"First.": "eve", "Second.": "eve"}
        await tts.aclose()


async def test_each_stream_reports_its_own_connection(patched: None) -> None:
    """The plugin reads that from the pool. One stream waits, and another does not, at once."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        await speak(tts, "Zero.")
        line.metrics.clear()
        await asyncio.gather(speak(tts, "One."), speak(tts, "Two."))
        assert sorted(m.connection_reused for m in line.metrics) == [False, True]
        [waited] = [m.acquire_time for m in line.metrics if not m.connection_reused]
        assert waited > 0.02
        await tts.aclose()


async def test_a_dial_of_the_plugins_pool_is_closed() -> None:
    """A prewarm under way when the patch is installed leaves nothing behind."""
    async with line_to(round_trip=0.02) as line:
        tts = line.tts()
        tts.prewarm()
        await line.server.wait_for(lambda s: s.network.accepted == 1)
        xai_pool_patch.install()
        await speak(tts, "Hello.")
        await line.server.wait_for(lambda s: s.open_count == 1)
        xai_pool_patch.uninstall()
        await all_closed(line.server)
        await tts.aclose()


async def test_a_connection_in_use_from_the_plugins_pool_is_closed() -> None:
    """When it is released, with the next turn."""
    async with line_to(quick(pace=5.0, speech_per_character=0.05)) as line:
        tts = line.tts()
        before = asyncio.create_task(speak(tts, "Before the patch."))
        await line.server.wait_for(lambda s: len(s.utterances) == 1)
        xai_pool_patch.install()
        await speak(tts, "Hi.")
        assert (await before).samples == {1}
        await speak(tts, "And again.")
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE)
        assert line.server.connections[1].ended is None
        xai_pool_patch.uninstall()
        await tts.aclose()


async def test_an_interruption_is_counted_as_interrupted(patched: None) -> None:
    """The framework's pool knows only that a connection was removed."""
    async with line_to(quick(pace=5.0, speech_per_character=0.05)) as line:
        tts = line.tts()
        turn = asyncio.create_task(speak(tts, "A sentence that is cut off."))
        await line.server.wait_for(lambda s: s.utterances and s.utterances[0].first_audio_at)
        turn.cancel()
        await asyncio.wait([turn])
        assert xai_pool_patch.stats()["closed_interrupted"] == 1
        await tts.aclose()


async def test_a_subclass_that_connects_in_its_own_way_keeps_its_pool(patched: None) -> None:
    """The patch would not call the methods that it overrides."""

    class Own(xai.TTS):
        async def _connect_pooled_ws(self, timeout: float) -> Any:
            return await super()._connect_pooled_ws(timeout)  # type: ignore[misc,unused-ignore]

    async with line_to() as line:
        tts = Own(api_key=API_KEY, http_session=line.http)
        for text in ("First.", "Second."):
            heard = await speak(tts, text)
            assert heard.samples == {line.server.utterance_for(text).number}
        assert len(line.server.connections) == 1
        await tts.aclose()
        await all_closed(line.server)


async def test_a_tts_without_init_has_no_pool(patched: None) -> None:
    """The attribute behaves as the plugin's does."""
    with pytest.raises(AttributeError, match="'TTS' object has no attribute '_pool'"):
        pool_of(xai.TTS.__new__(xai.TTS))


async def test_restoring_does_not_depend_on_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: the native pools serve again, though a handler of the application's log raises."""

    def log_event(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    async with line_to() as line:
        tts = line.tts()
        native = pool_of(tts)
        xai_pool_patch.install()
        assert pool_of(tts) is not native
        theirs = property(lambda tts: native)
        with monkeypatch.context() as covering:
            covering.setattr(xai.TTS, "_pool", theirs)
            covering.setattr(patching, "log_event", log_event)
            xai_pool_patch.uninstall()
            assert vars(xai.TTS)["_pool"] is theirs
        delattr(xai.TTS, "_pool")
        await tts.aclose()


@pytest.mark.parametrize(
    "part",
    [
        "PooledConnections.__init__",
        "PoolAttribute._replace",
    ],
)
async def test_after_a_fault_in_replacing_it_the_plugins_pool_serves(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A4: the log says once what is wrong."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Before.")
        xai_pool_patch.install()
        with monkeypatch.context() as breaking:
            breaking.setattr(f"xai_pool_patch.plugin.native_pool.{part}", broken)
            for text in ("First.", "Second."):
                heard = await speak(tts, text)
                assert heard.samples == {line.server.utterance_for(text).number}
        assert line.errors == []
        [record] = [r for r in caplog.records if r.levelname == "ERROR"]
        assert "ZeroDivisionError" in vars(record)["xai_pool_error"]
        xai_pool_patch.uninstall()
        await tts.aclose()
        await all_closed(line.server)
