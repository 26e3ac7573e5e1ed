"""The simulation of many calls that share the sessions of one team."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.simulation.calls import AT_ONCE, Habits, Lognormal, Outcome
from benchmarks.simulation.scenario import (
    SUBJECTS,
    Figures,
    Scenario,
    Subject,
    calls_that_fit,
    simulate,
)
from benchmarks.simulation.server import PERMIT_TTL, ROUND_TRIP, RefusedError, Server
from tests.benchmarks.test_bench import bench
from tests.demo.test_demo import refused

TWELVE = Scenario(
    sessions=6,
    calls=12,
    duration=64.0,
    ramp=1.0,
    habits=Habits(
        length=Lognormal(1e9, 0.0),
        silence=Lognormal(0.9, 0.2),
        speech=Lognormal(7.9, 0.2),
        transcription=0.0,
        llm=Lognormal(0.5, 0.0),
        audio=Lognormal(2.3, 0.1),
        interrupted_share=0.0,
    ),
)
"""What `python -m benchmarks fleet --pauses 6 12` holds. All calls start at once."""

NAMES = [subject.name for subject in SUBJECTS]
REFUSED = (Outcome.RETRIED, Outcome.FAILED)


@functools.cache
def figures_of(name: str, sessions: int, calls: int) -> Figures:
    [subject] = [subject for subject in SUBJECTS if subject.name == name]
    return simulate(Scenario(sessions=sessions, calls=calls, duration=300.0, ramp=30.0), subject)


@pytest.mark.parametrize("name", NAMES)
def test_below_the_limit_nobody_is_refused(name: str) -> None:
    """Twelve calls on forty sessions: each is heard, mostly at the floor."""
    figures = figures_of(name, 40, 12)
    assert len(figures.replies) > 150
    assert (figures.share(*REFUSED), figures.refused) == (0.0, 0)
    assert figures.peak <= 40
    at_floor = figures.share(Outcome.FLOOR)
    if name == "unpatched":
        assert (at_floor, figures.wait(0.5)) == (0.0, pytest.approx(0.45))
    else:
        assert at_floor > (0.6 if name == "reply" else 0.95)
        assert figures.wait(0.5) < AT_ONCE


@pytest.mark.parametrize("name", ["reply", "auto, ten", "auto, all"])
def test_twice_as_many_calls_as_sessions(name: str) -> None:
    """S7: unpatched no reply fails, so none fails when dialled at the sign of a reply."""
    assert figures_of("unpatched", 20, 40).share(Outcome.FAILED) == 0.0
    assert figures_of(name, 20, 40).share(Outcome.FAILED) < 0.002
    assert figures_of(name, 20, 40).share(Outcome.FLOOR) > 0.5


def test_always_warm_takes_what_others_need() -> None:
    """Idle connections hold all sessions, and the calls that have none stay silent."""
    assert figures_of("always", 20, 40).share(Outcome.FAILED) > 0.2


@pytest.mark.parametrize("subject", SUBJECTS, ids=NAMES)
def test_agrees_with_a_fleet_of_real_processes(subject: Subject) -> None:
    """Measured: 26 of 60 replies silent when always warm, and none otherwise."""
    failed = simulate(TWELVE, subject).share(Outcome.FAILED)
    if subject.name == "always":
        assert 0.25 < failed < 0.45
    elif subject.name != "auto, one":
        assert failed < 0.02


def test_without_sessions_every_reply_fails() -> None:
    """Each after the three retries of the framework."""
    figures = figures_of("unpatched", 0, 2)
    assert figures.share(Outcome.FAILED) == 1.0
    assert figures.replies[0].wait == pytest.approx(4 * 0.45 + 0.1 + 2.0 + 2.0)
    assert figures.wait(0.5) < AT_ONCE


def test_calls_that_fit() -> None:
    """More than the sessions, since a call holds one only while its agent speaks."""
    scenario = Scenario(sessions=10, calls=0, duration=300.0, ramp=30.0)
    assert 10 <= calls_that_fit(scenario, SUBJECTS[0]) <= 40


async def test_a_session_lasts_until_its_close_frame_arrives(no_tasks_left: None) -> None:
    """Without one the server counts it for ten minutes more."""
    server = Server(limit=2)
    closed, killed = await server.connect(), await server.connect()
    with pytest.raises(RefusedError):
        await server.connect()
    await closed.close()
    killed.kill()
    await killed.close()
    await asyncio.sleep(ROUND_TRIP)
    assert (server.sessions, server.refused, server.peak) == (1, 1, 2)
    await asyncio.sleep(PERMIT_TTL)
    assert server.sessions == 0


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    """A table for each number of calls, and a bar for each plugin."""
    picture = tmp_path / "sessions.svg"
    options = ["--sessions", "4", "--minutes", "1", "--calls", "2", "--calls", "4", "--deploy"]
    done = bench("sessions", *options, "--killed", "0.5", "--svg", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 calls on 4 sessions" in done.stdout
    assert "4 calls on 4 sessions" in done.stdout
    texts = [each.text for each in ElementTree.parse(picture).iter() if each.tag.endswith("text")]
    for name in NAMES:
        assert done.stdout.count(f" {name} ") == 2
        assert texts.count(name) == 2


def test_the_command_as_json() -> None:
    """The shares of each plugin that was asked for add up to one."""
    options = ["--sessions", "4", "--minutes", "1", "--calls", "4", "--only", "reply", "--speech"]
    done = bench("sessions", "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    [case] = json.loads(done.stdout)
    assert list(case["plugins"]) == ["reply", "at speech"]
    for row in case["plugins"].values():
        assert sum(row[outcome.name.lower()] for outcome in Outcome) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        (["--only", "nonsense"], ["nonsense", "auto, all"]),
        (["--fit", "--svg", "picture.svg"], ["--svg", "--fit"]),
    ],
)
def test_the_command_refuses_nonsense(options: list[str], right: list[str]) -> None:
    """One line that names the option and what would be right."""
    line = refused(bench("sessions", *options), 2)
    assert all(part in line for part in right)
