"""The log events, and how they get into the standard `logging` tree.

A record leaves after the step that reported it. A log handler is the application's: it may run the
event loop again, and would meet a pool that is half changed. So where a loop runs, it emits the
record as soon as the present step has ended, and in the order of the reports.
"""

from __future__ import annotations

import atexit
import enum
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from logging import DEBUG, ERROR, INFO, WARNING
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import structlog

FIELD_PREFIX = "xai_pool_"
"""The prefix of every field. `logging` refuses a record if the application's record factory has set
a field of the same name already, so no other code may use the names of ours."""

Report = TypeVar("Report", bound=Callable[..., None])

_logger = logging.getLogger("xai_pool_patch")
_has_complained = False


def harmless(report: Report) -> Report:
    """Keep a function that reports something from raising.

    An application's log handler may raise, or code of ours: the reported operation must not fail
    for that. The first such failure is logged, if that is possible.
    """

    @functools.wraps(report)
    def guarded(*args: Any, **kwargs: Any) -> None:
        global _has_complained
        try:
            report(*args, **kwargs)
        except Exception as error:
            if not _has_complained:
                _has_complained = True
                log_event(LogEvent.TELEMETRY_FAILED, error=error)

    return guarded  # type: ignore[return-value]


class LogEvent(enum.Enum):
    """The name and the level of each log event, and the sentence that its record says.

    Applications may rely on names and levels. Of several sentences the first counts whose fields
    the event has.
    """

    INSTALLED = (
        "installed",
        INFO,
        (
            "installed: livekit-plugins-xai {plugin} takes its connections from a pool"
            " (livekit-agents {agents}, {shape}); {options}"
        ),
    )
    UNINSTALLED = ("uninstalled", INFO, "uninstalled: livekit-plugins-xai has been restored")
    REFUSED = ("plugin not supported", WARNING, "plugin not supported, nothing patched: {reason}")
    SWITCHED_OFF = (
        "switched off by XAI_POOL_PATCH",
        WARNING,
        "switched off by {variable}: nothing is patched",
    )
    COVERED = (
        "covered by another wrapper",
        WARNING,
        "{attribute} is covered by another wrapper; ours stays below it and does nothing",
    )
    LEFT_ALONE = (
        "left alone",
        WARNING,
        "left alone, {tts} connects by itself: {reason}",
    )
    NO_SIGNS = (
        "no signs of replies",
        WARNING,
        "no signs of replies, no connection is opened before there is text: {reason}",
    )
    FAULT = (
        "failed open",
        ERROR,
        (
            "failed open, the plugin connects by itself from now on: {error} while"
            " {operation}. Please report it"
        ),
    )

    CONNECTED = ("connected", INFO, "connected in {connect_ms:.0f} ms")
    CLOSED = (
        "closed",
        INFO,
        "closed after {idle_s} s idle: {reason}",
        "closed in use, {age_s} s old: {reason}",
    )
    CLEARED = ("cleared", DEBUG, "cleared: the connection of an interrupted utterance stays")
    CLEARING_STOPPED = ("clearing stopped", WARNING, "clearing stopped: {reason}")
    STANDBY_FAILED = (
        "standby failed",
        WARNING,
        "standby failed: {error}; next attempt in {retry_in_s} s",
        "standby failed: {error}; no further attempt until a turn has connected",
    )
    SESSIONS_SCARCE = (
        "sessions scarce",
        WARNING,
        "sessions count as scarce for {for_s} s, because of {reason}",
    )
    SESSIONS_SUFFICE = ("sessions suffice", INFO, "sessions suffice again")

    ON_DEMAND = (
        "on demand",
        INFO,
        "on demand for {for_s} s, connects for waiting turns only: {reason}",
    )
    SHORTAGE_LASTS = (
        "sessions scarce for ten minutes",
        WARNING,
        "sessions scarce at {host} for {for_s} s by now, last refused with {status}",
        "sessions scarce at {host} for {for_s} s by now",
    )
    STORE_FAILED = (
        "session store failed",
        WARNING,
        "session store failed to {operation} ({store}): {error}",
        "session store failed to {operation} ({store}): {reason}",
    )
    STORE_RESTORED = ("session store works again", INFO, "session store works again ({store})")

    REUSED = ("reused", DEBUG, "reused a connection")
    WAITED = ("waited", DEBUG, "waited {wait_ms:.0f} ms for a connection")
    REPLAYED = ("replayed", INFO, "replayed after {wait_ms:.0f} ms: {reason}")
    REPLAY_FAILED = ("replay failed", WARNING, "replay failed ({reason}): {error}")
    TTS_CLOSED = (
        "TTS closed",
        INFO,
        (
            "TTS closed: {reused} of {utterances} utterances found a connection,"
            " {replays} were replayed; waited {wait_ms_total:.0f} ms in all,"
            " {wait_ms_max:.0f} at most"
        ),
    )

    PREWARM_SKIPPED = ("prewarm skipped", DEBUG, "prewarm skipped: {reason}")
    IGNORED = ("ignored while idle", DEBUG, "ignored {message_type} while idle")
    CLOSE_FAILED = ("close failed", DEBUG, "close failed: {error}; the socket is closed")
    METRICS_MISSING = (
        "metrics missing",
        WARNING,
        "metrics missing from the page: {reason}",
    )
    TELEMETRY_FAILED = (
        "telemetry failed",
        WARNING,
        "telemetry failed, logged once: {error}",
    )

    def __init__(self, label: str, level: int, *sentences: str) -> None:
        self.label = label
        self.level = level
        self.sentences = sentences

    def sentence(self, fields: dict[str, Any]) -> str:
        for sentence in self.sentences:
            try:
                return sentence.format_map(fields)
            except (KeyError, ValueError, TypeError):
                continue
        return self.label  # a report that lacks a field is better than none


@harmless
def log_event(event: LogEvent, *, level: int | None = None, **fields: Any) -> None:
    """Log an event. The fields become attributes of the log record, with `FIELD_PREFIX`.

    Args:
        level: replaces the event's usual level.
        fields: an exception is logged as `describe` puts it.
    """
    level = event.level if level is None else level
    if _logger.isEnabledFor(level):  # much cheaper than to let structlog find out
        described = {
            name: describe(value) if isinstance(value, Exception) else value
            for name, value in fields.items()
        }
        _structured().log(level, event, **described)  # type: ignore[arg-type]


@functools.cache
def _structured() -> structlog.stdlib.BoundLogger:
    """The structlog logger that ends in the standard logger `xai_pool_patch`.

    It has processors of its own, and neither uses nor changes the application's structlog
    configuration. structlog is imported at the first use: by `install()`, never on an event loop.
    """
    import structlog

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        _Outlet(),
        processors=[_say, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind()
    return logger


def prepare() -> None:
    """Import what logging needs. It takes 20 ms, which no turn should wait for."""
    _structured()


def _say(_: Any, __: str, fields: Any) -> Any:
    """The processor that makes a sentence of an event, and prefixes its fields."""
    event = fields.pop("event")
    prefixed = {f"{FIELD_PREFIX}{name}": value for name, value in fields.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    return {
        "event": event.sentence(fields),
        f"{FIELD_PREFIX}event": event.label,
        **prefixed,
    }


@dataclass(eq=False)
class _Record:
    """What becomes a record, in the thread and at the place that reported."""

    level: int
    message: str
    fields: dict[str, Any]
    frame_info: tuple[str, int, str]

    @harmless
    def emit(self) -> None:
        path, line, function = self.frame_info
        record = _logger.makeRecord(
            *(_logger.name, self.level, path, line, self.message, (), None),
            *(function, self.fields),
        )
        _logger.handle(record)


_pending: dict[_Record, None] = {}
"""What the running event loops are going to emit, in order."""


class _Outlet:
    """Where structlog's records go: into the standard logger, after the present step."""

    def _take(self, level: int, msg: str, extra: dict[str, Any]) -> None:
        import asyncio  # which structlog has imported

        record = _Record(level, msg, extra, _place())
        _pending[record] = None
        try:
            asyncio.get_running_loop().call_soon(_emit, record)
        except RuntimeError:  # no loop runs here, or it is closed
            flush()

    debug = functools.partialmethod(_take, DEBUG)
    info = functools.partialmethod(_take, INFO)
    warning = functools.partialmethod(_take, WARNING)
    error = functools.partialmethod(_take, ERROR)


@harmless
def _emit(record: _Record) -> None:
    if record in _pending:
        del _pending[record]
        record.emit()


@harmless
def flush() -> None:
    """Emit now what waits for the end of a step. For who ends: a loop that stops runs no more."""
    for record in list(_pending):
        _emit(record)


atexit.register(flush)

_PACKAGE, _, _ = __file__.rpartition("telemetry")  # pathlib takes long to import
_HERE = f"{_PACKAGE}telemetry"


def _place() -> tuple[str, int, str]:
    """Where in this package, but outside of `telemetry`, the report comes from."""
    nearest, frame = None, sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and path != __file__:
            if not path.startswith(_HERE):
                return _described(frame)
            nearest = nearest or frame
        frame = frame.f_back  # type: ignore[assignment]
    return _described(nearest or sys._getframe(1))


def _described(frame: FrameType) -> tuple[str, int, str]:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def describe(error: BaseException) -> str:
    """Type, HTTP status and place of an error, without its message.

    A message or a traceback may quote what must not be logged: aiohttp's handshake errors carry
    the request's headers, and with them the API key.
    """
    status, place = status_of(error), error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "".join(
        [
            type(error).__name__,
            f" {status}" if status else "",
            f" at {place.tb_frame.f_code.co_name}:{place.tb_lineno}" if place else "",
        ]
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status, which aiohttp calls `status` and LiveKit `status_code`."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    return status if isinstance(status, int) and status > 0 else None


def in_ms(seconds: float) -> float:
    """Milliseconds, rounded as in log records."""
    return round(seconds * 1e3, 1)
