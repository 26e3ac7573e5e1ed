"""T1, A4: logging, counting and tracing never cost a turn, whatever the application does.

In each of these applications a conversation goes as it does in one that only listens: every turn is
heard, over as many connections, and nothing is left open.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan
from prometheus_client import values

import xai_pool_patch
from tests.kit import (
    Line,
    all_closed,
    event_of,
    hear_whole,
    interrupted,
    line_to,
    quick,
    registry,
    round_trips_are_known,
)
from tests.live.peer import until
from xai_pool_patch.telemetry import log, usage

OURS = logging.getLogger("xai_pool_patch")
COMPLAINT = ("WARNING", "telemetry failed")
CALLS = ("log_event", "self._log", "announce.announce")
CONNECTIONS = 3
"""That of the first turns, one instead of what was interrupted, and one instead of the dead."""


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an application's own")


class Listener(logging.Handler):
    """An application's handler that works."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)
        self.logged.append((record.levelname, event_of(record)))


# Applications


@contextmanager
def nothing_wrong() -> Iterator[None]:
    yield


def names_of_fields() -> set[str]:
    """All names of fields in the package's log events."""
    names = {"pool", "reason", "number", "error", *usage.UsageStats().as_fields()}
    for module in Path(xai_pool_patch.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in CALLS:
                names |= {keyword.arg for keyword in call.keywords if keyword.arg}
    return names - {"level"}


@contextmanager
def record_factory() -> Iterator[None]:
    """As the documentation of `logging` shows how to set attributes of every record."""
    usual, names = logging.getLogRecordFactory(), names_of_fields()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = usual(*args, **kwargs)
        vars(record).update(dict.fromkeys(names, "the application's"))
        return record

    logging.setLogRecordFactory(factory)
    try:
        yield
    finally:
        logging.setLogRecordFactory(usual)


def handler(break_it: Callable[[Listener], object]) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def application() -> Iterator[None]:
        broken = Listener()
        break_it(broken)
        OURS.addHandler(broken)
        try:
            yield
        finally:
            OURS.removeHandler(broken)

    return application


class _BrokenFormatter(logging.Formatter):
    format = fail


@contextmanager
def filter_of_the_logger() -> Iterator[None]:
    OURS.addFilter(fail)
    try:
        yield
    finally:
        OURS.removeFilter(fail)


@contextmanager
def counter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values.MutexValue, "inc", fail)
        yield


@contextmanager
def span() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NonRecordingSpan, "add_event", fail)
        yield


APPLICATIONS = {
    "nothing wrong": nothing_wrong,
    "its record factory takes all names": record_factory,
    "its handler's emit() raises": handler(lambda it: setattr(it, "emit", fail)),
    "its handler's handle() raises": handler(lambda it: setattr(it, "handle", fail)),
    "its handler's filter raises": handler(lambda it: it.addFilter(fail)),
    "its formatter raises": handler(lambda it: it.setFormatter(_BrokenFormatter())),
    "its logger's filter raises": filter_of_the_logger,
    "its prometheus_client raises": counter,
    "its span raises": span,
}
NOBODYS_FAULT = ("nothing wrong", "its record factory takes all names")
UNHEARD = "its logger's filter raises"


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Of every level, and called before any other handler."""
    listener = Listener()
    monkeypatch.setattr(log, "_has_complained", False, raising=False)
    OURS.addHandler(listener)
    OURS.setLevel(logging.DEBUG)
    yield listener
    OURS.setLevel(logging.NOTSET)
    OURS.removeHandler(listener)


async def converse(line: Line) -> None:
    """A cold turn, reused ones, one that is interrupted, and one on a connection that is dead."""
    tts = line.tts()
    await hear_whole(line, tts, "Cold.")
    await hear_whole(line, tts, "Reused.")
    line.server.behaviour.pace = 5.0
    await interrupted(line, tts)
    line.server.behaviour.pace = 1000.0
    await hear_whole(line, tts, "After the interruption.")
    await until(lambda: xai_pool_patch.stats()["idle"] == 1)
    await until(round_trips_are_known)
    line.server.freeze_all()
    await hear_whole(line, tts, "Dead.")
    line.server.network.unfreeze()
    await hear_whole(line, tts, "Reused again.")
    assert line.errors == []
    await tts.aclose()
    await all_closed(line.server)


@pytest.mark.parametrize("application", APPLICATIONS)
async def test_a_broken_application_costs_no_turn(
    application: str, listener: Listener, no_tasks_left: None
) -> None:
    """Every turn is heard and counted, and the warning is logged once."""
    async with line_to(quick(), 0.01) as line:
        with APPLICATIONS[application]():
            xai_pool_patch.install()
            await converse(line)
            assert not registry().has_failed
            counted = xai_pool_patch.stats()
            xai_pool_patch.uninstall()
            log.flush()
        assert len(line.server.handshakes) == CONNECTIONS
        assert (counted["connections_made"], counted["replays"]) == (CONNECTIONS, 1)
        assert (counted["idle"], counted["leased"]) == (0, 0)
        assert (line.metrics[1].connection_reused, line.metrics[1].acquire_time) == (True, 0.0)
    expected = 0 if application in (*NOBODYS_FAULT, UNHEARD) else 1
    assert listener.logged.count(COMPLAINT) == expected
    if application != UNHEARD:
        assert listener.logged.count(("INFO", "connected")) == CONNECTIONS
    assert "ERROR" not in [level for level, _ in listener.logged]


def test_the_list_of_field_names_is_complete() -> None:
    """Without them the record factory above could not collide."""
    assert {"pool", "operation", "retry_in_s", "utterances", "age_s", "plugin"} <= names_of_fields()
