"""The command line of the benchmark: `python -m benchmarks`, in the root of the repository."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Annotated

import typer
from rich.console import Console

from xai_pool_patch.__main__ import FAILED, complain, run
from xai_pool_patch.demo import arguments
from xai_pool_patch.plugin.releases import DISTRIBUTION

from . import report
from .cases import CASES
from .fleet_command import fleet
from .helpers import HelperFailedError
from .need import Turns, need
from .peers.command import peers
from .profile import profile
from .runs import COSTS, FLEET, Bench, CostResult, crew_at_work, measure_case, measure_fleet
from .simulation.command import sessions

NAME = "benchmarks"

app = typer.Typer(pretty_exceptions_enable=False)


app.command()(fleet)
app.command()(need)
app.command()(peers)
app.command()(profile)
app.command()(sessions)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    turns: Turns = 40,
    rtt: arguments.RoundTrip = 150.0,
    only: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="Measure this one; may be given repeatedly."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Measure the plugin as it is and patched, side by side, and what the pool itself costs.

    The plugin is real, and the server is the fake one. Exit code 1: a turn failed.
    """
    if context.invoked_subcommand is not None:
        return
    known = [*(case.name for case in CASES), FLEET, *(cost.name for cost in COSTS)]
    names = _chosen(known, only or [])
    console = Console(quiet=as_json, highlight=False)
    try:
        measured = _measure(console, names, turns, rtt / 1e3)
    except HelperFailedError as error:
        raise typer.Exit(complain(NAME, str(error), FAILED)) from None
    if as_json:
        print(json.dumps(report.as_json(measured), indent=2))
    else:
        report.show(console, measured)
    if measured.has_failures:
        raise typer.Exit(FAILED)


def _measure(console: Console, names: set[str], turns: int, round_trip: float) -> Bench:
    """Measures what is named, and prints a line for each when it is done."""
    with crew_at_work() as crew:
        measured = Bench(
            importlib.metadata.version(DISTRIBUTION), crew.plugin, turns, round_trip, [], []
        )
        report.announce(console, measured)
        for case in (case for case in CASES if case.name in names):
            measured.cases.append(measure_case(crew, case, turns, round_trip))
            report.tell_case(console, measured, measured.cases[-1])
        if FLEET in names:
            measured.fleets.append(measure_fleet(crew, round_trip))
            report.tell_fleet(console, measured, measured.fleets[-1])
        for cost in (cost for cost in COSTS if cost.name in names):
            measured.costs.append(CostResult(cost, cost.measure(crew) if crew.can_patch else None))
            report.tell_cost(console, measured.costs[-1])
    return measured


def _chosen(known: list[str], only: list[str]) -> set[str]:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"there is no {unknown[0]!r}, only {', '.join(known)}", param_hint="--case"
        )
    return set(only or known)


if __name__ == "__main__":
    run(app, NAME)
