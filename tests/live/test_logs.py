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
from tests.kit import event_of, line_to, python, quick, speak
from xai_pool_patch import PoolOptions
from xai_pool_patch.telemetry import announce, log
from xai_pool_patch.telemetry.log import LogEvent, log_event

LIVEKITS_CONSOLE = "%(asctime)s - %(levelname)-4s %(name)s - %(message)s %(extra)s"

ANSI = re.compile(r"\x1b\[[0-9;]*m")

LOGGED_ONCE = ("installed", "standby failed", "waited", "reused", "TTS closed", "uninstalled")
"""Of what the conversation has logged, what happens once in it."""


SENTENCES = (
    r"INFO:xai_pool_patch:installed: .* from a pool \(livekit-agents .*\); options: warm='always'",
    r"INFO:xai_pool_patch:connected in \d+ ms",
    r"DEBUG:xai_pool_patch:waited \d+ ms for a connection",
    r"INFO:xai_pool_patch:closed in use, [\d.]+ s old: interrupted",
    r"INFO:xai_pool_patch:closed after [\d.]+ s idle: shutdown",
    r"WARNING:xai_pool_patch:standby failed: \w+ 503 at \w+:\d+; next attempt in [\d.]+ s",
    r"INFO:xai_pool_patch:TTS closed: 1 of 2 .*, 0 were replayed; waited \d+ ms in all, .*",
)


async def converse() -> None:
    """Two turns, the second interrupted, and a standby that is made at the second try."""
    async with line_to(quick(pace=5.0, speech_per_character=0.02)) as line:
        xai_pool_patch.install(PoolOptions(warm="always"))
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
    """A plain formatter is enough: the message says what happened. Nothing is logged twice."""
    lines = logged(logging.Formatter(logging.BASIC_FORMAT))
    for message in LOGGED_ONCE:
        assert len([line for line in lines if f":xai_pool_patch:{message}" in line]) == 1
    for sentence in SENTENCES:
        assert re.search(f"^{sentence}$", "\n".join(lines), re.MULTILINE), sentence
    assert len([line for line in lines if "xai_pool_patch:connected in" in line]) == 2


def test_records_in_livekits_console(logged: Callable[[logging.Formatter], list[str]]) -> None:
    """The fields follow the message."""
    lines = logged(ColoredFormatter(LIVEKITS_CONSOLE))
    [line] = [line for line in lines if "standby failed" in line]
    assert re.search(r"WARNING xai_pool_patch - standby failed: .* s \{.*\}$", line)
    assert '"xai_pool_retry_in_s": 0.' in line
    connected = r'- connected in \d+ ms \{.*"xai_pool_connect_ms": '
    assert len([line for line in lines if re.search(connected, line)]) == 2


def strictly(line: str) -> Any:
    """JSON as others read it, without Python's additions to it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "formatter",
    [JsonFormatter(), structlogs(structlog.processors.JSONRenderer())],
    ids=["LiveKit's", "structlog's"],
)
def test_records_as_json(
    formatter: logging.Formatter,
    logged: Callable[[logging.Formatter], list[str]],
) -> None:
    """One document a record, with the fields beside the event and its level."""
    documents = [strictly(line) for line in logged(formatter)]
    event = "xai_pool_event"
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


class Reentrant(logging.Handler):
    """Notes whether the step that reported was still under way."""

    def __init__(self) -> None:
        super().__init__()
        self.is_in_step = False
        self.records: list[tuple[str, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((event_of(record), self.is_in_step))


@pytest.fixture
def listener() -> Iterator[Reentrant]:
    logger, handler = logging.getLogger("xai_pool_patch"), Reentrant()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


async def test_a_record_leaves_after_the_step_that_reported_it(listener: Reentrant) -> None:
    """A handler that runs the loop again meets no pool that is half changed. In their order."""
    listener.is_in_step = True
    log_event(LogEvent.CLEARED)
    log_event(LogEvent.REUSED)
    listener.is_in_step = False
    assert listener.records == []
    await asyncio.sleep(0)
    assert listener.records == [("cleared", False), ("reused", False)]


def test_a_record_leaves_at_once_where_no_loop_runs(listener: Reentrant) -> None:
    log_event(LogEvent.CLEARED)
    assert [event for event, _ in listener.records] == ["cleared"]


def test_a_logger_class_of_the_applications_own_makes_the_records(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may add what the application's formatter shows."""
    logger = logging.getLogger("xai_pool_patch")
    made = logger.makeRecord

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        vars(record)["request"] = "r-1"
        return record

    monkeypatch.setattr(logger, "makeRecord", make_record)
    log_event(LogEvent.NO_SIGNS, reason="a test")
    assert [vars(record)["request"] for record in caplog.records] == ["r-1"]


def test_nothing_is_lost_with_a_loop_that_stops(listener: Reentrant) -> None:
    """What is flushed, or reported next, brings what was left. Nothing comes twice."""

    async def last_step() -> None:
        loop.stop()
        log_event(LogEvent.CLEARED)

    loop = asyncio.new_event_loop()
    task = loop.create_task(last_step())
    loop.run_forever()
    assert task.done()
    log.flush()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert [event for event, _ in listener.records] == ["cleared"]


async def test_the_place_is_that_which_reported(
    patched: None, caplog: pytest.LogCaptureFixture
) -> None:
    """In this package, neither structlog's nor that of the telemetry."""
    caplog.set_level(logging.DEBUG, "xai_pool_patch")
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "Hello.")
        await tts.aclose()
    records = [r for r in caplog.records if event_of(r) in ("connected", "waited", "TTS closed")]
    assert records
    for record in records:
        path = Path(record.pathname)
        assert path.is_relative_to(Path(xai_pool_patch.__file__).parent)
        assert path.parent.name != "telemetry"
        line = path.read_text().splitlines()[record.lineno - 1]
        assert "log_event" in line or "metrics." in line


IN_A_WORKER = """
import logging, xai_pool_patch, xai_pool_patch.plugin.releases as releases
from livekit.plugins import xai
{before}
xai_pool_patch.install(on_unsupported="skip")
logging.basicConfig(level=logging.INFO)
for _ in range(2):
    logging.getLogger("livekit.agents").info("starting worker")
"""


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ("", "INFO:xai_pool_patch:installed: "),
        (
            "releases.RELEASES = ()",
            "WARNING:xai_pool_patch:plugin not supported, nothing patched: ",
        ),
        ("import os; os.environ['XAI_POOL_PATCH'] = 'off'", "WARNING:xai_pool_patch:switched off"),
    ],
)
def test_what_install_did_is_told_when_livekit_begins_to_log(before: str, told: str) -> None:
    """Its log is set up after install(). Once."""
    done = python(IN_A_WORKER.format(before=before))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(told) == 1


def test_an_options_secret_is_not_told() -> None:
    """Only its name."""
    options = PoolOptions(min_size=2, redis_url="redis://:secret@host")
    assert announce.changed(options) == "options: min_size=2, redis_url=..."
    assert announce.changed(PoolOptions()) == "default options"


def test_every_event_is_documented_with_its_level() -> None:
    """Applications rely on the names, so a new name needs a line in the documentation."""
    page = Path(__file__).parents[2].joinpath("docs/observability.md").read_text()
    for event in LogEvent:
        level = logging.getLevelName(event.level)
        assert f"| `{event.label}` | {level} |" in page, event
