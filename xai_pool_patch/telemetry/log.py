"""The log events, and how they get into the standard `logging` tree."""

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
"""The prefix of every field. `logging` refuses a record if the application's record factory has set
a field of the same name already, so no other code may use the names of ours."""

Report = TypeVar("Report", bound=Callable[..., None])

_logger = logging.getLogger("xai_pool_patch")
_has_complained = False


def harmless(report: Report) -> Report:
    """Keep a function that reports something from raising.

    An application's log handler may raise, or a meter, or code of ours: the reported operation must
    not fail for that. The first such failure is logged, if that is possible.
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
    """The message and the level of each log event. Applications may rely on both."""

    INSTALLED = ("installed", INFO)
    UNINSTALLED = ("uninstalled", INFO)
    REFUSED = ("refused", WARNING)
    SWITCHED_OFF = ("switched off by XAI_POOL_PATCH", WARNING)
    COVERED = ("covered by another wrapper", WARNING)
    NO_SIGNS = ("no signs of replies", WARNING)
    FAULT = ("failed open", ERROR)

    CONNECTED = ("connected", INFO)
    CLOSED = ("closed", INFO)
    CLEARED = ("cleared", DEBUG)
    CLEARING_STOPPED = ("clearing stopped", WARNING)
    VERIFYING_STOPPED = ("verifying stopped", WARNING)
    STANDBY_FAILED = ("standby failed", WARNING)
    SESSIONS_SCARCE = ("sessions scarce", WARNING)
    SESSIONS_SUFFICE = ("sessions suffice", INFO)
    PINGS_UNANSWERED = ("PINGs unanswered, heartbeat off", WARNING)

    SHORTAGE_LASTS = ("sessions scarce for ten minutes", WARNING)
    STORE_FAILED = ("session store failed", WARNING)
    STORE_RESTORED = ("session store works again", INFO)

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
    """Log an event. The fields become attributes of the log record, with `FIELD_PREFIX`.

    Args:
        level: replaces the event's usual level.
        fields: an exception is logged as `describe` puts it.
    """
    level = event.level if level is None else level
    if _logger.isEnabledFor(level):  # much cheaper than to let structlog find out
        record = {
            f"{FIELD_PREFIX}{name}": describe(value) if isinstance(value, Exception) else value
            for name, value in fields.items()
        }
        _structured().log(level, event.message, **record)


@functools.cache
def _structured() -> structlog.stdlib.BoundLogger:
    """The structlog logger that ends in the standard logger `xai_pool_patch`.

    It has processors of its own, and neither uses nor changes the application's structlog
    configuration. structlog is imported at the first use, since that takes longer than everything
    else in this package's import.
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
    """Milliseconds, rounded as in log records."""
    return round(seconds * 1e3, 1)
