"""The command line, `xai-pool-patch`."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import xai_pool_patch

from .demo import arguments
from .errors import UnsupportedPluginError
from .installation import OFF_SWITCH, is_switched_off
from .plugin.releases import (
    DISTRIBUTION,
    FRAMEWORK,
    MODULE,
    detect,
    installed_version,
    release_of,
)
from .python import check_python
from .telemetry.log import FIELD_PREFIX, describe

if TYPE_CHECKING:
    from rich.console import Console

    from .demo.conversation import OpenEndpoint, Setting
    from .probe.question import Question
    from .probe.report import Outcome, Progress
    from .probe.run import OpenService

NAME = "xai-pool-patch"

KEY_VARIABLE = "XAI_API_KEY"

FAILED, MISUSED, OTHERWISE, INTERRUPTED = 1, 2, 3, 130
"""Exit codes."""

REQUIRES_OPENAI_3 = (1, 8, 7)
"""The first livekit-agents that does. Older plugins import httpx, which openai 2 brought."""

PROBE_HINT = f"with a key, {NAME} probe asks xAI what the patch assumes of its service"

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""click's class. Some versions of typer have a copy of it, without a public name."""

app = typer.Typer(
    # typer's tracebacks show local variables, and with them the API key.
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """The console script."""
    run(app, NAME)


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run a command line to its end. Every error is one line on stderr."""
    logging.getLogger().addHandler(_OneLine(logging.WARNING))
    try:
        code = _code_of(app, name)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has left
        # Python would flush what is left at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED  # as typer does if it sees that error first
    sys.exit(code)


def _code_of(app: typer.Typer, name: str) -> int:
    try:
        return int(app(prog_name=name, standalone_mode=False) or 0)
    except UsageError as error:
        return complain(name, error.format_message(), MISUSED)  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        return complain(name, f"{error.name} is missing{_remedy_for(error)}", MISUSED)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _remedy_for(error: Exception) -> str:
    """What to install, if it is known."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing in ("rich", "trustme"):
        return ': pip install "xai_pool_patch[demo]"'
    if missing == "httpx":
        return ": pip install httpx" if _has_openai_3() else ': pip install "openai<3"'
    return ""


def _has_openai_3() -> bool:
    version = installed_version(FRAMEWORK)
    return tuple(map(int, re.findall(r"\d+", version)[:3])) >= REQUIRES_OPENAI_3


def complain(name: str, message: str, code: int) -> int:
    """Print what went wrong, and return the exit code."""
    _print_line(f"{name}: {message}")
    return code


def _fail(message: str, code: int = FAILED) -> NoReturn:
    raise typer.Exit(complain(NAME, message, code))


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Warm WebSocket connections for livekit-plugins-xai."""
    if version:
        print(f"xai_pool_patch {xai_pool_patch.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"must be a number from 0 (no turn) to 1 (all), not {value:g}")
    return value


@app.command()
def demo(
    turns: Annotated[
        int, typer.Option(metavar="N", help="Turns of the conversation.", callback=arguments.turns)
    ] = 10,
    rtt: arguments.RoundTrip = 150.0,
    interrupt: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Part of the turns that are interrupted.", callback=_share
        ),
    ] = 0.25,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help=f"Speak to api.x.ai, with the key in {KEY_VARIABLE}. Asks first."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Begin --live without asking.")] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the report into a file, too.", callback=arguments.writable
        ),
    ] = None,
) -> None:
    """Hold the same conversation with the plugin as it is and patched, and compare.

    The agent and the plugin are real. The server is a fake one, unless you give --live.
    """
    api_key = _api_key("--live") if live else None
    from .testing import isolated

    with isolated():
        _check_plugin()
        from .demo import conversation

        pause = conversation.sufficient_pause(rtt / 1e3)
        plan = conversation.Plan(
            turns=turns, interrupted_share=interrupt, pause=pause, connections_die=not live
        )
        if api_key is None:
            setting = conversation.Setting(plan, rtt / 1e3)
            endpoint = functools.partial(conversation.fake_endpoint, rtt / 1e3)
        else:
            setting = conversation.Setting(plan, round_trip=None)
            endpoint = functools.partial(conversation.xai_endpoint, api_key)
        _compare(setting, endpoint, as_json=as_json, svg=svg, yes=yes)


def _api_key(purpose: str) -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        _fail(f"{purpose} needs an API key of xAI in {KEY_VARIABLE}, which is not set", MISUSED)
    return key


def _check_plugin() -> None:
    """End the command if the plugin cannot be patched."""
    try:
        importlib.import_module(MODULE)
        xai_pool_patch.install()
    except UnsupportedPluginError as error:
        _fail(str(error))
    if not xai_pool_patch.is_installed():
        _fail(f"nothing to compare with: {_off_switch()} keeps the patch out; unset it")
    xai_pool_patch.uninstall()


def _off_switch() -> str:
    return f"{OFF_SWITCH}={os.environ.get(OFF_SWITCH, '')}"


def _compare(
    setting: Setting, open_endpoint: OpenEndpoint, *, as_json: bool, svg: Path | None, yes: bool
) -> None:
    from rich.console import Console

    from .demo import conversation, report

    console = Console(quiet=as_json, highlight=False)
    if setting.round_trip is None:
        _confirm(_bill(setting), yes=yes, console=console)
    report.announce(console, setting)
    try:
        with report.Progress(console, setting) as progress:
            comparison = asyncio.run(conversation.compare(setting.plan, open_endpoint, progress))
    except conversation.TurnFailedError as error:
        _fail(str(error))
    if as_json:
        print(json.dumps(report.as_json(comparison, setting), indent=2))
    else:
        report.show(console, comparison, setting)
        if setting.round_trip is None:
            console.print(PROBE_HINT)
    if svg is not None:
        _write(svg, report.picture(comparison, setting))


def _bill(setting: Setting) -> str:
    """What a conversation with xAI will cost. Both hold the same turns."""
    plan = setting.plan
    characters = sum(len(plan.sentence(number)) for number in range(1, plan.turns + 1))
    return (
        f"2 conversations of {plan.turns} turn{'s' * (plan.turns > 1)} with api.x.ai.\n"
        f"About {setting.expected_duration:.0f} s, up to {2 * characters:,} characters to be spoken"
        " and billed."
    )


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"cannot write {file}: {error.strerror}")


@app.command()
def check() -> None:
    """Show which plugin is installed and whether it can be patched.

    Exit code 1: it cannot, or XAI_POOL_PATCH keeps the patch out.
    """
    try:
        check_python()
        version = installed_version()
    except UnsupportedPluginError as error:
        _fail(f"cannot be patched: {error}")
    print(f"found: {DISTRIBUTION} {version}")
    try:
        module = importlib.import_module(MODULE)
        shape = detect(module, version, allow_unverified=False)
    except UnsupportedPluginError as error:
        _fail(f"cannot be patched: {error}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}{_remedy_for(error)}"
        _fail(f"cannot be patched, since it cannot be imported: {reason}")
    print(f"shape: {shape.value}")
    print(f"file: {'as' if _is_as_published(module, version) else 'not as'} published")
    if is_switched_off():
        _fail(f"can be patched, but {_off_switch()} keeps the patch out")
    print("can be patched: everything that is wrapped or relied on is as expected")
    print(PROBE_HINT)


def _is_as_published(module: ModuleType, version: str) -> bool:
    """Whether the plugin's file is the one in the wheel of that version, byte for byte."""
    release = release_of(version)
    try:
        content = Path(module.__file__ or "").read_bytes()
    except OSError:  # a frozen application has no such file
        return False
    return release is not None and hashlib.sha256(content).hexdigest() == release.sha256


@app.command()
def probe(
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking.")] = False,
    idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Also ask whether a connection can be used after this time.",
            callback=arguments.idle_time,
        ),
    ] = None,
    deadline: Annotated[
        bool, typer.Option("--deadline", help="Also ask when a connection is ended. 40 minutes.")
    ] = False,
    sessions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also ask whether idle connections count, with up to N of them. Takes sessions"
            " from your team's calls.",
            callback=arguments.sessions,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Write a report for an issue, without key, account or spoken text.",
            callback=arguments.writable,
        ),
    ] = None,
    fake: Annotated[
        bool, typer.Option("--fake", help="Ask a fake server on this machine. Needs no key.")
    ] = False,
) -> None:
    """Ask xAI's live service what the patch assumes of it, and advise options.

    Needs a key in XAI_API_KEY. Exit code 3: something is not as assumed.
    """
    api_key = "" if fake else _api_key("probe")
    from rich.console import Console

    from .probe import report, run

    if fake:
        from . import testing  # noqa: F401 - what is missing for it is found before the question
    console = Console(quiet=as_json, highlight=False)
    questions = run.chosen(idle=idle, deadline=deadline, sessions=sessions)
    _confirm(report.announcement(questions, fake=fake), yes=yes, console=console)
    open_service = run.fake_service if fake else functools.partial(run.live_service, api_key)
    with report.Progress(console, len(questions)) as progress:
        trouble = _ask(questions, open_service, progress)
    outcome = report.Outcome(progress.findings, progress.characters, fake=fake)
    _conclude(outcome, trouble, console=console, as_json=as_json, file=file)


def _conclude(
    outcome: Outcome, trouble: str | None, *, console: Console, as_json: bool, file: Path | None
) -> None:
    """Shows what was found, and ends the command with the exit code for it."""
    from .probe import report

    if as_json and trouble is None:
        print(json.dumps(report.as_json(outcome), indent=2))
    elif outcome.findings:
        report.show(console, outcome)
    if file is not None and outcome.findings:
        _write(file, report.as_markdown(outcome))
    if trouble is not None:
        _fail(trouble)
    if outcome.deviations:
        _fail(f"not as supposed: {', '.join(outcome.deviations)}", OTHERWISE)


def _confirm(announcement: str, *, yes: bool, console: Console) -> None:
    """Says what follows, and ends the command if the user declines."""
    if yes:
        console.print(announcement)
        return
    # Not typer.confirm(): it writes to stdout too.
    print(announcement, "Begin? [y/N] ", sep="\n", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        _fail("not begun; --yes begins without asking")


def _ask(questions: list[Question], open_service: OpenService, progress: Progress) -> str | None:
    """Asks them; why not all of them, or None."""
    from .probe import run
    from .probe.service import DialError

    try:
        asyncio.run(run.ask(questions, open_service, progress))
    except DialError as error:
        return run.explain(error)
    except asyncio.CancelledError:
        _fail("interrupted; every connection is closed", INTERRUPTED)
    return None


class _OneLine(logging.Handler):
    """Shows a record of any logger as one line, without its traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        _print_line(" ".join([f"{level}:", record.getMessage(), *_details(record)]))


def _print_line(text: str) -> None:
    """Print a line to the current `sys.stderr`, which a live display may have replaced.

    The API key is masked: asyncio quotes exceptions in full, and aiohttp's quote the headers.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key:
        text = text.replace(key, "***")
    print(" ".join(text.split()), file=sys.stderr)


def _details(record: logging.LogRecord) -> list[str]:
    """The fields of a record of ours, and a description of its exception."""
    details = []
    if record.name == xai_pool_patch.__name__:
        plain = vars(logging.makeLogRecord({}))
        fields = {name: value for name, value in vars(record).items() if name not in plain}
        details = [f"{name.removeprefix(FIELD_PREFIX)}={fields[name]}" for name in fields]
    if record.exc_info and record.exc_info[1]:
        details.append(f"({describe(record.exc_info[1])})")
    return details


if __name__ == "__main__":
    main()
