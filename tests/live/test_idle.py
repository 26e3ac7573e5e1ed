"""C1 to C3: a connection that nobody uses is still looked after."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import xai_pool_patch
from tests.kit import Line, all_closed, interrupted, line_to, quick, speak
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
async def test_a_peer_that_ends_it_is_noticed_at_once(patched: None, ending: Ending) -> None:
    """C3: the next turn does not try a dead socket, and its replacement is dialled already."""
    async with line_to(quick(idle_limit=0.1, ending=ending)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        line.server.behaviour.idle_limit = None
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.errors == []
        await tts.aclose()


async def test_a_peer_that_vanished_is_found_by_the_heartbeat() -> None:
    """C2: a half-open connection is found and replaced while nobody waits for it."""
    xai_pool_patch.install(PoolOptions(heartbeat=0.1, close_timeout=0.1))
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


async def test_a_server_that_answers_no_ping_keeps_its_connections() -> None:
    """C2: only the first two end for it; the others are not held to what it never does."""
    heartbeat = 0.05
    xai_pool_patch.install(PoolOptions(heartbeat=heartbeat, close_timeout=0.1))
    async with line_to(quick(answer_pings=False)) as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.wait_for(lambda s: len(s.connections) == 3)
        await asyncio.sleep(5 * heartbeat)  # one that is held to PINGs ends within two of them
        assert [each.is_open for each in line.server.connections] == [False, False, True]
        assert line.server.connections[2].pings_received <= 1  # that of the dial
        heard = await speak(tts, "Second.")
        assert heard.samples == {line.server.utterance_for("Second.").number}
        assert line.errors == []
        await tts.aclose()
    xai_pool_patch.uninstall()


@pytest.mark.parametrize(
    "frame", ['{"type":"error","message":"Deadline expired"}', '{"type":"audio.done"}', "{not json"]
)
async def test_an_answer_to_nothing_condemns_it(patched: None, frame: str) -> None:
    """C1: an idle connection on which something comes is not clean."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.broadcast(frame)
        await line.server.wait_for(lambda s: s.connections[0].ended is End.CLIENT_CLOSE)
        await tts.aclose()
        await all_closed(line.server)


async def test_other_messages_are_ignored(patched: None) -> None:
    """C1: news that is no answer does not cost a connection."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "First.")
        await line.server.broadcast('{"type":"session.updated"}')
        await line.server.broadcast('{"type":"error","message":"end of the test"}')
        await line.server.wait_for(lambda s: not s.connections[0].is_open)
        assert xai_pool_patch.stats()["closed_lost"] == 1
        await tts.aclose()


async def test_a_closed_session_ends_its_pool_quietly(
    patched: None, caplog: pytest.LogCaptureFixture
) -> None:
    """P9: at the end of a job nothing is dialled again and nothing is complained of."""
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        await line.http.close()
        await line.server.wait_for(lambda s: s.open_count == 0)
        await tts.aclose()
        assert len(line.server.handshakes) == 1
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_a_session_closed_just_before_its_loop() -> None:
    """P9: no task is begun that the loop would not live to see."""

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
def test_a_loop_that_just_stops(
    when: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """P9: a loop closed without cancelling its tasks takes the pool's tasks along in silence."""
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
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
