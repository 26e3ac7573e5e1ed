"""The command `python -m benchmarks sessions`: its options and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from xai_pool_patch.demo import arguments

from .calls import Habits, Outcome
from .picture import Bar, draw
from .scenario import AT_SPEECH, SUBJECTS, Figures, Scenario, Subject, calls_that_fit, simulate

CALLS = (12, 50, 100, 200)

COLUMNS: dict[str, Callable[[Figures], str]] = {
    "replies": lambda figures: str(len(figures.replies)),
    **{
        outcome.value: lambda figures, outcome=outcome: _percent(figures.share(outcome))  # type: ignore[misc]
        for outcome in Outcome
    },
    "p50 s": lambda figures: f"{figures.wait(0.5):.2f}",
    "p95 s": lambda figures: f"{figures.wait(0.95):.2f}",
    "sessions, mean": lambda figures: f"{figures.mean_sessions:.1f}",
}

Calls = Annotated[
    list[int] | None,
    typer.Option("--calls", metavar="N", min=1, help="Calls at a time; may be given repeatedly."),
]
Minutes = Annotated[float, typer.Option(metavar="M", min=0.1, help="Simulated minutes.")]
Deploy = Annotated[bool, typer.Option("--deploy", help="All calls start in the same second.")]
Killed = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Calls that end without a Close frame, from 0 to 1.",
    ),
]
Speech = Annotated[
    bool, typer.Option("--speech", help="Also dial when the user begins to speak: no option yet.")
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Look for the calls that fit with 0.1 % refused instead.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help=f"One of: {', '.join(subject.name for subject in SUBJECTS)}; may be given repeatedly.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option("--svg", metavar="FILE", help="Also draw it.", callback=arguments.writable),
]


def sessions(
    limit: Annotated[
        int, typer.Option("--sessions", metavar="N", min=1, help="Sessions of the team.")
    ] = 50,
    calls: Calls = None,
    minutes: Minutes = 5.0,
    deploy: Deploy = False,
    killed: Killed = 0.0,
    speech: Speech = False,
    fit: Fit = False,
    only: Only = None,
    svg: Picture = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Simulate many calls, a process each, that share the sessions of one team.

    In virtual time, with the package's real pools. benchmarks/README.md describes the calls.
    """
    subjects = _chosen(only or [], speech=speech)
    scenario = Scenario(
        sessions=limit,
        calls=limit,
        duration=60.0 * minutes,
        ramp=1.0 if deploy else min(120.0, 15.0 * minutes),
        habits=Habits(killed_share=killed),
    )
    console = Console(quiet=as_json, highlight=False)
    if fit and svg is not None:
        raise typer.BadParameter("cannot be drawn with --fit", param_hint="--svg")
    if fit:
        results: Any = _find_fit(console, scenario, subjects)
    else:
        results = _compare(console, scenario, calls or CALLS, subjects, svg)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


def _chosen(only: Iterable[str], *, speech: bool) -> list[Subject]:
    known = {subject.name: subject for subject in SUBJECTS}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"there is no {unknown[0]!r}, only {', '.join(known)}", param_hint="--only"
        )
    subjects = [known[name] for name in only] or list(SUBJECTS)
    return [*subjects, AT_SPEECH] if speech else subjects


def _compare(
    console: Console,
    scenario: Scenario,
    counts: Iterable[int],
    subjects: list[Subject],
    svg: Path | None,
) -> list[dict[str, Any]]:
    """Prints a table for each number of calls as soon as it is simulated."""
    results, groups = [], []
    for case in (replace(scenario, calls=count) for count in counts):
        rows = {subject.name: simulate(case, subject) for subject in subjects}
        console.print(_table(case, rows))
        results.append(_as_json(case, rows))
        groups.append((f"{case.calls} calls", _bars(rows)))
    if svg is not None:
        svg.write_text(draw(scenario.sessions, groups))
    return results


def _table(case: Scenario, rows: dict[str, Figures]) -> Table:
    title = f"{case.calls} calls on {case.sessions} sessions"
    table = Table(box=box.SIMPLE, padding=0, title=title)
    table.add_column("plugin")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(cell(figures) for cell in COLUMNS.values()))
    return table


def _find_fit(console: Console, scenario: Scenario, subjects: list[Subject]) -> dict[str, int]:
    found = {subject.name: calls_that_fit(scenario, subject) for subject in subjects}
    title = f"Calls that fit into {scenario.sessions} sessions"
    table = Table(box=box.SIMPLE, padding=0, title=title)
    table.add_column("plugin")
    table.add_column("calls", justify="right")
    for name, count in found.items():
        table.add_row(name, str(count))
    console.print(table)
    return found


def _bars(rows: dict[str, Figures]) -> list[Bar]:
    return [
        Bar(name, [figures.share(outcome) for outcome in Outcome]) for name, figures in rows.items()
    ]


def _as_json(case: Scenario, rows: dict[str, Figures]) -> dict[str, Any]:
    return {
        "sessions": case.sessions,
        "calls": case.calls,
        "plugins": {name: _figures(figures) for name, figures in rows.items()},
    }


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "replies": len(figures.replies),
        **{outcome.name.lower(): figures.share(outcome) for outcome in Outcome},
        "p50_s": round(figures.wait(0.5), 3),
        "p95_s": round(figures.wait(0.95), 3),
        "refused_handshakes": figures.refused,
        "peak_sessions": figures.peak,
        "mean_sessions": round(figures.mean_sessions, 2),
    }


def _percent(share: float) -> str:
    return f"{100.0 * share:.2f}" if 0.0 < share < 0.1 else f"{100.0 * share:.1f}"
