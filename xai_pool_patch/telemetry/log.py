"""The log events, and how they get into the standard `logging` tree.

A record leaves after the step that reported it. A log handler is the application's: it may run the
event loop again, and would meet a pool that is half changed. So where a loop runs, it emits the
record as soon as the present step has ended, and in the order of the reports.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import functools
import logging
import sys
import traceback
from collections.abc import Callable
from logging import DEBUG, ERROR, INFO, WARNING
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import structlog.stdlib

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

    Applications may rely on names and levels. A sentence that begins with a space, a comma or a
    colon goes on after the name. Of several sentences the first counts whose fields the event has.
    """

    INSTALLED = (
        "installed",
        INFO,
        (
            ": livekit-plugins-xai {plugin} takes its connections from a pool"
            " (livekit-agents {agents}, {shape}); {options}"
        ),
    )
    UNINSTALLED = "uninstalled", INFO, ": livekit-plugins-xai has been restored"
    REFUSED = "plugin not supported", WARNING, ", nothing patched: {reason}"
    SWITCHED_OFF = "switched off by XAI_POOL_PATCH", WARNING, ": nothing is patched"
    COVERED = (
        "covered by another wrapper",
        WARNING,
        "{attribute} is covered by another wrapper; ours stays below it and does nothing",
    )
    LEFT_ALONE = "left alone", WARNING, ", {tts} connects by itself: {reason}"
    NO_SIGNS = (
        "no signs of replies",
        WARNING,
        ", no connection is opened before there is text: {reason}",
    )
    FAULT = (
        "failed open",
        ERROR,
        ", the plugin connects by itself from now on: {error} while {operation}. Please report it",
    )

    CONNECTED = "connected", INFO, " in {connect_ms:.0f} ms"
    CLOSED = "closed", INFO, " after {idle_s} s idle: {reason}", " in use, {age_s} s old: {reason}"
    CLEARED = "cleared", DEBUG, ": the connection of an interrupted utterance stays"
    CLEARING_STOPPED = "clearing stopped", WARNING, ": {reason}"
    STANDBY_FAILED = (
        "standby failed",
        WARNING,
        ": {error}; next attempt in {retry_in_s} s",
        ": {error}; no further attempt until a turn has connected",
    )
    SESSIONS_SCARCE = (
        "sessions scarce",
        WARNING,
        "sessions count as scarce for {for_s} s, because of {reason}",
    )
    SESSIONS_SUFFICE = "sessions suffice", INFO, " again"

    ON_DEMAND = "on demand", INFO, " for {for_s} s, connects for waiting turns only: {reason}"
    SHORTAGE_LASTS = (
        "sessions scarce for ten minutes",
        WARNING,
        "sessions scarce at {host} for {for_s} s by now, last refused with {status}",
        "sessions scarce at {host} for {for_s} s by now",
    )
    STORE_FAILED = (
        "session store failed",
        WARNING,
        " to {operation} ({store}): {error}",
        " to {operation} ({store}): {reason}",
    )
    STORE_RESTORED = "session store works again", INFO, " ({store})"

    REUSED = "reused", DEBUG, " a connection"
    WAITED = "waited", DEBUG, " {wait_ms:.0f} ms for a connection"
    REPLAYED = "replayed", INFO, " after {wait_ms:.0f} ms: {reason}"
    REPLAY_FAILED = "replay failed", WARNING, " ({reason}): {error}"
    TTS_CLOSED = (
        "TTS closed",
        INFO,
        (
            ": {reused} of {utterances} utterances found a connection, {replays} were replayed;"
            " waited {wait_ms_total:.0f} ms in all, {wait_ms_max:.0f} at most"
        ),
    )

    PREWARM_SKIPPED = "prewarm skipped", DEBUG, ": {reason}"
    IGNORED = "ignored while idle", DEBUG, "ignored {message_type} while idle"
    CLOSE_FAILED = "close failed", DEBUG, ": {error}; the socket is closed"
    METRICS_MISSING = "metrics missing", WARNING, " from the page: {reason}"
    TELEMETRY_FAILED = "telemetry failed", WARNING, ", logged once: {error}"

    def __init__(self, label: str, level: int, *sentences: str) -> None:
        self.label = label
        self.level = level
        self.sentences = [label + each if each[0] in " ,:" else each for each in sentences]

    def sentence(self, fields: dict[str, Any]) -> str:
        for sentence in self.sentences:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                return sentence.format_map(fields)
        return self.label  # a report that lacks a field is better than none


@harmless
def log_event(event: LogEvent, *, level: int | None = None, **fields: Any) -> None:
    """Log an event. The fields become attributes of the log record, with `FIELD_PREFIX`.

    Args:
        level: replaces the event's usual level.
        fields: an exception is logged as `describe` puts it.
    """
    level = level or event.level
    if _logger.isEnabledFor(level):  # much cheaper than to let structlog find out
        prepare().log(level, event, **fields)  # type: ignore[arg-type]


@functools.cache
def prepare() -> structlog.stdlib.BoundLogger:
    """The structlog logger that ends in the standard logger `xai_pool_patch`.

    It has processors of its own, and neither uses nor changes the application's structlog
    configuration. The import takes 20 ms, which no turn should wait for: `install()` calls this.
    """
    from structlog.stdlib import BoundLogger, render_to_log_kwargs

    return BoundLogger(_Outlet(_logger.name), [_say, render_to_log_kwargs], {})


def _say(_: Any, __: str, fields: Any) -> Any:
    """The processor that makes a sentence of an event, and prefixes its fields."""
    event = fields.pop("event")
    for name, value in fields.items():
        fields[name] = describe(value) if isinstance(value, Exception) else value
    sentence = event.sentence({name: value for name, value in fields.items() if value is not None})
    prefixed = {f"{FIELD_PREFIX}{name}": value for name, value in fields.items()}
    return {"event": sentence, f"{FIELD_PREFIX}event": event.label, **prefixed}


_pending: dict[logging.LogRecord, None] = {}
"""What the running event loops are going to emit, in order."""


class _Outlet(logging.Logger):
    """Where structlog's records go: into the standard logger, after the present step."""

    def findCaller(self, *_: Any) -> tuple[str, int, str, None]:  # noqa: N802
        """Where in this package, and if possible outside of `telemetry`, the report comes from."""
        callers = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
        frame = min(callers, key=_distance)
        return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None

    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:  # noqa: N802
        # An application may have a class of its own for loggers.
        return _logger.makeRecord(*args, **kwargs)

    def handle(self, record: logging.LogRecord) -> None:
        import asyncio  # which structlog has imported

        _pending[record] = None
        try:
            asyncio.get_running_loop().call_soon(_emit, record)
        except RuntimeError:  # no loop runs here, or it is closed
            flush()


@harmless
def _emit(record: logging.LogRecord) -> None:
    if record in _pending:
        del _pending[record]
        _logger.handle(record)


@harmless
def flush() -> None:
    """Emit now what waits for the end of a step. For who ends: a loop that stops runs no more."""
    for record in list(_pending):
        _emit(record)


atexit.register(flush)

_PACKAGE, _FOLDER, _ = __file__.rpartition("telemetry")  # pathlib takes long to import


def _distance(frame: FrameType) -> tuple[bool, ...]:
    """How far code is from what reports: in this package, not in this file, not in this folder."""
    path = frame.f_code.co_filename
    return not path.startswith(_PACKAGE), path == __file__, path.startswith(_PACKAGE + _FOLDER)


def describe(error: BaseException) -> str:
    """Type, HTTP status and place of an error, without its message.

    A message or a traceback may quote what must not be logged: aiohttp's handshake errors carry
    the request's headers, and with them the API key.
    """
    status, steps = status_of(error), traceback.walk_tb(error.__traceback__)
    places = [f" at {frame.f_code.co_name}:{line}" for frame, line in steps]
    return "".join([type(error).__name__, f" {status}" if status else "", *places[-1:]])


def status_of(error: BaseException) -> int | None:
    """The HTTP status, which aiohttp calls `status` and LiveKit `status_code`."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    return status if isinstance(status, int) and status > 0 else None


def in_ms(seconds: float) -> float:
    """Milliseconds, rounded as in log records."""
    return round(seconds * 1e3, 1)
