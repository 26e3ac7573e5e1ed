"""One run of the benchmark: its processes, what it measures, and what came out of it.

`install()` changes a whole process. The plugin as it is and the patched plugin therefore have a
process each, and both run the same case at the same time: whatever else the machine does hits both.
Costs in CPU time are measured in alternation instead, because the two would slow each other down.
The server of those measurements runs in a third process.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import costs, servers
from .cases import Case, Figures, Plugin, inspect_plugin, run_case
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
    begin = {"turns": turns, "round_trip": round_trip}
    crew.unpatched.begin(run_case, case.name, patched=False, **begin)
    if crew.can_patch:
        crew.patched.begin(run_case, case.name, patched=True, **begin)
    unpatched = crew.unpatched.result()
    return CaseResult(case, unpatched, crew.patched.result() if crew.can_patch else None)


@dataclass(frozen=True)
class Measured:
    """The figure that counts, and those it was made of by name, the unit at the end of it."""

    value: float
    details: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Something that the pool takes in return."""

    name: str
    shows: str
    unit: str
    goal: float
    """What the value should be below."""
    measure: Callable[[Crew], Measured]


@dataclass(frozen=True)
class CostResult:
    cost: Cost
    measured: Measured | None
    """None if the plugin cannot be patched."""


def _hit(crew: Crew) -> Measured:
    address = crew.server.run(servers.open_servers, 1)
    times = crew.patched.run(costs.acquire_and_release, address)
    return Measured(
        statistics.median(times) * 1e6,
        {"lowest_us": min(times) * 1e6, "p95_us": statistics.quantiles(times, n=20)[-1] * 1e6},
    )


def _message(crew: Crew) -> Measured:
    address = crew.server.run(
        servers.open_servers, 1, messages_per_second=costs.MESSAGES_PER_SECOND
    )
    received = crew.patched.run(costs.receive, address)
    # What else the machine does can only add to either.
    bare, pooled = min(received.bare) * 1e6, min(received.pooled) * 1e6
    return Measured(pooled - bare, {"bare_us": bare, "pooled_us": pooled})


def _streams(crew: Crew) -> Measured:
    streams = costs.STREAMS
    address = crew.server.run(servers.open_servers, streams // costs.STREAMS_PER_SERVER)
    speak = functools.partial(costs.speak_at_once, address, streams=streams)
    unpatched, patched = [], []
    for _ in range(costs.PAIRS):
        unpatched.append(crew.unpatched.run(speak, patched=False))
        patched.append(crew.patched.run(speak, patched=True))
    pairs = zip(unpatched, patched, strict=True)
    return Measured(
        statistics.median(ours.again / its.again for its, ours in pairs),
        {
            "unpatched_ms": _median_ms([run.again for run in unpatched]),
            "patched_ms": _median_ms([run.again for run in patched]),
            "unpatched_handshakes_ms": _median_ms([run.handshakes for run in unpatched]),
            "patched_handshakes_ms": _median_ms([run.handshakes for run in patched]),
        },
    )


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3


COSTS = (
    Cost("hit", "acquire and release of a connection that is there", "µs", 50.0, _hit),
    Cost("message", "extra CPU per received message", "µs", 20.0, _message),
    Cost(
        "streams",
        "CPU of 200 streams at once, times that of the unpatched plugin",
        "x",
        1.1,
        _streams,
    ),
)


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

    @property
    def has_failures(self) -> bool:
        return any(result.failures for result in self.cases)
