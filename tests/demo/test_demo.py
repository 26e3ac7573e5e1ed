"""The demo, through the real command; and the loudspeaker it listens with."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from livekit import rtc
from rich.console import Console

from tests.clock import in_virtual_time
from tests.kit import HAS_NATIVE_POOL, VERSION
from xai_pool_patch.demo.conversation import (
    SENTENCES,
    Comparison,
    Loudspeaker,
    Plan,
    Run,
    Setting,
    Situation,
    Turn,
)
from xai_pool_patch.demo.report import Progress, show
from xai_pool_patch.plugin import releases

PLUGIN = f"livekit-plugins-xai {VERSION}"
WITHOUT_BARS = str.maketrans("", "", "█░")
COMMAND = [sys.executable, "-m", "xai_pool_patch"]
TIMEOUT = 180.0
SAMPLE_RATE = 24_000

REFUSING = """
import functools
from xai_pool_patch.__main__ import main
from xai_pool_patch.testing import server
server.Behaviour = functools.partial(server.Behaviour, refuse=401)
main()
"""

LIVE = """
from xai_pool_patch.__main__ import main
from xai_pool_patch.demo import conversation
conversation.xai_endpoint = lambda api_key: conversation.fake_endpoint(0.0)
main()
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "XAI_API_KEY"}
    return {**kept, **changes}


def command(
    *args: str, program: list[str] = COMMAND, **changes: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *args],
        env=environment(**changes),
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
    )


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line it left on stderr, after checking that there is nothing else."""
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def svg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("picture") / "demo.svg"


@pytest.fixture(scope="module")
def report(svg: Path) -> Any:
    """What --json prints of two turns, the first of them interrupted, while --svg draws them."""
    options = ["--turns", "2", "--interrupt", "0.5", "--rtt", "20", "--json", "--svg", str(svg)]
    done = command("demo", *options, COLUMNS="40", NO_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_json_has_the_turns_of_both_runs(report: Any) -> None:
    """Unpatched over new connections, patched over a warm one."""
    unpatched, patched = report["unpatched"], report["patched"]
    assert [turn["number"] for turn in unpatched["turns"]] == [1, 2]
    assert [turn["interrupted"] for turn in unpatched["turns"]] == [True, False]
    assert [turn["interrupted"] for turn in patched["turns"]] == [True, False]
    assert unpatched["turns"][1]["connection_reused"] is False
    assert patched["turns"][1]["connection_reused"] is True
    assert patched["turns"][1]["acquire_time_ms"] == 0.0
    assert (unpatched["turns_reused"], patched["turns_reused"]) == (0, 1)
    assert [turn["situation"] for turn in patched["turns"]] == ["steady", "after interruption"]


def test_json_counts_connections(report: Any) -> None:
    """Unpatched one a turn; patched one that was interrupted and its standby."""
    assert report["unpatched"]["connections_made"] == 2
    assert report["patched"]["connections_made"] <= 2


def test_no_turn_is_faster_than_the_floor(report: Any) -> None:
    """Unpatched turns cost the three round trips of the handshake as well, but for the first turn
    of a native pool, which is prewarmed. The second one follows an interruption."""
    floor, handshake = 330.0, 60.0
    assert report["floor_ms"] == floor
    prewarmed = floor if HAS_NATIVE_POOL else floor + handshake
    for name, least in (("unpatched", [prewarmed, floor + handshake]), ("patched", [floor] * 2)):
        for turn, milliseconds in zip(report[name]["turns"], least, strict=True):
            assert turn["time_to_first_audio_ms"] >= milliseconds


def test_every_line_is_coloured_and_equally_wide(report: Any, svg: Path) -> None:
    """Whatever the terminal is like."""
    lines: dict[str, str] = {}
    for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"):
        line = element.get("clip-path", "")
        lines[line] = lines.get(line, "") + (element.text or "").replace("\xa0", " ")
    shown = "\n".join(lines.values())
    assert PLUGIN in shown
    for part in ("after interruption", "turns reused", "most open", "floor, 330 ms", "█", "░"):
        assert part in shown
    times = [turn["time_to_first_audio_ms"] for turn in report["unpatched"]["turns"]]
    for time in times:  # rounded to a tenth already
        assert f"{time - 0.05:,.0f} ms" in shown or f"{time + 0.05:,.0f} ms" in shown
    assert 80 < max(len(line.rstrip()) for line in shown.splitlines()) <= 88
    assert len(set(re.findall(r"fill: (#\w+)", svg.read_text()))) > 3


@pytest.fixture(scope="module")
def plain() -> str:
    """What one turn of each situation prints into a narrow pipe."""
    options = ["--turns", "5", "--interrupt", "0.25", "--rtt", "20"]
    done = command("demo", *options, COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_a_terminal_it_prints_plain_lines(plain: str) -> None:
    """A line for each turn, no colour and no cursor movement; the installed plugin is named."""
    assert "\x1b" not in plain
    for part in ("floor, 330 ms", "turns reused", "connections made"):
        assert part in plain
    for run in ("unpatched", "patched"):
        assert f"{PLUGIN}, {run}\nturn  1 " in plain


def test_each_situation_is_shown_and_summed_up(plain: str) -> None:
    """Where the server has closed the connection, only a native pool has to try twice."""
    situations = ["steady", "steady*", "after interruption", "change of voice", "dead connection"]
    dead = f"dead connection{' !' if HAS_NATIVE_POOL else ''}"
    turns = re.findall(r"^turn +\d+ +[\d,]+ ms  (.+)$", plain, re.MULTILINE)
    assert turns == [*situations[:4], dead, *situations]
    for situation in {name.rstrip("*") for name in situations}:
        assert re.search(rf"^{situation} +[\d,]+ ms +[\d,]+ ms$", plain, re.MULTILINE)


def seconds_of_each(*, steady: float, dead: float) -> Run:
    """A conversation whose turns took so long."""
    times = [
        (Situation.STEADY, steady),
        (Situation.INTERRUPTED, 1.2),
        (Situation.NEW_VOICE, 1.2),
        (Situation.DEAD, dead),
    ]
    return Run([turn(number, *each) for number, each in enumerate(times, 1)], 9, 2)


def turn(number: int, situation: Situation, seconds: float) -> Turn:
    return Turn(
        number,
        situation,
        interrupted=number == 1,
        retried=situation is Situation.DEAD,
        time_to_first_audio=seconds,
        connection_reused=False,
        acquire_time=0.0,
    )


def run_of(seconds: float) -> Run:
    """One steady turn."""
    return Run([turn(1, Situation.STEADY, seconds)], 1, 1)


def shown(unpatched: Run, patched: Run, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, Comparison(unpatched, patched), Setting(Plan(turns=len(patched.turns)), 0.02))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_it_fits_the_terminal(width: int) -> None:
    """Even when LiveKit tried for ten seconds; only the sentences at the end wrap."""
    slow = seconds_of_each(steady=0.46, dead=10.5)
    narrow = shown(slow, slow, width).split("A steady turn")[0].splitlines()
    assert max(len(line.rstrip()) for line in narrow) <= width
    assert "…" not in "".join(narrow)
    wide = shown(slow, slow, 200).split("A steady turn")[0].splitlines()
    assert [line.translate(WITHOUT_BARS).split() for line in narrow] == [
        line.translate(WITHOUT_BARS).split() for line in wide
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_turn_as_it_ends_fits_on_one_line(width: int) -> None:
    """The longest there is, of as many turns as anybody waits for."""
    console = Console(file=io.StringIO(), width=width)
    longest = replace(turn(99, Situation.INTERRUPTED, 9.9), interrupted=True)
    Progress(console, Setting(Plan(turns=99), 0.02)).turn_ended(longest)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "turn 99  9,900 ms  after interruption*\n"


@pytest.mark.parametrize(
    ("patched", "said"),
    [(0.35, "0.1 s less"), (0.41, "as much"), (0.44, "as much"), (0.52, "0.1 s more")],
)
def test_it_says_how_the_silence_changed(patched: float, said: str) -> None:
    """Beside a native pool that loses nothing there is none to save."""
    assert f"\n{said} silence over 1 turn\n" in shown(run_of(0.42), run_of(patched))


@pytest.mark.parametrize(
    ("steady", "dead", "said"),
    [
        (0.46, 1.2, "A steady turn gains nothing: {} is as fast without the patch. Faster with"),
        (0.46, 0.46, "the patch. No gain: dead connection. Faster with the patch: after"),
        (0.92, 0.46, "No gain: dead connection. Faster with the patch: steady, after"),
        (0.92, 1.2, "Every turn is faster with the patch than with {} as it is."),
    ],
)
def test_it_says_in_words_which_turns_gain(steady: float, dead: float, said: str) -> None:
    """From what was measured, whatever the plugin is."""
    patched = replace(
        seconds_of_each(steady=0.46, dead=0.46),
        turns=[turn(number, each, 0.46) for number, each in enumerate(Situation, 1)],
    )
    report = shown(seconds_of_each(steady=steady, dead=dead), patched)
    assert said.format(PLUGIN) in " ".join(report.split())


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--turns", "0", "1 or more"),
        ("--turns", "-1", "1 or more"),
        ("--turns", "many", "integer"),
        ("--rtt", "-5", "from 0 to 1000"),
        ("--rtt", "nan", "from 0 to 1000"),
        ("--rtt", "inf", "from 0 to 1000"),
        ("--interrupt", "2", "from 0 (no turn) to 1 (all)"),
        ("--interrupt", "nan", "from 0 (no turn) to 1 (all)"),
        ("--svg", "/nowhere/at/all.svg", "a file that can be written"),
        ("--svg", "/", "a file that can be written"),
        ("--svg", "/etc/passwd/demo.svg", "a file that can be written"),
        ("--svg", f"/tmp/{'x' * 300}.svg", "(File name too long)"),
    ],
)
def test_a_wrong_option_gets_one_line(option: str, value: str, right: str) -> None:
    """It names the option and what would be right."""
    line = refused(command("demo", option, value), 2)
    assert option in line
    assert right in line


@pytest.mark.parametrize("key", ["", "  "])
def test_live_without_a_key_is_refused(key: str) -> None:
    """Before anything else happens."""
    line = refused(command("demo", "--live", XAI_API_KEY=key), 2)
    assert "--live" in line
    assert "XAI_API_KEY" in line


def test_live_names_the_probe() -> None:
    """Whoever has a key can find out what else the service does."""
    program = [sys.executable, "-c", LIVE]
    options = ["--live", "--yes", "--turns", "1"]
    done = command("demo", *options, program=program, XAI_API_KEY="fake-api-key")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 conversations of 1 turn" in done.stdout
    assert "xai-pool-patch probe asks xAI" in done.stdout.splitlines()[-1]


def test_live_asks_before_it_bills() -> None:
    """And says what it will cost. Nobody answers here, so it does not begin."""
    program = [sys.executable, "-c", LIVE]
    done = command("demo", "--live", program=program, XAI_API_KEY="fake-api-key")
    assert (done.returncode, done.stdout) == (1, "")
    announced, cost, asked = done.stderr.splitlines()
    assert announced == "2 conversations of 10 turns with api.x.ai."
    characters = 2 * sum(map(len, SENTENCES[:10]))
    assert cost.endswith(f"up to {characters:,} characters to be spoken and billed.")
    assert asked == "Begin? [y/N] xai-pool-patch: not begun; --yes begins without asking"


@pytest.mark.parametrize("name", ["rich", "trustme"])
def test_live_finds_what_is_missing_before_it_asks(tmp_path: Path, name: str) -> None:
    """One line, and no question."""
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    line = refused(command("demo", "--live", PYTHONPATH=str(tmp_path), XAI_API_KEY="fake"), 2)
    assert line == f'xai-pool-patch: {name} is missing: pip install "xai_pool_patch[demo]"'


def test_it_reads_and_writes_nothing_of_other_processes(tmp_path: Path) -> None:
    """A Redis that the environment names, and the user's folder."""
    names = {"XAI_POOL_PATCH_REDIS_URL": "nonsense://", "XDG_RUNTIME_DIR": str(tmp_path)}
    done = command("demo", "--turns", "1", "--rtt", "0", "--json", **names)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_at_the_end_is_one_line() -> None:
    """Behind the report: the disk was full."""
    options = ["--turns", "1", "--interrupt", "0", "--rtt", "0", "--svg", "/dev/full"]
    done = command("demo", *options)
    assert done.returncode == 1
    assert "turns reused" in done.stdout
    assert done.stderr == "xai-pool-patch: cannot write /dev/full: No space left on device\n"


def test_an_unsupported_plugin_is_refused(tmp_path: Path) -> None:
    """Before the first run, with the message of the error."""
    info = tmp_path / "livekit_plugins_xai-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: livekit-plugins-xai\n")
    with (info / "METADATA").open("a") as metadata:
        metadata.write("Version: 9.9.9\n")
    line = refused(command("demo", PYTHONPATH=str(tmp_path)), 1)
    assert "found livekit-plugins-xai 9.9.9" in line


@pytest.mark.parametrize("name", ["rich", "trustme"])
def test_a_missing_extra_is_named(tmp_path: Path, name: str) -> None:
    """A plain installation has the command, but not what the demo needs."""
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    line = refused(command("demo", PYTHONPATH=str(tmp_path)), 2)
    assert line == f'xai-pool-patch: {name} is missing: pip install "xai_pool_patch[demo]"'


def test_it_refuses_to_run_when_the_patch_is_switched_off() -> None:
    """Two unpatched runs would look like a patch without effect."""
    done = command("demo", "--turns", "1", XAI_POOL_PATCH="off")
    assert (done.returncode, done.stdout) == (1, "")
    assert "XAI_POOL_PATCH=off" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_failed_turn_ends_the_demo_with_its_reason(options: list[str]) -> None:
    """No report and no traceback."""
    program = [sys.executable, "-c", REFUSING]
    done = command("demo", "--turns", "2", "--rtt", "0", *options, program=program)
    assert done.returncode == 1
    assert "p95" not in done.stdout
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("xai-pool-patch: turn 1 failed:")
    assert "401" in last


def made(*arguments: str) -> str:
    """What `make demo` would run, were no environment there yet."""
    done = subprocess.run(
        ["make", "--dry-run", "demo", *arguments, f"PYTHON={sys.executable}"],
        cwd=Path(__file__).parents[2],
        env=environment(MAKEFLAGS="", PLUGIN=""),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_demo_shows_the_newest_plugin_unless_another_is_named() -> None:
    """Each in its own environment, of which the newest has pinned constraints too."""
    newest = releases.RELEASES[-1].versions[-1]
    assert f".venv{newest}/bin/xai-pool-patch demo\n" in made()
    assert "\n.venv/bin/xai-pool-patch demo\n" in made("PLUGIN=1.6.0")


def test_ctrl_c_ends_it_cleanly() -> None:
    """In the middle of a conversation."""
    process = subprocess.Popen(
        [*COMMAND, "demo", "--turns", "3", "--rtt", "0"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # Whoever runs the tests in the background may have had SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "turn  1 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, complaints) == (130, "")


def test_without_a_command_it_prints_its_help() -> None:
    """And --version prints the version."""
    assert "demo" in command().stdout
    assert command("--version").stdout.startswith("xai_pool_patch ")


def test_shell_completion_works() -> None:
    """As `xai-pool-patch --install-completion` sets it up."""
    asked = {"COMP_WORDS": "xai-pool-patch d", "COMP_CWORD": "1"}
    done = command(_XAI_POOL_PATCH_COMPLETE="complete_bash", **asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, "demo\n", "")


def silence(seconds: float, value: int = 0) -> rtc.AudioFrame:
    count = int(seconds * SAMPLE_RATE)
    return rtc.AudioFrame(value.to_bytes(2, "little") * count, SAMPLE_RATE, 1, count)


@in_virtual_time
async def test_the_loudspeaker_plays_to_the_end() -> None:
    """At its speed, counting from the last underrun."""
    loudspeaker = Loudspeaker(speed=2.0, keep_samples=True)
    first = loudspeaker.next_playback()
    await loudspeaker.capture_frame(silence(0.5, value=7))
    await loudspeaker.capture_frame(silence(0.5, value=7))
    loudspeaker.flush()
    event = await loudspeaker.wait_for_playout()
    (playback,) = loudspeaker.playbacks
    assert first.result() is playback
    assert playback.ends_at - playback.began_at == pytest.approx(0.5)
    assert (event.interrupted, event.playback_position) == (False, pytest.approx(1.0))
    assert set(playback.samples) == {7}
    assert len(playback.samples) == SAMPLE_RATE


@in_virtual_time
async def test_the_loudspeaker_can_be_interrupted() -> None:
    """Audio not yet played is not counted, and the next utterance is a new one."""
    loudspeaker = Loudspeaker()
    await loudspeaker.capture_frame(silence(1.0))
    loudspeaker.flush()
    loudspeaker.clear_buffer()
    event = await loudspeaker.wait_for_playout()
    assert (event.interrupted, event.playback_position) == (True, pytest.approx(0.0, abs=1e-6))
    await loudspeaker.capture_frame(silence(1.0))
    loudspeaker.flush()
    event = await loudspeaker.wait_for_playout()
    assert (event.interrupted, event.playback_position) == (False, pytest.approx(1.0))
    assert [playback.interrupted for playback in loudspeaker.playbacks] == [True, False]
