"""What the bench shows: a line per case as it ends, then tables. Or all of it as JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xai_pool_patch.demo.report import BAD, GOOD, PATCHED, UNPATCHED, percentile
from xai_pool_patch.plugin.releases import DISTRIBUTION
from xai_pool_patch.testing import Behaviour

from .cases import Case, Figures
from .fleet import FleetFigures
from .goals import SHARES, floor_of, missed_goals, verdicts
from .runs import FLEET, Bench, CaseResult, CostResult, FleetResult

COUNTS: dict[str, Callable[[Figures], int]] = {
    "turns": lambda figures: len(figures.times),
    "failed": lambda figures: len(figures.failures),
    "made": lambda figures: figures.connections_made,
    "peak": lambda figures: figures.peak_open,
}

UNSUPPORTED = "unsupported"


def label_of(bench: Bench) -> str:
    """What the unpatched plugin is called."""
    return "native pool" if bench.plugin.has_native_pool else "as it is"


# While it runs


def announce(console: Console, bench: Bench) -> None:
    """Prints what will be measured against what."""
    console.print(
        f"{DISTRIBUTION} {bench.plugin_version}, {label_of(bench)} and patched,"
        f" {bench.turns} turns a case. Round trip {_ms(bench.round_trip)} ms,"
        f" generation {_ms(Behaviour().generation)} ms: the floor of the time to first audio"
        f" is {_ms(floor_of(bench))} ms."
    )
    if bench.plugin.refusal is not None:
        console.print(f"It cannot be patched: {bench.plugin.refusal}", style=BAD)


def tell_case(console: Console, bench: Bench, result: CaseResult) -> None:
    """Prints the medians of a case that has just ended."""
    subjects = f"{label_of(bench)} {_brief(result.unpatched)}, patched {_brief(result.patched)}"
    console.print(f"{result.case.name:<18}{subjects}", soft_wrap=True)


def _brief(figures: Figures | None) -> str:
    if figures is None:
        return UNSUPPORTED
    median = f"{_ms(percentile(figures.times, 0.5))} ms" if figures.times else "-"
    return f"{median} ({len(figures.failures)} failed)" if figures.failures else median


def tell_fleet(console: Console, bench: Bench, result: FleetResult) -> None:
    """Prints how many replies of a fleet that has just ended were silent."""
    rows = _fleet_rows(bench, result).items()
    silent = ", ".join(f"{name} {row.silent} silent" for name, row in rows)
    console.print(f"{FLEET:<18}{silent}", soft_wrap=True)


def tell_cost(console: Console, result: CostResult) -> None:
    """Prints a cost that has just been measured."""
    console.print(f"{result.cost.name:<18}{_value(result)}", soft_wrap=True)


# In the end


def show(console: Console, bench: Bench) -> None:
    """Prints all figures."""
    if bench.cases:
        console.print(_case_table(bench))
        console.print(_legend(bench))
    for reason in sorted({reason for result in bench.cases for reason in result.failures}):
        console.print(Text(f"A turn failed: {reason}", style=BAD))
    for result in bench.fleets:
        show_fleet(console, _fleet_rows(bench, result))
    if bench.costs:
        console.print(_cost_table(bench))
    console.print(_summary(bench))


def _case_table(bench: Bench) -> Table:
    table = Table(box=box.SIMPLE, padding=0)
    for name in ("case", "plugin"):
        table.add_column(name, no_wrap=True)
    for name in (*(cell for share in SHARES for cell in (share, "x")), *COUNTS):
        table.add_column(name, justify="right", no_wrap=True)
    for result in bench.cases:
        table.add_row(result.case.name, label_of(bench), *_cells(bench, result.unpatched))
        if result.patched is None:
            table.add_row(UNSUPPORTED, PATCHED, *["-" for _ in table.columns[2:]])
        else:
            style = BAD if missed_goals(bench, result) else None
            table.add_row("", PATCHED, *_cells(bench, result.patched), style=style)
    return table


def _cells(bench: Bench, figures: Figures) -> list[str]:
    cells = []
    for share in SHARES.values():
        if figures.times:
            seconds = percentile(figures.times, share)
            cells += [_ms(seconds), f"{seconds / floor_of(bench):.2f}"]
        else:
            cells += ["-", "-"]
    return cells + [str(count(figures)) for count in COUNTS.values()]


def _legend(bench: Bench) -> str:
    lines = [f"  {result.case.name}: {result.case.shows}" for result in bench.cases]
    return "\n".join(
        [
            "p50, p95, max: ms to first audio, of the turns spoken to their end.",
            "x: times the floor. made: connections, in all. peak: most open in one conversation.",
            _floor_line(bench),
            *lines,
        ]
    )


def _floor_line(bench: Bench) -> str:
    times = _floor_times(bench)
    return (
        f"Floor: {_ms(floor_of(bench))} ms; measured all the while, without the plugin:"
        f" {statistics.median(times) * 1e3:.1f} ms (median of {len(times)})."
    )


def _cost_table(bench: Bench) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0))
    for name in ("cost", "what it is", "measured"):
        table.add_column(name)
    for result in bench.costs:
        measured = Text(_value(result))
        if result.measured is not None:
            measured.stylize(GOOD if result.meets_goal else BAD)
            measured.append(_details(result.measured.details), style="dim")
        table.add_row(result.cost.name, result.cost.shows, measured)
    return table


def _fleet_rows(bench: Bench, result: FleetResult) -> dict[str, FleetFigures]:
    rows = {label_of(bench): result.unpatched}
    return rows if result.patched is None else {**rows, PATCHED: result.patched}


def show_fleet(console: Console, rows: dict[str, FleetFigures]) -> None:
    """Prints the figures of one fleet, a row for each variant of the plugin."""
    figures = fleet_as_json(rows)
    table = Table(box=box.SIMPLE, padding=0)
    table.add_column("plugin")
    for name in next(iter(figures.values())):
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in figures.items():
        table.add_row(name, *("-" if value is None else str(value) for value in row.values()))
    console.print(table)
    console.print("p50, p95: ms from the first token of the LLM to the first audio.")


def _summary(bench: Bench) -> Text:
    """A line for each case, cost and fleet: whether it met its goal, or by how much it missed."""
    text = Text("Goals; percentages are above the floor.\n")
    for verdict in verdicts(bench):
        word, style = _WORDS[verdict.met]
        text.append(f"{verdict.name:<18}").append(f"{word:<9}", style=style)
        text.append(f"{verdict.why}\n")
    return text


_WORDS = {True: ("met", GOOD), False: ("missed", BAD), None: ("no goal", "dim")}


def _value(result: CostResult) -> str:
    if result.measured is None:
        return UNSUPPORTED
    return f"{result.measured.ratio:.2f} x (goal: under {result.cost.goal:g})"


def _details(details: dict[str, float]) -> str:
    return "".join(f"\n{name} {value:.1f}" for name, value in details.items())


# The same for machines


def as_json(bench: Bench) -> dict[str, Any]:
    """All figures as one document. Units are in the names, what there is not is null."""
    return {
        "plugin_version": bench.plugin_version,
        "python_version": platform.python_version(),
        "unpatched_is": label_of(bench),
        "refusal": bench.plugin.refusal,
        "turns": bench.turns,
        "round_trip_ms": _rounded_ms(bench.round_trip),
        "generation_ms": _rounded_ms(Behaviour().generation),
        "floor_ms": {
            "nominal": _rounded_ms(floor_of(bench)),
            "measured": _percentiles(_floor_times(bench)),
        },
        "cases": [_case_as_json(bench, result) for result in bench.cases],
        "fleets": [fleet_as_json(_fleet_rows(bench, result)) for result in bench.fleets],
        "costs": [_cost_as_json(result) for result in bench.costs],
        "goals_met": {verdict.name: verdict.met for verdict in verdicts(bench)},
    }


def fleet_as_json(rows: dict[str, FleetFigures]) -> dict[str, dict[str, Any]]:
    """The figures of one fleet by the name of the variant."""
    return {name: _fleet_figures_as_json(row) for name, row in rows.items()}


def _fleet_figures_as_json(figures: FleetFigures) -> dict[str, Any]:
    times = _percentiles(figures.times)
    return {
        "replies": len(figures.replies),
        "silent": figures.silent,
        "in_error": figures.in_error,
        "refused": figures.refused,
        "peak_sessions": figures.peak_sessions,
        "p50_ms": times["p50"],
        "p95_ms": times["p95"],
    }


def _case_as_json(bench: Bench, result: CaseResult) -> dict[str, Any]:
    return {
        **_head_as_json(result.case),
        "missed_goals": missed_goals(bench, result),
        UNPATCHED: _figures_as_json(bench, result.unpatched),
        PATCHED: None if result.patched is None else _figures_as_json(bench, result.patched),
    }


def _head_as_json(case: Case) -> dict[str, Any]:
    return {"name": case.name, "shows": case.shows, "gap_ms": _rounded_ms(case.gap)}


def _figures_as_json(bench: Bench, figures: Figures) -> dict[str, Any]:
    ratios = [seconds / floor_of(bench) for seconds in figures.times]
    return {
        "time_to_first_audio_ms": _percentiles(figures.times),
        "times_the_floor": {
            name: round(percentile(ratios, share), 4) if ratios else None
            for name, share in SHARES.items()
        },
        "turns_measured": len(figures.times),
        "turns_failed": len(figures.failures),
        "failures": figures.failures,
        "connections_made": figures.connections_made,
        "peak_open": figures.peak_open,
    }


def _cost_as_json(result: CostResult) -> dict[str, Any]:
    cost, measured = result.cost, result.measured
    return {
        "name": cost.name,
        "shows": cost.shows,
        "goal_below": cost.goal,
        "ratio": None if measured is None else round(measured.ratio, 3),
        "details": None
        if measured is None
        else {name: round(value, 3) for name, value in measured.details.items()},
    }


# Numbers


def _floor_times(bench: Bench) -> list[float]:
    figures = [f for result in bench.cases for f in (result.unpatched, result.patched) if f]
    return [seconds for f in figures for seconds in f.floor_times]


def _percentiles(times: list[float]) -> dict[str, float | None]:
    return {
        name: _rounded_ms(percentile(times, share)) if times else None
        for name, share in SHARES.items()
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def _rounded_ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
