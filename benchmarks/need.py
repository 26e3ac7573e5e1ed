"""The command `python -m benchmarks need`: what a caller waits, as a table for the README."""

from __future__ import annotations

import statistics
from typing import Annotated

import typer

from xai_pool_patch.__main__ import FAILED, complain
from xai_pool_patch.demo import arguments
from xai_pool_patch.demo.report import PATCHED, UNPATCHED, plugin

from .cases import CASES, LONGEST_WAIT, Figures
from .helpers import HelperFailedError
from .runs import CaseResult, crew_at_work, measure_case

NAME = "benchmarks need"

SITUATIONS = {
    "steady": "steady conversation",
    "after-interrupt": "after an interruption",
    "voices": "after a change of voice",
    "closed": "dead connection, closed by the server",
    "half-open": "dead connection, dropped without a Close",
    "ten-cold": "burst of ten, no connection yet",
    "first-words": "first words, 0.8 s after `tts.prewarm()`",
    "first-words-late": "first words, right after `AgentSession.start()`",
}
"""The rows of the table: the cases that they are measured by, and what they are called."""

Turns = Annotated[
    int,
    typer.Option(
        metavar="N", help="Turns of each case, for either plugin.", callback=arguments.turns
    ),
]


def need(
    turns: Turns = 20,
    rtt: arguments.RoundTrip = 150.0,
) -> None:
    """Print as Markdown what a caller waits in each situation, unpatched and patched.

    In ms, the median, with the installed plugin. Takes about a minute and a half. Exit code 1: a
    turn failed.
    """
    try:
        failures = _measure(turns, rtt / 1e3)
    except HelperFailedError as error:
        raise typer.Exit(complain(NAME, str(error), FAILED)) from None
    if failures:
        raise typer.Exit(complain(NAME, f"a turn failed: {', '.join(failures)}", FAILED))


def _measure(turns: int, round_trip: float) -> list[str]:
    """Prints each row when it is measured; returns what turns failed with."""
    failures: set[str] = set()
    with crew_at_work() as crew:
        if crew.plugin.refusal is not None:
            raise HelperFailedError(crew.plugin.refusal)
        typer.echo(_head())
        for case in (case for name in SITUATIONS for case in CASES if case.name == name):
            result = measure_case(crew, case, turns, round_trip)
            typer.echo(_row(result))
            failures.update(result.failures)
    return sorted(failures)


def _head() -> str:
    return f"| {plugin()} | {UNPATCHED} | {PATCHED} | case |\n|---|---|---|---|"


def _row(result: CaseResult) -> str:
    assert result.patched is not None
    cells = [_wait(result.unpatched), _wait(result.patched)]
    return f"| {SITUATIONS[result.case.name]} | {' | '.join(cells)} | `{result.case.name}` |"


def _wait(figures: Figures) -> str:
    """The median in ms, or that it is longer than any caller waits."""
    if not figures.times:
        return "-"
    median = statistics.median(figures.times)
    return f"over {LONGEST_WAIT * 1e3:,.0f}" if median >= LONGEST_WAIT else f"{median * 1e3:,.0f}"
