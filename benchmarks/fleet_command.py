"""The command `python -m benchmarks fleet`: its options, its table, its JSON."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from xai_pool_patch.__main__ import FAILED, complain
from xai_pool_patch.demo import arguments
from xai_pool_patch.demo.report import PATCHED, UNPATCHED
from xai_pool_patch.errors import InvalidOptionError
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.testing import Refusal

from .calls import CallPlan
from .fleet import Fleet, FleetFigures, Folder, run_fleets
from .helpers import HelperFailedError
from .report import fleet_as_json, show_fleet

REFUSALS = {
    "429": Refusal.TOO_MANY_REQUESTS,
    "503": Refusal.UNAVAILABLE,
    "frame": Refusal.ERROR_FRAME,
}


@dataclass(frozen=True)
class Variant:
    """A subject of the comparison."""

    name: str
    options: PoolOptions | None
    """Of the patch; None for the plugin as it is."""


def _count(of: str) -> Any:
    return typer.Option(metavar="N", help=of, callback=arguments.turns)


def _milliseconds(of: str) -> Any:
    return typer.Option(metavar="MS", help=f"{of}, in ms.", callback=arguments.milliseconds)


Keywords = Annotated[
    list[str] | None,
    typer.Option(
        "--options",
        metavar="KEYWORDS",
        help="PoolOptions, such as 'min_size=0, max_age=60'; a row for each that is given.",
    ),
]
How = Annotated[str, typer.Option(metavar="HOW", help=f"How it refuses: {', '.join(REFUSALS)}.")]
Share = Annotated[
    float, typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Part of the replies, from 0 to 1.")
]
Pauses = Annotated[
    tuple[float, float],
    typer.Option(metavar="S S", help="Shortest and longest silence before a reply, in s."),
]
Seconds = Annotated[
    float,
    typer.Option(metavar="S", min=0.0, help="Seconds that a session without a Close counts."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def fleet(
    processes: Annotated[int, _count("Processes.")] = 12,
    calls: Annotated[int, _count("Calls in each process.")] = 1,
    sessions: Annotated[
        int, typer.Option(metavar="N", min=0, help="Sessions that the server allows.")
    ] = 6,
    replies: Annotated[int, _count("Replies in each call.")] = 5,
    llm: Annotated[float, _milliseconds("Delay of the LLM's first token")] = 500.0,
    rtt: Annotated[float, _milliseconds("Round trip to the fake server")] = 150.0,
    interrupted: Share = 0.0,
    pauses: Pauses = CallPlan.pauses,
    refusal: How = "429",
    permit_ttl: Seconds = 0.0,
    folder: Annotated[
        Folder, typer.Option(help="The runtime directory of the processes.")
    ] = Folder.SHARED,
    keywords: Keywords = None,
    skip_unpatched: Annotated[
        bool, typer.Option("--skip-unpatched", help="Measure the patched alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let many calls share the sessions of one team, with the plugin as it is and patched.

    The calls are real AgentSessions, in processes of their own. A reply of which the caller heard
    nothing is silent.
    """
    if refusal not in REFUSALS:
        raise typer.BadParameter(f"must be one of {', '.join(REFUSALS)}", param_hint="--refusal")
    variants = [] if skip_unpatched else [Variant(UNPATCHED, None)]
    variants += [_variant(each) for each in keywords or [""]]
    measured = Fleet(
        processes=processes,
        calls=calls,
        sessions=sessions,
        plan=CallPlan(
            replies=replies, llm_delay=llm / 1e3, interrupted_share=interrupted, pauses=pauses
        ),
        folder=folder,
        refusal=REFUSALS[refusal],
        permit_ttl=permit_ttl,
        round_trip=rtt / 1e3,
    )
    try:
        rows = {variant.name: run_fleets(measured, variant.options)[0] for variant in variants}
    except HelperFailedError as error:
        raise typer.Exit(complain("benchmarks", str(error), FAILED)) from None
    _show(rows, as_json=as_json)


def _variant(keywords: str) -> Variant:
    """The patched plugin with options that are given as Python's keyword arguments."""
    try:
        call = ast.parse(f"options({keywords})", mode="eval").body
        assert isinstance(call, ast.Call)
        values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        options = PoolOptions(**values)
    except (SyntaxError, ValueError, TypeError, InvalidOptionError) as error:
        raise typer.BadParameter(f"{keywords!r}: {error}", param_hint="--options") from None
    return Variant(f"{PATCHED} {keywords}".strip(), options)


def _show(rows: dict[str, FleetFigures], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(fleet_as_json(rows), indent=2))
    else:
        show_fleet(Console(highlight=False), rows)
