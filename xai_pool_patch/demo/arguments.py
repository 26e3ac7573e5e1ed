"""What the commands take, and what they say of anything else."""

from __future__ import annotations

import typer

LONGEST_ROUND_TRIP = 1000
"""Milliseconds. Much more, and a handshake does not fit the plugin's timeout of 10 s."""


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
