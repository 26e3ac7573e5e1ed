"""T1: log records as applications see them, whatever their logging is set up with."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from livekit.agents.cli.log import ColoredFormatter, JsonFormatter

import xai_pool_patch
from tests.kit import line_to, quick, speak
from xai_pool_patch.telemetry.log import LogEvent

LIVEKITS_CONSOLE = "%(asctime)s - %(levelname)-4s %(name)s - %(message)s %(extra)s"

ANSI = re.compile(r"\x1b\[[0-9;]*m")

LOGGED_ONCE = ("installed", "standby failed", "waited", "reused", "TTS closed", "uninstalled")
"""Of what the conversation has logged, what happens once in it."""


async def converse() -> None:
    """Two turns, the second interrupted, and a standby that is made at the second try."""
    async with line_to(quick(pace=5.0, speech_per_character=0.02)) as line:
        xai_pool_patch.install()
        tts = line.tts()
        await speak(tts, "First.")
        line.server.behaviour.refuse_next = [503]
        turn = asyncio.create_task(speak(tts, "A second sentence that is cut off."))
        await line.server.wait_for(lambda s: len(s.utterances) > 1)
        await line.server.wait_for(lambda s: s.utterances[1].first_audio_at)
        turn.cancel()
        await line.server.wait_for(lambda s: len(s.connections) == 2)
        while not xai_pool_patch.stats()["idle"]:
            await asyncio.sleep(0)
        await tts.aclose()
        xai_pool_patch.uninstall()


def structlogs(*renderer: Any) -> logging.Formatter:
    """As its documentation sets it up for records of other libraries."""
    return structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
        ],
    )


@pytest.fixture
def logged(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[logging.Formatter], list[str]]]:
    """What the conversation has logged, line by line, through one handler at the root."""

    def run(formatter: logging.Formatter) -> list[str]:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.addFilter(lambda record: record.name.startswith("xai_pool_patch"))
        handler.setFormatter(formatter)
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
        logging.getLogger("xai_pool_patch").setLevel(logging.DEBUG)
        capfd.readouterr()
        asyncio.run(converse())
        assert capfd.readouterr() == ("", ""), "written past logging"
        return ANSI.sub("", stream.getvalue()).splitlines()

    yield run
    logging.getLogger("xai_pool_patch").setLevel(logging.NOTSET)


def test_records_with_basic_config(logged: Callable[[logging.Formatter], list[str]]) -> None:
    """Level, logger and event, without the fields. Nothing is logged twice."""
    lines = logged(logging.Formatter(logging.BASIC_FORMAT))
    for message in LOGGED_ONCE:
        assert len([line for line in lines if line.endswith(f":xai_pool_patch:{message}")]) == 1
    assert "WARNING:xai_pool_patch:standby failed" in lines
    assert lines.count("INFO:xai_pool_patch:connected") == 2
    assert {line.split(":", 2)[2] for line in lines} <= {event.message for event in LogEvent}


def test_records_in_livekits_console(logged: Callable[[logging.Formatter], list[str]]) -> None:
    """The fields follow the event."""
    lines = logged(ColoredFormatter(LIVEKITS_CONSOLE))
    [line] = [line for line in lines if "standby failed" in line]
    assert re.search(r"WARNING xai_pool_patch - standby failed \{.*\}$", line)
    assert '"xai_pool_retry_in_s": 0.' in line
    assert (
        len([line for line in lines if re.search(r'- connected \{.*"xai_pool_connect_ms": ', line)])
        == 2
    )


def strictly(line: str) -> Any:
    """JSON as others read it, without Python's additions to it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    ("formatter", "event"),
    [(JsonFormatter(), "message"), (structlogs(structlog.processors.JSONRenderer()), "event")],
    ids=["LiveKit's", "structlog's"],
)
def test_records_as_json(
    formatter: logging.Formatter,
    event: str,
    logged: Callable[[logging.Formatter], list[str]],
) -> None:
    """One document a record, with the fields beside the event and its level."""
    documents = [strictly(line) for line in logged(formatter)]
    events = [document[event] for document in documents]
    assert [events.count(message) for message in LOGGED_ONCE] == [1] * len(LOGGED_ONCE)
    by_event = {document[event]: document for document in documents}
    assert by_event["standby failed"]["level"].lower() == "warning"
    assert by_event["standby failed"]["xai_pool_error"].split(" at ")[0].endswith(" 503")
    reasons = [each["xai_pool_reason"] for each in documents if each[event] == "closed"]
    assert reasons == ["interrupted", "shutdown"]
    assert by_event["TTS closed"]["xai_pool_utterances"] == 2
    assert by_event["TTS closed"]["xai_pool_reused"] == 1
    assert by_event["connected"]["xai_pool_connect_ms"] > 0


def test_the_applications_own_structlog_configuration_is_left_alone(
    logged: Callable[[logging.Formatter], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """The patch neither uses nor changes it."""
    calls: list[Any] = []

    def processor(*args: Any) -> Any:
        calls.append(args)
        return args[2]

    structlog.configure(
        processors=[processor, structlog.dev.ConsoleRenderer(colors=False)],
        logger_factory=structlog.PrintLoggerFactory(),
    )
    try:
        before = structlog.get_config()
        lines = logged(structlogs(structlog.dev.ConsoleRenderer(colors=False)))
        assert calls == []
        assert structlog.get_config() == before
        structlog.get_logger().info("the application's")
        assert "the application's" in capfd.readouterr().out
    finally:
        structlog.reset_defaults()
    [line] = [line for line in lines if "TTS closed" in line]
    assert "[xai_pool_patch]" in line
    assert "xai_pool_utterances=2" in line


def test_every_event_is_documented_with_its_level() -> None:
    """Applications rely on the names, so a new name needs a line in the documentation."""
    page = Path(__file__).parents[2].joinpath("docs/observability.md").read_text()
    for event in LogEvent:
        level = logging.getLevelName(event.level)
        assert f"| `{event.message}` | {level} |" in page, event
