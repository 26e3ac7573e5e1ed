"""The command `python -m benchmarks peers`: holds the conversations, and prints a table."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from xai_pool_patch.__main__ import FAILED, complain
from xai_pool_patch.demo.conversation import TYPICAL_ROUND_TRIP
from xai_pool_patch.demo.report import percentile
from xai_pool_patch.testing import Behaviour, FakeServer

from .conversation import Task, Turn

ROOT = Path(__file__).parents[2]
PLUGIN = "benchmarks.peers.plugin"
PIPECAT = "benchmarks.peers.pipecat_service"
PAUSE = 0.8
MOST_TURNS = 100
"""Even if each is said twice, no utterance has a sample above 255."""
IDLE_LIMIT = 6.0
"""Seconds after which the server of the last case drops an idle connection. Pipecat gives up on a
server that ends three connections in a row within five."""


class PeerFailedError(Exception):
    """A client has ended without a result. The message has its last words."""


@dataclass(frozen=True)
class Peer:
    """A client, as a command."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PeerCase:
    """One situation, for all clients."""

    name: str
    shows: str
    turn: Callable[[int], dict[str, Any]] = lambda _: {}
    """What is special about a turn, by its number from 1."""
    idle_limit: float | None = None
    most_turns: int = MOST_TURNS

    def turns(self, count: int) -> list[Turn]:
        usual = {"pause": PAUSE}
        return [
            Turn(f"Turn {number}: your order is on its way.", **{**usual, **self.turn(number)})
            for number in range(1, min(count, self.most_turns) + 1)
        ]


def _every_other_interrupted(pause: float) -> Callable[[int], dict[str, Any]]:
    """The turn that follows comes after the given pause."""
    return lambda number: {"interrupted": True} if number % 2 else {"pause": pause}


CASES = (
    PeerCase(name="steady", shows="nothing happens to any turn"),
    PeerCase(
        name="interrupted-0.8s",
        shows="every other turn is interrupted, the next comes 0.8 s later",
        turn=_every_other_interrupted(0.8),
    ),
    PeerCase(
        name="interrupted-0.1s",
        shows="the same, 0.1 s later",
        turn=_every_other_interrupted(0.1),
    ),
    PeerCase(
        name="interrupted-at-once",
        shows="the same, at once",
        turn=_every_other_interrupted(0.0),
    ),
    PeerCase(
        name="voices",
        shows="the voice is switched 0.8 s before every turn",
        turn=lambda number: {"voice": ("ara", "rex")[number % 2]},
    ),
    PeerCase(
        name="dropped",
        shows="the server drops a connection after 6 s, and the next turn comes 1 s later",
        turn=lambda number: {"pause": IDLE_LIMIT + 1.0},
        most_turns=10,
        idle_limit=IDLE_LIMIT,
    ),
)


@dataclass(frozen=True)
class PeerFigures:
    """What one client did in one case."""

    times: list[float]
    """To the first audio, of the turns that were not interrupted."""
    silent: int
    """Of those turns."""
    wrong_samples: int
    """Of all turns: audio of another turn than the caller was listening to."""
    connections: int

    def as_json(self) -> dict[str, Any]:
        return {
            "p50_s": round(statistics.median(self.times), 3) if self.times else None,
            "p95_s": round(percentile(self.times, 0.95), 3) if self.times else None,
            "silent": self.silent,
            "wrong_samples": self.wrong_samples,
            "connections": self.connections,
        }


def peers(
    pipecat: Annotated[
        Path, typer.Option(metavar="PYTHON", help="The Python that pipecat is installed for.")
    ],
    native_pool: Annotated[
        Path,
        typer.Option(metavar="PYTHON", help="The Python of a plugin with a native pool."),
    ],
    turns: Annotated[
        int, typer.Option(metavar="N", min=2, max=MOST_TURNS, help="Turns of each case.")
    ] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Compare pipecat's xAI service with the plugin: as it is, with a native pool, and patched."""
    clients = (
        Peer("pipecat", (str(pipecat), "-m", PIPECAT)),
        Peer("as it is", (sys.executable, "-m", PLUGIN)),
        Peer("native pool", (str(native_pool), "-m", PLUGIN)),
        Peer("patched", (sys.executable, "-m", PLUGIN, "{}")),
        Peer("patched, clear", (sys.executable, "-m", PLUGIN, '{"interruption": "clear"}')),
    )
    console = Console(quiet=as_json, highlight=False)
    results: dict[str, dict[str, PeerFigures]] = {}
    try:
        for case in CASES:
            results[case.name] = asyncio.run(_run_case(case, clients, turns))
            console.print(_table(case, results[case.name]))
    except PeerFailedError as error:
        raise typer.Exit(complain("benchmarks", str(error), FAILED)) from None
    if as_json:
        document = {
            case: {name: figures.as_json() for name, figures in row.items()}
            for case, row in results.items()
        }
        typer.echo(json.dumps(document, indent=2))


def _table(case: PeerCase, row: dict[str, PeerFigures]) -> Table:
    table = Table(box=box.SIMPLE, padding=0, title=f"{case.name}: {case.shows}", title_style="")
    table.add_column("client", min_width=14)
    for name, figures in row.items():
        cells = figures.as_json()
        if not table.rows:
            for column in cells:
                table.add_column(column.replace("_", " "), justify="right")
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells.values()))
    return table


async def _run_case(
    case: PeerCase, clients: tuple[Peer, ...], turns: int
) -> dict[str, PeerFigures]:
    """All clients at once, each with a server of its own."""
    figures = await asyncio.gather(*(run_client(case, peer, turns) for peer in clients))
    return {peer.name: each for peer, each in zip(clients, figures, strict=True)}


async def run_client(case: PeerCase, peer: Peer, count: int) -> PeerFigures:
    behaviour = Behaviour(idle_limit=case.idle_limit)
    turns = case.turns(count)
    async with FakeServer(round_trip=TYPICAL_ROUND_TRIP, behaviour=behaviour) as server:
        task = Task(server.network.port, behaviour.api_key, turns)
        with _certificates(server) as path:
            heard = await _carry_out(peer, task, {"SSL_CERT_FILE": str(path)})
        return figures_of(server, turns, heard)


@contextlib.contextmanager
def _certificates(server: FakeServer) -> Iterator[Path]:
    """A file with the certificates to trust."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trusted.pem")
        trusted = server.ssl_context.get_ca_certs(binary_form=True)
        path.write_text("".join(map(ssl.DER_cert_to_PEM_cert, trusted)))
        yield path


async def _carry_out(peer: Peer, task: Task, environment: dict[str, str]) -> list[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *peer.command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    try:
        output, complaints = await process.communicate(task.as_json().encode())
    finally:
        if process.returncode is None:  # another client has failed, or Ctrl-C
            process.kill()
            await process.communicate()  # its pipes would outlive the event loop, and complain
    if process.returncode != 0:
        last = complaints.decode().strip().rpartition("\n")[2]
        raise PeerFailedError(f"{peer.name} failed: {last}")
    heard: list[dict[str, Any]] = json.loads(output.decode().strip().rpartition("\n")[2])
    return heard


def figures_of(server: FakeServer, turns: list[Turn], heard: list[dict[str, Any]]) -> PeerFigures:
    spoken = [each for turn, each in zip(turns, heard, strict=True) if not turn.interrupted]
    times = [each["first_audio"] for each in spoken if each["first_audio"] is not None]
    wrong = sum(
        count
        for turn, each in zip(turns, heard, strict=True)
        for value, count in each["samples"].items()
        if int(value) not in _numbers_of(server, turn)
    )
    return PeerFigures(times, len(spoken) - len(times), wrong, len(server.connections))


def _numbers_of(server: FakeServer, turn: Turn) -> set[int]:
    """Of the utterances of a turn: a client may have said it again."""
    wanted = "".join(turn.text.split())
    return {each.number for each in server.utterances if wanted in "".join(each.text.split())}
