"""Checks the values of the commands' options."""

from __future__ import annotations

import os
from pathlib import Path

import typer

LONGEST_ROUND_TRIP = 1000
"""Milliseconds. With much more, a handshake does not fit the plugin's timeout of 10 s."""


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


def writable(value: Path | None) -> Path | None:
    if value is None:
        return None
    touched = value if value.exists() else value.parent
    if value.is_dir() or not os.access(touched, os.W_OK):
        raise typer.BadParameter(f"must be a file that can be written, not {value}")
    return value
