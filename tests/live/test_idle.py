"""C1 to C3: the pool looks after idle connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import xai_pool_patch
from tests.kit import Line, all_closed, event_of, interrupted, line_to, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.testing import Clearing, End, Ending


async def test_pings_are_answered_while_idle(patched: None) -> None:
    """C2: a server that drops whoever does not answer keeps the connection."""
    async with line_to(quick(ping_interval=0.02)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        connection = line.server.connections[0]
        answered = connection.pongs_received
        await line.server.wait_for(lambda s: connection.pongs_received >= answered + 5)
        await speak(tts, "Second.")
        assert len(line.server.connections) == 1
        await tts.aclose()


@pytest.mark.parametrize("ending", [Ending.CLOSE, Ending.RESET])
async def test_an_idle_connection_that_ends_is_replaced_at_once(
    patched: None, ending: Ending
) -> None:
    """C3: no turn tries the dead socket."""
    async with line_to(quick(idle_limit=0.1, ending=ending)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        line.server.behaviour.idle_limit = None
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.errors == []
        await tts.aclose()


async def test_the_heartbeat_finds_a_peer_that_vanished() -> None:
    """C2: a half-open connection is replaced while nobody waits for it."""
    xai_pool_patch.install(PoolOptions(heartbeat=0.1))
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        line.server.freeze_all()
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.errors == []
        await tts.aclose()
    xai_pool_patch.uninstall()


async def test_the_heartbeat_ends_no_connection_if_the_server_never_answers_pings() -> None:
    """C2: silence says nothing then."""
    heartbeat = 0.05
    xai_pool_patch.install(PoolOptions(heartbeat=heartbeat))
    async with line_to(quick(answer_pings=False)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await asyncio.sleep(10 * heartbeat)
        assert [each.is_open for each in line.server.connections] == [True]
        assert line.server.connections[0].pings_received > 3
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.errors == []
        await tts.aclose()
    xai_pool_patch.uninstall()


@pytest.mark.parametrize(
    "frame", ['{"type":"error","message":"Deadline expired"}', '{"type":"audio.done"}', "{not json"]
)
async def test_an_unexpected_answer_ends_an_idle_connection(patched: None, frame: str) -> None:
    """C1: after an error, an `audio.done` or an unreadable message it is not clean."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.broadcast(frame)
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE)
        await tts.aclose()
        await all_closed(line.server)


async def test_other_messages_do_not_end_an_idle_connection(patched: None) -> None:
    """C1: they belong to no utterance."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.broadcast('{"type":"session.updated"}')
        await line.server.broadcast('{"type":"error","message":"end of the test"}')
        await line.server.wait_for(lambda s: not s.connections[0].is_open)
        assert xai_pool_patch.stats()["closed_lost"] == 1
        await tts.aclose()


async def test_a_closed_http_session_ends_its_pool_quietly(
    patched: None, caplog: pytest.LogCaptureFixture
) -> None:
    """P9: at the end of a job there is no new dial and no warning."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        await line.http.close()
        await line.server.wait_for(lambda s: s.open_count == 0)
        await tts.aclose()
        assert len(line.server.handshakes) == 1
    assert [event_of(r) for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_a_http_session_closed_just_before_its_loop_starts_no_task() -> None:
    """P9: the loop would not run it."""

    async def begin() -> None:
        context = line_to(quick(answer_close=False))
        line = await context.__aenter__()
        tts = line.tts()
        await asyncio.gather(speak(tts, "One."), speak(tts, "Two."))
        await line.http.close()
        await context.__aexit__(None, None, None)

    xai_pool_patch.install()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    xai_pool_patch.uninstall()


@pytest.mark.parametrize("when", ["idle", "connecting", "clearing"])
def test_a_loop_closed_without_cancelling_its_tasks_gives_no_warning(
    when: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """P9: the pool's tasks end in silence."""
    xai_pool_patch.install(PoolOptions(interruption="clear"))

    async def begin() -> tuple[Any, Line]:
        context = line_to(round_trip=0.05)
        line = await context.__aenter__()
        tts = line.tts()
        tts.prewarm()
        if when == "idle":
            await speak(tts, "Hello.")
        elif when == "clearing":
            line.server.behaviour.clearing = Clearing.IGNORED
            line.server.behaviour.pace = 1.0
            await interrupted(line, tts)
        else:
            await line.server.wait_for(lambda s: s.network.accepted == 1)
        return context, line

    async def end(context: Any, line: Line) -> None:
        await line.http.close()
        await context.__aexit__(None, None, None)

    loop = asyncio.new_event_loop()
    context, line = loop.run_until_complete(begin())
    ours = {t for t in asyncio.all_tasks(loop) if t.get_name().startswith("xai_pool_patch")}
    assert ours, "there was nothing in flight"
    assert xai_pool_patch.stats()["clearing"] == (when == "clearing")
    loop.run_until_complete(end(context, line))
    loop.close()
    xai_pool_patch.uninstall()
    assert [event_of(r) for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
