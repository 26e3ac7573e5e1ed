"""The command line, `xai-pool-patch`."""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import xai_pool_patch

from .demo import arguments
from .errors import UnsupportedPluginError
from .installation import OFF_SWITCH, is_switched_off
from .plugin.releases import DISTRIBUTION, MODULE, detect, installed_version, is_as_published
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

PROBE_HINT = f"with a key, {NAME} probe asks xAI what the patch supposes of its service"

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
        code = app(prog_name=name, standalone_mode=False)
    except UsageError as error:
        code = complain(name, error.format_message(), MISUSED)  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        reason = f'{error.name} is missing: pip install "xai_pool_patch[demo]"'
        code = complain(name, reason, MISUSED)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    sys.exit(code)


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
    ] = 12,
    rtt: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Round trip to the fake server, in ms.",
            callback=arguments.milliseconds,
        ),
    ] = 150.0,
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
        bool, typer.Option("--live", help=f"Speak to api.x.ai, with the key in {KEY_VARIABLE}.")
    ] = False,
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
    _check_plugin()
    from .demo import conversation

    pause = conversation.sufficient_pause(rtt / 1e3)
    plan = conversation.Plan(turns=turns, interrupted_share=interrupt, pause=pause)
    if api_key is None:
        endpoint = functools.partial(conversation.fake_endpoint, rtt / 1e3)
        _compare(conversation.Setting(plan, rtt / 1e3), endpoint, as_json=as_json, svg=svg)
    else:
        endpoint = functools.partial(conversation.xai_endpoint, api_key)
        _compare(conversation.Setting(plan, round_trip=None), endpoint, as_json=as_json, svg=svg)


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
        _fail(f"nothing to compare with: {OFF_SWITCH}=off keeps the patch out; unset it")
    xai_pool_patch.uninstall()


def _compare(
    setting: Setting, open_endpoint: OpenEndpoint, *, as_json: bool, svg: Path | None
) -> None:
    from rich.console import Console

    from .demo import conversation, report

    console = Console(quiet=as_json, highlight=False)
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
        svg.write_text(report.picture(comparison, setting), encoding="utf-8")


@app.command()
def check() -> None:
    """Show which plugin is installed and whether it can be patched. Exit code 1: it cannot."""
    try:
        check_python()
        version = installed_version()
        print(f"found: {DISTRIBUTION} {version}")
        module = importlib.import_module(MODULE)
        shape = detect(module, version, allow_unverified=False)
    except UnsupportedPluginError as error:
        _fail(f"cannot be patched: {error}")
    except Exception as error:
        _fail(f"cannot be patched, since it cannot be imported: {type(error).__name__}: {error}")
    print(f"shape: {shape.value}")
    print(f"file: {'as' if is_as_published(module, version) else 'not as'} published")
    if is_switched_off():
        _fail(f"can be patched, but {OFF_SWITCH}=off keeps the patch out")
    print("can be patched: everything that is wrapped or relied on is as expected")
    print(PROBE_HINT)


@app.command()
def probe(
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking.")] = False,
    idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Ask too whether a connection can be used after this time.",
            callback=arguments.idle_time,
        ),
    ] = None,
    deadline: Annotated[
        bool, typer.Option("--deadline", help="Ask too when a connection is ended. 40 minutes.")
    ] = False,
    sessions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Ask too whether idle connections count, with up to N of them. Takes sessions"
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
    """Ask xAI's live service what the patch supposes of it, and advise options.

    Needs a key in XAI_API_KEY. Exit code 3: something is not as supposed.
    """
    api_key = "" if fake else _api_key("probe")
    from rich.console import Console

    from .probe import report, run

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
        file.write_text(report.as_markdown(outcome), encoding="utf-8")
    if trouble is not None:
        _fail(trouble)
    if outcome.deviations:
        _fail(f"not as supposed: {', '.join(outcome.deviations)}", OTHERWISE)


def _confirm(announcement: str, *, yes: bool, console: Console) -> None:
    """Says what follows, and ends the command if nobody wants it."""
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
