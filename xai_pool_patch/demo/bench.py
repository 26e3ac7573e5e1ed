"""The bench: what the plugin as it is and the patched plugin do, measured side by side.

`install()` changes a whole process, so each of the two has one, and both run the same case at the
same time: whatever else the machine does hits both. What costs CPU is measured by turns instead,
lest they hit each other, and the server of that is a third process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import json
import logging
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..plugin.releases import DISTRIBUTION
from ..telemetry.log import describe
from . import arguments

if TYPE_CHECKING:
    from .bench_cases import Case, Figures, Plugin

FAILED = 1
"""Exit code."""


# The processes


@dataclass(frozen=True)
class _Failure:
    """Takes the place of a result."""

    reason: str


class Helper:
    """A process of its own, which runs one function after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        self._process = context.Process(target=_help, args=(its_end,), daemon=True)
        with _ctrl_c_ignored():
            self._process.start()
        its_end.close()

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._pipe.send((function, args, kwargs))

    def result(self) -> Any:
        """What the function that was begun returned; ends the command if it failed."""
        try:
            result = self._pipe.recv()
        except EOFError:
            result = _Failure("a process of the bench has died")
        if isinstance(result, _Failure):
            _fail(result.reason)
        return result

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.begin(function, *args, **kwargs)
        return self.result()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _help(pipe: Pipe) -> None:
    """What a helper does until the pipe is closed."""
    logging.disable()  # what goes wrong is part of the result
    with contextlib.suppress(EOFError):
        while True:
            function, args, kwargs = pipe.recv()
            # A full collection of all that has been imported by now takes 0.1 s, and would hit
            # one subject or the other by chance.
            gc.collect()
            gc.freeze()
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                result = _Failure(f"{_name(function)} failed: {describe(error)}")
            pipe.send(result)


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return function.__name__


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A process that starts meanwhile ignores it for good: it is for us to end that one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
def _crew() -> Iterator[Crew]:
    from .bench_cases import inspect_plugin

    with contextlib.ExitStack() as stack:
        helpers = [Helper(), Helper(), Helper()]
        for helper in helpers:
            stack.callback(helper.stop)
        unpatched, patched, server = helpers
        for helper in (unpatched, patched):  # both, lest one begins the first case late
            helper.begin(inspect_plugin)
        unpatched.result()
        yield Crew(unpatched, patched, server, patched.result())


# What is measured


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


def _measure_case(crew: Crew, case: Case, turns: int, round_trip: float) -> CaseResult:
    from .bench_cases import run_case

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
    from . import bench_costs

    address = crew.server.run(bench_costs.open_servers, 1)
    times = crew.patched.run(bench_costs.acquire_and_release, address)
    return Measured(
        statistics.median(times) * 1e6,
        {"lowest_us": min(times) * 1e6, "p95_us": statistics.quantiles(times, n=20)[-1] * 1e6},
    )


def _message(crew: Crew) -> Measured:
    from . import bench_costs

    address = crew.server.run(
        bench_costs.open_servers, 1, messages_per_second=bench_costs.MESSAGES_PER_SECOND
    )
    costs = crew.patched.run(bench_costs.receive, address)
    # What else the machine does can only add to either.
    bare, pooled = min(costs.bare) * 1e6, min(costs.pooled) * 1e6
    return Measured(pooled - bare, {"bare_us": bare, "pooled_us": pooled})


def _streams(crew: Crew) -> Measured:
    from . import bench_costs

    streams = bench_costs.STREAMS
    address = crew.server.run(bench_costs.open_servers, streams // bench_costs.STREAMS_PER_SERVER)
    speak = functools.partial(bench_costs.speak_at_once, address, streams=streams)
    unpatched, patched = [], []
    for _ in range(bench_costs.PAIRS):
        unpatched.append(crew.unpatched.run(speak, patched=False))
        patched.append(crew.patched.run(speak, patched=True))
    pairs = zip(unpatched, patched, strict=True)
    return Measured(
        statistics.median(ours.again / its.again for its, ours in pairs),
        {
            "unpatched_ms": _median_ms([costs.again for costs in unpatched]),
            "patched_ms": _median_ms([costs.again for costs in patched]),
            "unpatched_handshakes_ms": _median_ms([costs.handshakes for costs in unpatched]),
            "patched_handshakes_ms": _median_ms([costs.handshakes for costs in patched]),
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


# The command


def bench_command(
    turns: Annotated[
        int,
        typer.Option(
            metavar="N", help="Turns of each case, for either plugin.", callback=arguments.turns
        ),
    ] = 40,
    rtt: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Round trip to the stand-in, in ms.",
            callback=arguments.milliseconds,
        ),
    ] = 150.0,
    only: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="Measure this one; may be given repeatedly."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Measure the plugin as it is and patched, side by side, and what the pool itself costs.

    The plugin is real; the server is a stand-in. Exit code 1: a turn failed.
    """
    version = _plugin_version()
    from rich.console import Console

    from . import bench_report
    from .bench_cases import CASES

    names = _chosen([each.name for each in (*CASES, *COSTS)], only or [])
    console = Console(quiet=as_json, highlight=False)
    with _crew() as crew:
        bench = Bench(version, crew.plugin, turns, rtt / 1e3, [], [])
        bench_report.announce(console, bench)
        for case in (case for case in CASES if case.name in names):
            bench.cases.append(_measure_case(crew, case, turns, bench.round_trip))
            bench_report.tell_case(console, bench, bench.cases[-1])
        for cost in (cost for cost in COSTS if cost.name in names):
            bench.costs.append(CostResult(cost, cost.measure(crew) if crew.can_patch else None))
            bench_report.tell_cost(console, bench.costs[-1])
    if as_json:
        print(json.dumps(bench_report.as_json(bench), indent=2))
    else:
        bench_report.show(console, bench)
    if bench.has_failures:
        raise typer.Exit(FAILED)


def _chosen(known: list[str], only: list[str]) -> set[str]:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"there is no {unknown[0]!r}, only {', '.join(known)}", param_hint="--case"
        )
    return set(only or known)


def _plugin_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        _fail(f"{DISTRIBUTION} is not installed")


def _fail(reason: str) -> NoReturn:
    print(f"xai-pool-patch: {reason}", file=sys.stderr)
    raise typer.Exit(FAILED)
