"""What each figure should be, and by how much it is not."""

from __future__ import annotations

from dataclasses import dataclass

from xai_pool_patch.demo.report import percentile
from xai_pool_patch.testing import Behaviour

from .runs import FLEET, Bench, CaseResult, CostResult, FleetResult

SHARES = {"p50": 0.5, "p95": 0.95, "max": 1.0}
GOALS = {"p50": 1.02, "p95": 1.05}
"""What a time to first audio may be of the floor, when every connection can be ready."""


@dataclass(frozen=True)
class Verdict:
    """Whether a case, a cost or the fleet meets its goal."""

    name: str
    met: bool | None
    """None if there is no goal."""
    why: str
    """Percentages are what a time to first audio is above the floor."""


def floor_of(bench: Bench) -> float:
    """Seconds to first audio when the connection is simply there: a round trip and generation."""
    return bench.round_trip + Behaviour().generation


def verdicts(bench: Bench) -> list[Verdict]:
    """One for each thing that was measured, in the same order."""
    return [
        *(_of_case(bench, result) for result in bench.cases),
        *(_of_fleet(result) for result in bench.fleets),
        *(_of_cost(result) for result in bench.costs),
    ]


def missed_goals(bench: Bench, result: CaseResult) -> list[str] | None:
    """Which percentiles of the patched plugin exceed their goal; None if there is no goal."""
    if result.patched is None or not result.case.has_goal(bench.round_trip):
        return None
    ratios = _ratios(bench, result.patched.times)
    return [name for name, goal in GOALS.items() if not ratios or ratios[name] > goal]


def _ratios(bench: Bench, times: list[float]) -> dict[str, float]:
    """Percentiles, times the floor; empty if there are no times."""
    if not times:
        return {}
    return {name: percentile(times, SHARES[name]) / floor_of(bench) for name in GOALS}


def _of_case(bench: Bench, result: CaseResult) -> Verdict:
    name = result.case.name
    missed = missed_goals(bench, result)
    if result.patched is None or missed is None:
        return Verdict(name, None, "")
    ratios = _ratios(bench, result.patched.times)
    if not ratios:
        return Verdict(name, False, "no turn was spoken to its end")
    over = [
        f"{share} {100 * (ratio - 1):+.1f} % (goal {100 * (GOALS[share] - 1):.0f} %)"
        for share, ratio in ratios.items()
    ]
    return Verdict(name, not missed, ", ".join(over))


def _of_fleet(result: FleetResult) -> Verdict:
    if result.patched is None:
        return Verdict(FLEET, None, "")
    silent, goal = result.patched.silent, result.unpatched.silent
    why = f"{silent} replies silent (goal: {goal}, as unpatched)"
    return Verdict(FLEET, silent <= goal, why)


def _of_cost(result: CostResult) -> Verdict:
    if result.measured is None:
        return Verdict(result.cost.name, None, "")
    ratio, goal = result.measured.ratio, result.cost.goal
    return Verdict(result.cost.name, ratio < goal, f"{ratio:.2f} x (goal: under {goal:g})")
