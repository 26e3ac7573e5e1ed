"""One run of the benchmark: its processes, what it measures, and what came out of it.

`install()` changes a whole process. The plugin as it is and the patched plugin therefore have a
process each, and both run the same case at the same time: whatever else the machine does hits both.
Costs in CPU time are measured in alternation instead, because the two would slow each other down.
The servers run in a third process, so that no subject pays for what they do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from xai_pool_patch.options import PoolOptions

from . import costs, servers
from .calls import CallPlan
from .cases import Case, Figures, Plugin, inspect_plugin, run_case
from .fleet import Fleet, FleetFigures, run_fleets
from .helpers import Helper


@dataclass(frozen=True)
class Crew:
    """The processes of one run."""

    unpatched: Helper
    patched: Helper
    server: Helper
    plugin: Plugin

    @property
    def can_patch(self) -> bool:
        return self.plugin.refusal is None


@contextlib.contextmanager
def crew_at_work() -> Iterator[Crew]:
    with contextlib.ExitStack() as stack:
        helpers = [Helper(), Helper(), Helper()]
        for helper in helpers:
            stack.callback(helper.stop)
        unpatched, patched, server = helpers
        for helper in (unpatched, patched):  # both: otherwise one begins the first case late
            helper.begin(inspect_plugin)
        unpatched.result()
        yield Crew(unpatched, patched, server, patched.result())


@dataclass(frozen=True)
class CaseResult:
    """One case, with both subjects."""

    case: Case
    unpatched: Figures
    patched: Figures | None
    """None if the plugin cannot be patched."""

    @property
    def failures(self) -> list[str]:
        return self.unpatched.failures + (self.patched.failures if self.patched else [])


def measure_case(crew: Crew, case: Case, turns: int, round_trip: float) -> CaseResult:
    unpatched_result = _begin_case(crew, crew.unpatched, case, turns, round_trip, patched=False)
    if not crew.can_patch:
        return CaseResult(case, unpatched_result(), None)
    patched_result = _begin_case(crew, crew.patched, case, turns, round_trip, patched=True)
    return CaseResult(case, unpatched_result(), patched_result())


def _begin_case(
    crew: Crew, subject: Helper, case: Case, turns: int, round_trip: float, *, patched: bool
) -> Callable[[], Figures]:
    """Begins it with one subject; returns what waits for its figures."""
    conversations = len(case.split(turns))
    addresses = crew.server.run(
        servers.open_distant_servers, conversations + 1, round_trip, case.behaviour
    )
    subject.begin(run_case, case.name, patched=patched, turns=turns, addresses=addresses)

    def result() -> Figures:
        figures: Figures = subject.result()
        made, peak_open = crew.server.run(servers.connections_at, addresses[:-1])
        return replace(figures, connections_made=made, peak_open=peak_open)

    return result


@dataclass(frozen=True)
class Measured:
    """The figure that counts, and those it was made of by name, the unit at the end of it."""

    ratio: float
    details: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Something that the pool takes in return."""

    name: str
    shows: str
    goal: float
    """What the ratio should be below."""
    measure: Callable[[Crew], Measured]


@dataclass(frozen=True)
class CostResult:
    cost: Cost
    measured: Measured | None
    """None if the plugin cannot be patched."""

    @property
    def meets_goal(self) -> bool | None:
        """None if there is nothing to say."""
        return None if self.measured is None else self.measured.ratio < self.cost.goal


def _against_bare(load: costs.Load, crew: Crew) -> Measured:
    address = crew.server.run(
        servers.open_servers, load.servers, messages_per_second=load.messages_per_second
    )
    paired = crew.patched.run(costs.compare, address, load)
    # What else the machine does can only add to either.
    bare, pooled = min(paired.bare), min(paired.pooled)
    return Measured(pooled / bare, {"bare_us": bare * 1e6, "pooled_us": pooled * 1e6})


def _against_unpatched(crew: Crew) -> Measured:
    address = crew.server.run(servers.open_servers, 1, messages_per_second=NO_WAITING)
    unpatched, patched = [], []
    for _ in range(costs.ROUNDS):
        unpatched.append(crew.unpatched.run(costs.speak_turns, address, patched=False))
        patched.append(crew.patched.run(costs.speak_turns, address, patched=True))
    least, ours = min(unpatched), min(patched)
    return Measured(ours / least, {"unpatched_ms": least * 1e3, "patched_ms": ours * 1e3})


NO_WAITING = 1e6
"""Messages per second."""

# Only the last goal was set from outside: the others show when the pool becomes dearer than it was.
COSTS = (
    Cost(
        "hit",
        "CPU of the shortest utterance, times that of a bare WebSocket",
        3.6,
        functools.partial(_against_bare, costs.HIT),
    ),
    Cost(
        "message",
        "CPU of a received message, times that of a bare WebSocket",
        1.3,
        functools.partial(_against_bare, costs.MESSAGE),
    ),
    Cost(
        "streams",
        "CPU of 200 utterances at once, times that of bare WebSockets",
        1.9,
        functools.partial(_against_bare, costs.STREAMS),
    ),
    Cost(
        "turn",
        "CPU of a turn, handshakes included, times that of the unpatched plugin",
        1.08,
        _against_unpatched,
    ),
)


FLEET = "fleet"

SMALL_FLEET = Fleet(processes=3, calls=4, sessions=6, plan=CallPlan(replies=2))


@dataclass(frozen=True)
class FleetResult:
    """Calls that share the sessions of one team, with both subjects."""

    unpatched: FleetFigures
    patched: FleetFigures | None
    """None if the plugin cannot be patched."""


def measure_fleet(crew: Crew, round_trip: float) -> FleetResult:
    fleet = replace(SMALL_FLEET, round_trip=round_trip)
    if not crew.can_patch:
        return FleetResult(run_fleets(fleet, None)[0], None)
    unpatched, patched = run_fleets(fleet, None, PoolOptions())
    return FleetResult(unpatched, patched)


@dataclass(frozen=True)
class Bench:
    """All that was measured in one run."""

    plugin_version: str
    plugin: Plugin
    turns: int
    round_trip: float
    """Seconds."""
    cases: list[CaseResult]
    costs: list[CostResult]
    fleets: list[FleetResult] = field(default_factory=list)
    """One, or none."""

    @property
    def has_failures(self) -> bool:
        return any(result.failures for result in self.cases)
