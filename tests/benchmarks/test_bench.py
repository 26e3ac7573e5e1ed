"""The benchmark, through `python -m benchmarks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, goals, need, runs
from tests.demo.test_demo import TIMEOUT, command, environment, refused
from tests.kit import HAS_NATIVE_POOL, VERSION

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks"]

CASES = [
    "steady",
    "interrupted-0.8s",
    "interrupted-0.1s",
    "cleared-0.1s",
    "voices",
    "ten-cold",
    "cut-early",
    "after-interrupt",
    "closed",
    "half-open",
    "first-words",
    "first-words-late",
]
UNPATCHED = "native pool" if HAS_NATIVE_POOL else "as it is"
ALWAYS_DIALS = (
    {"voices", "ten-cold", "cut-early", "after-interrupt", "closed", "first-words-late"}
    if HAS_NATIVE_POOL
    else {*CASES}
)
"""The cases in which the unpatched plugin makes a handshake for every turn."""
QUICK = ["--turns", "2", "--rtt", "20"]
PERCENTILES = {"p50", "p95", "max"}

SMALL = """
import dataclasses
from benchmarks import costs
costs.ROUNDS = costs.SPOKEN_TURNS = 2
costs.HIT = dataclasses.replace(costs.HIT, turns=2)
costs.STREAMS = dataclasses.replace(costs.STREAMS, connections=20)
"""
SHORT_NEED = """
from benchmarks import need
need.SITUATIONS = {"steady": need.SITUATIONS["steady"]}
"""
REFUSING_VOICES = """
import functools
from xai_pool_patch.testing import server
server.Behaviour = functools.partial(server.Behaviour, voices={None})
"""


def bench(*args: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return command(*args, program=COMMAND, **changes)


def chosen(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--case", name)]


def everywhere(directory: Path, code: str) -> str:
    """A PYTHONPATH with which every process of the benchmark runs that code first."""
    (directory / "sitecustomize.py").write_text(code)
    return os.pathsep.join([str(directory), str(ROOT)])


@pytest.fixture(scope="module")
def report() -> Any:
    """What --json prints of two turns of every case but the one that is silent for long."""
    done = bench("--json", *QUICK, *chosen(*CASES))
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_json_has_the_chosen_cases_in_order(report: Any) -> None:
    """And nothing of the others; both subjects, with the same keys."""
    assert [case["name"] for case in report["cases"]] == CASES
    assert report["costs"] == []
    for case in report["cases"]:
        for subject in ("unpatched", "patched"):
            assert set(case[subject]["time_to_first_audio_ms"]) == PERCENTILES
            assert set(case[subject]["times_the_floor"]) == PERCENTILES
            assert (case[subject]["turns_failed"], case[subject]["failures"]) == (0, [])


def test_no_turn_is_faster_than_the_floor(report: Any) -> None:
    """Nor is the floor as measured. A handshake of three round trips is on top, unpatched, unless
    the native pool has a connection."""
    assert report["floor_ms"]["nominal"] == 330.0
    assert report["floor_ms"]["measured"]["p50"] >= 330.0
    for case in report["cases"]:
        handshake = 60.0 if case["name"] in ALWAYS_DIALS else 0.0
        assert case["unpatched"]["time_to_first_audio_ms"]["p50"] >= 330.0 + handshake
        assert case["patched"]["time_to_first_audio_ms"]["p50"] >= 330.0
        assert case["patched"]["times_the_floor"]["p50"] >= 1.0


def test_json_counts_turns_and_connections(report: Any) -> None:
    """Turns cut off are not timed; each voice has a connection; cold ones are open at once."""
    cases = {case["name"]: case for case in report["cases"]}
    counts = {
        name: [
            case[subject][key]
            for subject in ("unpatched", "patched")
            for key in ("turns_measured", "connections_made", "peak_open")
        ]
        for name, case in cases.items()
    }
    steady = 1 if HAS_NATIVE_POOL else 2
    assert report["unpatched_is"] == UNPATCHED
    assert counts["steady"] == [2, steady, 1, 2, 1, 1]
    assert counts["interrupted-0.8s"][0::3] == [1, 1]
    assert counts["cleared-0.1s"] == [1, steady, 1, 1, 1, 1]
    assert counts["voices"][4:] == [2, 2]
    assert counts["ten-cold"] == [2, 2, 2, 2, 2, 2]
    assert counts["cut-early"][0::3] == [2, 2]
    assert counts["after-interrupt"][0::3] == [2, 2]
    assert counts["closed"][0::3] == [2, 2]
    assert counts["half-open"][0::3] == [2, 2]
    assert counts["first-words"] == [2, 2, 1, 2, 2, 1]
    assert counts["first-words-late"] == [2, 2, 1, 2, 2, 1]


def test_goals_are_for_gaps_that_a_handshake_fits_into(report: Any) -> None:
    """Of the others it is not asked."""
    without = {case["name"] for case in report["cases"] if case["missed_goals"] is None}
    assert without == {
        *("interrupted-0.1s", "cleared-0.1s", "ten-cold", "half-open", "first-words-late")
    }


def test_shows_a_line_per_case_and_a_table() -> None:
    """Piped, it fits into 80 columns, without colour or cursor movement."""
    done = bench(*QUICK, *chosen("steady", "voices"), COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for part in ("p95", "Floor: 330"):
        assert part in done.stdout
    for case in ("steady", "voices"):
        assert f"{case:<18}{UNPATCHED} " in done.stdout


def test_a_caller_hangs_up_on_a_half_open_connection(report: Any) -> None:
    """Ten seconds are counted, not more; only a native pool hands out such a connection."""
    (half_open,) = (case for case in report["cases"] if case["name"] == "half-open")
    waits = {name: half_open[name]["time_to_first_audio_ms"] for name in ("unpatched", "patched")}
    assert (waits["unpatched"]["max"] == 10_000.0) is HAS_NATIVE_POOL
    assert waits["patched"]["max"] < 10_000.0


def needed(*options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return bench("need", *options, **changes)


def test_prints_who_needs_it_as_markdown() -> None:
    """A row for each situation with the case that it is measured by, which `--case` knows too."""
    done = needed("--turns", "1", "--rtt", "20")
    assert (done.returncode, done.stderr) == (0, "")
    head, line, *rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()]
    assert head == [f"livekit-plugins-xai {VERSION}", "unpatched", "patched", "case"]
    assert line == ["---|---|---|---"]
    waits = {case.strip("`"): (unpatched, patched) for _, unpatched, patched, case in rows}
    assert list(waits) == list(need.SITUATIONS)
    assert set(waits) <= {case.name for case in cases.CASES}
    assert (waits["half-open"][0] == "over 10,000") is HAS_NATIVE_POOL
    numbers = [float(cell.replace(",", "")) for pair in waits.values() for cell in pair[-1:]]
    assert min(numbers) >= 330.0


def test_who_needs_it_cannot_be_said_without_the_patch() -> None:
    """A column would be missing."""
    line = refused(needed(XAI_POOL_PATCH="off"), 1)
    assert "XAI_POOL_PATCH=off" in line


def test_a_failed_turn_is_no_cell_of_the_table(tmp_path: Path) -> None:
    """It is said, and the exit code says so too."""
    path = everywhere(tmp_path, REFUSING_VOICES + SHORT_NEED)
    done = needed("--turns", "1", "--rtt", "20", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "| steady conversation | - | - | `steady` |"
    assert done.stderr.startswith("benchmarks need: a turn failed: API")


def verdict(times: list[float], case: str = "steady") -> goals.Verdict:
    """Of a patched plugin whose turns took these times, in seconds."""
    chosen_case = next(each for each in cases.CASES if each.name == case)
    result = runs.CaseResult(chosen_case, cases.Figures(), cases.Figures(times=times))
    plugin = cases.Plugin(has_native_pool=False, refusal=None)
    [only] = goals.verdicts(runs.Bench("1.6.0", plugin, 40, 0.15, [result], []))
    return only


def test_a_verdict_says_by_how_much_a_goal_is_missed() -> None:
    """In percent of the floor, which is 0.46 s here; without a goal it says so."""
    assert verdict([0.46] * 3).met
    slow = verdict([0.46, 0.506, 0.552])
    assert not slow.met
    assert slow.why == "p50 +10.0 % (goal 2 %), p95 +20.0 % (goal 5 %)"
    assert verdict([0.46], case="ten-cold").met is None


def test_measures_the_costs(tmp_path: Path) -> None:
    """Each is a ratio of two figures that are there to be looked at, and has a goal."""
    path = everywhere(tmp_path, SMALL)
    names = ["hit", "message", "streams", "turn"]
    done = bench("--json", *chosen(*names), PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    measured = json.loads(done.stdout)
    assert [cost["name"] for cost in measured["costs"]] == names
    for cost in measured["costs"]:
        first, second = cost["details"].values()
        assert cost["ratio"] == pytest.approx(second / first, rel=0.01)
        assert measured["goals_met"][cost["name"]] == (cost["ratio"] < cost["goal_below"])


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--turns", "0", "1 or more"),
        ("--turns", "-3", "1 or more"),
        ("--rtt", "-5", "from 0 to 1000"),
        ("--rtt", "nan", "from 0 to 1000"),
        ("--rtt", "inf", "from 0 to 1000"),
        ("--case", "nonsense", "steady, interrupted-0.8s"),
    ],
)
def test_refuses_nonsense(option: str, value: str, right: str) -> None:
    """One line that names the option and what would be right."""
    line = refused(bench(option, value), 2)
    assert option in line
    assert right in line


def test_measures_a_plugin_that_cannot_be_patched(tmp_path: Path) -> None:
    """The rest still runs, and what is wrong is said."""
    info = tmp_path / "livekit_plugins_xai-9.9.9.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: livekit-plugins-xai\nVersion: 9.9.9\n"
    (info / "METADATA").write_text(metadata)
    options = [*QUICK, *chosen("steady", "hit")]
    done = bench(*options, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "found livekit-plugins-xai 9.9.9" in done.stdout
    assert "patched unsupported" in done.stdout
    assert "hit               unsupported" in done.stdout


def test_does_not_take_the_unpatched_plugin_for_the_patched() -> None:
    """With the patch switched off by the environment there is only one to measure."""
    options = [*QUICK, *chosen("steady", "hit")]
    report = json.loads(bench("--json", *options, XAI_POOL_PATCH="off").stdout)
    (case,), (cost,) = report["cases"], report["costs"]
    assert "XAI_POOL_PATCH=off" in report["refusal"]
    assert (case["unpatched"]["turns_measured"], case["patched"]) == (2, None)
    assert (cost["ratio"], cost["details"]) == (None, None)
    assert report["goals_met"] == {"steady": None, "hit": None}


def test_counts_turns_that_fail(tmp_path: Path) -> None:
    """They have no time, they are shown, and the exit code says so."""
    path = everywhere(tmp_path, REFUSING_VOICES)
    done = bench(*QUICK, *chosen("steady"), PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{UNPATCHED} - (2 failed), patched - (2 failed)" in done.stdout
    assert "A turn failed: API" in done.stdout
    assert "steady missed no turn was spoken to its end" in " ".join(done.stdout.split())


def test_a_fleet() -> None:
    """Two processes with a call each, unpatched and patched: all is heard, nobody is refused."""
    keywords = "min_size=0, max_age=60"
    done = bench(
        *["fleet", "--json", "--processes", "2", "--replies", "1", "--rtt", "20", "--llm", "50"],
        *["--folder", "apart", "--options", keywords],
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)
    assert list(rows) == ["unpatched", f"patched {keywords}"]
    for row in rows.values():
        counts = [row[name] for name in ("replies", "silent", "in_error", "refused")]
        assert counts == [2, 0, 0, 0]
        assert row["peak_sessions"] in (1, 2)
        assert row["p50_ms"] >= 330.0


def test_a_fleet_without_sessions_is_silent() -> None:
    """Nothing is heard of any reply, the errors are counted, and so are the refusals."""
    done = bench(
        *["fleet", "--json", "--processes", "1", "--replies", "1", "--rtt", "0", "--llm", "0"],
        *["--sessions", "0", "--refusal", "frame", "--skip-unpatched"],
    )
    assert (done.returncode, done.stderr) == (0, "")
    row = json.loads(done.stdout)["patched"]
    assert (row["replies"], row["silent"], row["in_error"]) == (1, 1, 1)
    assert row["refused"] > 0
    assert (row["peak_sessions"], row["p50_ms"]) == (0, None)


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--refusal", "nonsense", "429, 503, frame"),
        ("--options", "nonsense=1", "nonsense"),
        ("--options", "no keywords", "no keywords"),
    ],
)
def test_a_fleet_refuses_nonsense(option: str, value: str, right: str) -> None:
    """One line that names the option and what would be right."""
    line = refused(bench("fleet", option, value), 2)
    assert option in line
    assert right in line


def test_ends_cleanly_when_interrupted() -> None:
    """Ctrl-C reaches all its processes at once."""
    process = subprocess.Popen(
        [*COMMAND, *QUICK, *chosen("long-silence")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # Whoever runs the tests in the background may have had SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert "2 turns" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, complaints) == (130, "")


def test_it_is_no_command_of_the_package() -> None:
    """`xai-pool-patch` has what users run: the demo and the check."""
    shown = command("--help").stdout
    assert "bench" not in shown
    assert all(name in shown for name in ("demo", "check"))
