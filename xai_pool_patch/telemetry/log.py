"""Log records: what each is called, and its way into the standard `logging` tree."""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable
from logging import DEBUG, ERROR, INFO, WARNING
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import structlog

FIELD_PREFIX = "xai_pool_"
"""Of every field. `logging` refuses a record whose field the application's record factory has set
already, so no field may have a name that somebody else would think of."""

Report = TypeVar("Report", bound=Callable[..., None])

_logger = logging.getLogger("xai_pool_patch")
_has_complained = False


def harmless(report: Report) -> Report:
    """What reports something never fails it: not by an application's log handler that raises, not
    by a meter, a span or a fault of ours. The first such failure is logged, if that is possible."""

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
    """What is told: the message, and its level. Applications may rely on both."""

    INSTALLED = ("installed", INFO)
    UNINSTALLED = ("uninstalled", INFO)
    REFUSED = ("refused", WARNING)
    SWITCHED_OFF = ("switched off by XAI_POOL_PATCH", WARNING)
    COVERED = ("covered by another wrapper", WARNING)
    FAULT = ("failed open", ERROR)

    CONNECTED = ("connected", INFO)
    CLOSED = ("closed", INFO)
    CLEARED = ("cleared", DEBUG)
    CLEARING_STOPPED = ("clearing stopped", WARNING)
    VERIFYING_STOPPED = ("verifying stopped", WARNING)
    STANDBY_FAILED = ("standby failed", WARNING)
    PINGS_UNANSWERED = ("PINGs unanswered, heartbeat off", WARNING)

    REUSED = ("reused", DEBUG)
    WAITED = ("waited", DEBUG)
    REPLAYED = ("replayed", INFO)
    REPLAY_FAILED = ("replay failed", WARNING)
    TTS_CLOSED = ("TTS closed", INFO)

    PREWARM_SKIPPED = ("prewarm skipped", DEBUG)
    IGNORED = ("ignored while idle", DEBUG)
    STALE_AUDIO = ("stale audio dropped", INFO)
    CLOSE_FAILED = ("close failed", DEBUG)
    TELEMETRY_FAILED = ("telemetry failed", WARNING)

    def __init__(self, message: str, level: int) -> None:
        self.message = message
        self.level = level


@harmless
def log_event(event: LogEvent, *, level: int | None = None, **fields: Any) -> None:
    """Logs an event; the fields become attributes of the log record, behind `FIELD_PREFIX`.

    Args:
        level: if it is not the usual one.
        fields: of an exception only what `describe` says is logged.
    """
    level = event.level if level is None else level
    if _logger.isEnabledFor(level):  # by far the cheapest way to say nothing
        record = {
            f"{FIELD_PREFIX}{name}": describe(value) if isinstance(value, Exception) else value
            for name, value in fields.items()
        }
        _structured().log(level, event.message, **record)


@functools.cache
def _structured() -> structlog.stdlib.BoundLogger:
    """The structlog logger that ends in the standard logger `xai_pool_patch`.

    Its processors are its own, so the application's structlog configuration is neither used nor
    changed. structlog is imported at the first use: it takes longer than all else here.
    """
    import structlog

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        _logger,
        processors=[structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


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
    """As log records have it."""
    return round(seconds * 1e3, 1)
