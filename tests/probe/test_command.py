"""`xai-pool-patch probe`, as a user runs it, and how it ends early."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.demo.test_demo import TIMEOUT, command, environment, refused
from tests.probe.kit import HASTY, SHORT, Listener, serving_both
from xai_pool_patch.probe import run
from xai_pool_patch.probe.service import DialError, RefusedError, UnreachableError
from xai_pool_patch.testing import Behaviour, End, Refusal

pytestmark = pytest.mark.real_time

KEY = Behaviour.api_key
CHEAP = ("handshake", "bad voice")
"""Questions that take no time."""

PROGRAM = """
import functools
from xai_pool_patch import testing
from xai_pool_patch.__main__ import main
from xai_pool_patch.probe import run

class Watched(testing.FakeServer):
    async def __aexit__(self, *exc_info):
        await self.wait_for(lambda server: server.open_count == 0)
        ends = {{connection.ended.name for connection in self.connections}}
        if {watch}:
            print(*ends, flush=True)
        await super().__aexit__(*exc_info)

testing.FakeServer = Watched
testing.Behaviour = functools.partial(testing.Behaviour)
behaviour = testing.Behaviour
testing.Behaviour = lambda **usual: behaviour(**{{**usual, **{behaviour}}})
run.QUICK = [each for each in run.QUICK if each.name in {questions}]
run.FAKE_ROUND_TRIP = 0.02
main()
"""


def program(
    questions: tuple[str, ...] = CHEAP, *, watch: bool = False, **behaviour: Any
) -> list[str]:
    """The command, with a few questions, for a fake server of that behaviour."""
    code = PROGRAM.format(questions=questions, behaviour=behaviour, watch=watch)
    return [sys.executable, "-c", code]


def probe(
    *args: str, asked: list[str] | None = None, answer: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(asked or program()), "probe", *args],
        env=environment(COLUMNS="100", NO_COLOR="1"),
        input=answer,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
    )


def test_shows_a_table(tmp_path: Path) -> None:
    """With progress before it and the options after it; --report writes the same."""
    file = tmp_path / "report.md"
    done = probe("--fake", "--yes", "--report", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("2 questions", "characters", " 1 of 2  handshake", "HTTP 400", "PoolOptions()"):
        assert part in done.stdout
    assert "\x1b" not in done.stdout
    written = file.read_text()
    for part in ("a fake server", "handshake: **as supposed**", "HTTP 400", "PoolOptions()"):
        assert part in written
    assert KEY not in done.stdout + written


def test_prints_json() -> None:
    """One document and nothing else."""
    done = probe("--fake", "--yes", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert [each["name"] for each in document["questions"]] == list(CHEAP)
    assert [each["verdict"] for each in document["questions"]] == ["as supposed"] * 2
    assert document["questions"][0]["measured"]["handshake_ms"] >= 60
    assert (document["otherwise"], document["options"]) == ([], {})


@pytest.mark.parametrize("option", ["--json", "--yes"])
def test_says_what_is_not_as_supposed(option: str) -> None:
    """By exit code 3, and a line that names it."""
    done = probe("--fake", "--yes", option, asked=program(voices=None))
    assert done.returncode == 3
    assert done.stderr == "xai-pool-patch: not as supposed: bad voice\n"
    assert "accepted" in done.stdout


def test_asks_before_it_begins() -> None:
    """And says what it will cost first."""
    done = probe("--fake", answer="y\n")
    assert done.returncode == 0
    assert "up to 0 characters to be spoken" in done.stderr
    assert "Begin?" in done.stderr
    assert "as supposed" in done.stdout


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_does_nothing_without_consent(answer: str) -> None:
    """Nor without an answer."""
    done = probe("--fake", answer=answer)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Begin? [y/N]" in done.stderr
    assert done.stderr.endswith("xai-pool-patch: not begun; --yes begins without asking\n")


@pytest.mark.parametrize("name", ["rich", "trustme"])
def test_finds_what_is_missing_before_it_asks(name: str, tmp_path: Path) -> None:
    """One line, and no question."""
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    line = refused(command("probe", "--fake", PYTHONPATH=str(tmp_path)), 2)
    assert line == f'xai-pool-patch: {name} is missing: pip install "xai_pool_patch[demo]"'


def test_a_report_that_cannot_be_written_at_the_end_is_one_line() -> None:
    """Behind the table: the disk was full."""
    done = probe("--fake", "--yes", "--report", "/dev/full")
    assert done.returncode == 1
    assert "PoolOptions()" in done.stdout
    assert done.stderr == "xai-pool-patch: cannot write /dev/full: No space left on device\n"


@pytest.mark.parametrize("key", ["", "  "])
def test_needs_a_key(key: str) -> None:
    """Said before anything else happens."""
    line = refused(command("probe", "--yes", XAI_API_KEY=key), 2)
    assert line == "xai-pool-patch: probe needs an API key of xAI in XAI_API_KEY, which is not set"


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--idle", "0", "from 1 to 2000"),
        ("--idle", "nan", "from 1 to 2000"),
        ("--idle", "9999", "from 1 to 2000"),
        ("--sessions", "0", "from 1 to 200"),
        ("--sessions", "1000", "from 1 to 200"),
        ("--report", "/nowhere/at/all.md", "a file that can be written"),
    ],
)
def test_refuses_nonsense(option: str, value: str, right: str) -> None:
    """One line that names the option and what would be right."""
    line = refused(command("probe", option, value), 2)
    assert option in line
    assert right in line


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"api_key": "another"}, "refuses the API key: HTTP 401"),
        ({"refuse": 429}, "no session is free"),
        ({"refuse": 503}, "refuses a connection: HTTP 503"),
        (
            {"max_sessions": 0, "refusal": Refusal.ERROR_FRAME},
            "error: concurrent session limit reached",
        ),
    ],
)
async def test_a_service_that_cannot_be_asked(behaviour: dict[str, Any], reason: str) -> None:
    """Why, before the first question."""
    listener = Listener()
    async with serving_both(HASTY, **behaviour) as (service, _):
        service._api_key = KEY
        with pytest.raises(DialError) as trouble:
            await run.ask(run.QUICK, lambda: service, listener)
    assert reason in run.explain(trouble.value)
    assert listener.findings == []


def test_one_line_says_why() -> None:
    """And the exit code is 1."""
    done = probe("--fake", "--yes", "--json", asked=program(refuse=401))
    line = refused(done, 1)
    assert line == "xai-pool-patch: api.x.ai refuses the API key: HTTP 401"


async def test_no_network() -> None:
    """A dial that fails says how, in one line and without a key."""
    async with serving_both(HASTY) as (service, server):
        server.network.refuse = True
        with pytest.raises(UnreachableError) as trouble:
            await run.ask(run.QUICK, lambda: service, Listener())
    line = run.explain(trouble.value)
    assert line.startswith("api.x.ai cannot be reached: Client")
    assert KEY not in line


async def test_a_service_that_does_not_answer() -> None:
    """Is given up after a while."""
    async with serving_both(HASTY, handshake_delay=30.0) as (service, _):
        service.timing = type(HASTY)(dial=0.1, close=0.1)
        with pytest.raises(UnreachableError, match=r"no answer within 0\.1 s"):
            await service.dial()


async def test_a_key_that_is_none() -> None:
    """A line feed would end the header that it belongs into."""
    async with serving_both(SHORT) as (service, _):
        with pytest.raises(UnreachableError, match="the key cannot be sent"):
            await service.dial(api_key="two\nlines")


async def test_a_service_that_goes_away() -> None:
    """What has been found by then stands."""
    listener = Listener()
    questions = [each for each in run.QUICK if each.name in ("second utterance", "handshake")]
    async with serving_both(SHORT) as (service, server):
        server.behaviour.refuse_next = [101, 101, 503]
        with pytest.raises(RefusedError):
            await run.ask(questions, lambda: service, listener)
    assert [each.question.name for each in listener.findings] == ["handshake"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly_when_interrupted(number: signal.Signals) -> None:
    """In the middle of a question: one line, and every connection gets its Close frame."""
    process = subprocess.Popen(
        [*program(("handshake", "gap in a text"), watch=True), "probe", "--fake", "--yes"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # Whoever runs the tests in the background may have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while " 1 of 2" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    shown, complaints = process.communicate(timeout=TIMEOUT)
    assert complaints == "xai-pool-patch: interrupted; every connection is closed\n"
    assert (process.returncode, shown.split()) == (130, ["CLIENT_CLOSE"])


async def test_closes_a_connection_that_is_still_being_dialled() -> None:
    """The service may have given it a session, which only a Close frame frees."""
    async with serving_both(SHORT, handshake_delay=0.2) as (service, server):
        dialling = asyncio.ensure_future(service.dial())
        await server.wait_for(lambda server: server.handshakes)
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
    assert [each.ended for each in server.connections] == [End.CLIENT_CLOSE]


async def test_does_not_wait_for_a_dial_that_stalls() -> None:
    """The service has not answered its handshake by then, so there is nothing to close."""
    async with serving_both(HASTY, handshake_delay=5.0) as (service, server):
        dialling = asyncio.ensure_future(service.dial())
        await server.wait_for(lambda server: server.handshakes)
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
    assert [each.status for each in server.handshakes] == [None]
    assert server.connections == []


def test_is_named_where_it_is_needed() -> None:
    """By the command that knows the plugin only, and by its own help."""
    assert "xai-pool-patch probe" in command("check").stdout.splitlines()[-1]
    assert "--sessions" in command("probe", "--help").stdout
