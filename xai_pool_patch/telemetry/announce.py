"""What `install()` did, told where it is heard.

`install()` is called before LiveKit sets up logging. What was not heard then is told again, once
in each process: as soon as LiveKit logs anything, or at the first turn or prewarm.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from .log import LogEvent, harmless, log_event

_OURS = logging.getLogger("xai_pool_patch")
_LIVEKIT = logging.getLogger("livekit.agents")
_untold: list[tuple[LogEvent, int, dict[str, Any]]] = []


@harmless
def announce(event: LogEvent, *, level: int | None = None, **fields: Any) -> None:
    """Log an event of `install()`, and once more if it was not heard.

    A WARNING that no handler takes is on stderr: so `logging` does.
    """
    level = level or event.level
    is_heard = _is_heard(level)
    log_event(event, level=level, **fields)
    if not is_heard:
        _untold.append((event, level, fields))
        _LIVEKIT.addFilter(_retell_first)


def _retell_first(_: logging.LogRecord) -> bool:
    """The filter that notices that LiveKit logs, and lets everything pass."""
    retell()
    return True


@harmless
def retell() -> None:
    """Tell what has not been heard, if a handler takes it now."""
    for each in [each for each in _untold if _is_heard(each[1])]:
        _untold.remove(each)
        event, level, fields = each
        log_event(event, level=level, **fields)
    if not _untold:
        # A new list: the logger may be going through the old one.
        _LIVEKIT.filters = [each for each in _LIVEKIT.filters if each is not _retell_first]


@harmless
def withdraw() -> None:
    """It is no longer true."""
    _untold.clear()
    retell()


def _is_heard(level: int) -> bool:
    return _OURS.hasHandlers() and _OURS.isEnabledFor(level)


def changed(options: Any) -> str:
    """The options that differ from their defaults; only the name of one that may hide a secret."""
    differing = [
        f"{field.name}={getattr(options, field.name)!r}" if field.repr else f"{field.name}=..."
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]
    return f"options: {', '.join(differing)}" if differing else "default options"
