"""The options that several commands have, and the checks of options' values."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

LONGEST_ROUND_TRIP = 1000
"""Milliseconds. With much more, a handshake does not fit the plugin's timeout of 10 s."""

LONGEST_IDLE_TIME = 2000
"""Seconds. Somewhat later xAI ends any connection."""

MOST_SESSIONS = 200
"""More than xAI allows a team, as far as is documented."""


def turns(value: int) -> int:
    if value < 1:
        raise typer.BadParameter(f"must be a whole number, 1 or more, not {value}")
    return value


def milliseconds(value: float) -> float:
    if not 0 <= value <= LONGEST_ROUND_TRIP:
        raise typer.BadParameter(
            f"must be a number of milliseconds from 0 to {LONGEST_ROUND_TRIP}, not {value:g}"
        )
    return value


RoundTrip = Annotated[
    float,
    typer.Option(metavar="MS", help="Round trip to the fake server, in ms.", callback=milliseconds),
]


def idle_time(value: float | None) -> float | None:
    if value is not None and not 1 <= value <= LONGEST_IDLE_TIME:
        raise typer.BadParameter(
            f"must be a number of seconds from 1 to {LONGEST_IDLE_TIME}, not {value:g}"
        )
    return value


def sessions(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= MOST_SESSIONS:
        raise typer.BadParameter(f"must be a whole number from 1 to {MOST_SESSIONS}, not {value}")
    return value


def writable(value: Path | None) -> Path | None:
    """Tried before the work begins. A file that is not there is not left behind."""
    if value is None:
        return None
    try:
        is_new = not value.exists()
        if is_new or value.is_file():
            value.open("ab").close()
        elif value.is_dir() or not os.access(value, os.W_OK):
            raise PermissionError(errno.EACCES, "not a file")
        if is_new:
            value.unlink()
    except OSError as error:
        raise typer.BadParameter(
            f"must be a file that can be written, not {value} ({error.strerror})"
        ) from None
    return value
