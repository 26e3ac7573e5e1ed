"""A fleet: processes that hold calls, and share the sessions of one team. All times in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import tempfile
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from xai_pool_patch.demo.conversation import TYPICAL_ROUND_TRIP
from xai_pool_patch.options import PoolOptions
from xai_pool_patch.sessions.machine import FOLDER
from xai_pool_patch.testing import Behaviour, FakeServer, Refusal
from xai_pool_patch.testing.server import SWITCHING_PROTOCOLS

from .calls import CallPlan, Reply, Subject, hold_calls
from .helpers import Helper
from .servers import address_of

RUNTIME_DIRECTORY = "XDG_RUNTIME_DIR"
"""The variable of the environment that names a folder of the user's own."""


class Folder(str, enum.Enum):
    """The runtime directory of the processes, through which they may hear of one another."""

    SHARED = "shared"
    APART = "apart"
    """Each has its own, as containers have."""
    UNUSABLE = "unusable"
    """Shared, and there is a file where the processes would make their folder."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Who calls, and how many sessions the team has."""

    processes: int
    calls: int
    """Of each process."""
    sessions: int
    plan: CallPlan = field(default_factory=CallPlan)
    folder: Folder = Folder.SHARED
    refusal: Refusal = Refusal.TOO_MANY_REQUESTS
    permit_ttl: float = 0.0
    round_trip: float = TYPICAL_ROUND_TRIP


@dataclass(frozen=True)
class FleetFigures:
    """What the callers of one fleet heard, and what the server saw."""

    replies: list[Reply]
    refused: int
    """Connections, for want of a session."""
    peak_sessions: int

    @property
    def times(self) -> list[float]:
        """From the first token to the first audio, of each reply that was heard."""
        return [reply.first_audio for reply in self.replies if reply.first_audio is not None]

    @property
    def silent(self) -> int:
        """Replies of which nothing was heard."""
        return len(self.replies) - len(self.times)

    @property
    def in_error(self) -> int:
        """Replies with an error of the TTS, recovered or not."""
        return sum(reply.errors > 0 for reply in self.replies)


def run_fleets(fleet: Fleet, *variants: PoolOptions | None) -> list[FleetFigures]:
    """Runs the same fleet for each variant of the plugin at once, with servers in this process.

    Args:
        fleet: who calls.
        variants: the options of the patch; None leaves the plugin as it is.

    Raises:
        HelperFailedError: a process has died.
    """
    with _helpers(len(variants) * fleet.processes) as helpers, _folder() as folder:
        crews = [helpers[i :: len(variants)] for i in range(len(variants))]
        return asyncio.run(
            _side_by_side(
                _run(fleet, crew, _subjects(fleet, options, folder / str(number)))
                for number, (crew, options) in enumerate(zip(crews, variants, strict=True))
            )
        )


async def _side_by_side(runs: Iterable[Awaitable[FleetFigures]]) -> list[FleetFigures]:
    return await asyncio.gather(*runs)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _subjects(fleet: Fleet, options: PoolOptions | None, folder: Path) -> list[Subject]:
    """One for each process, with a runtime directory below the folder."""
    folder.mkdir()
    return [
        Subject(options=options, environment=_environment(fleet.folder, folder, number))
        for number in range(fleet.processes)
    ]


@contextlib.contextmanager
def _helpers(count: int) -> Iterator[list[Helper]]:
    """Processes that have imported all they need."""
    with contextlib.ExitStack() as stack:
        helpers = [Helper() for _ in range(count)]
        for helper in helpers:
            stack.callback(helper.stop)
            helper.begin(_imported)
        for helper in helpers:
            helper.result()
        yield helpers


def _imported() -> None:
    """Was imported, and with it all that `hold_calls` needs."""


def _environment(folder: Folder, parent: Path, number: int) -> dict[str, str]:
    path = parent / (str(number) if folder is Folder.APART else "shared")
    path.mkdir(mode=0o700, exist_ok=True)
    if folder is Folder.UNUSABLE:
        (path / FOLDER).touch()
    return {RUNTIME_DIRECTORY: str(path)}


async def _run(fleet: Fleet, helpers: list[Helper], subjects: list[Subject]) -> FleetFigures:
    behaviour = Behaviour(
        max_sessions=fleet.sessions, refusal=fleet.refusal, permit_ttl=fleet.permit_ttl
    )
    async with FakeServer(round_trip=fleet.round_trip, behaviour=behaviour) as server:
        address = address_of(server)
        for number, (helper, subject) in enumerate(zip(helpers, subjects, strict=True)):
            numbers = range(number * fleet.calls, (number + 1) * fleet.calls)
            helper.begin(hold_calls, fleet.plan, address, subject, numbers)
        replies: list[Reply] = []
        for helper in helpers:
            for call in await asyncio.to_thread(helper.result):
                replies += call
        return FleetFigures(replies, _refused(server), server.peak_sessions)


def _refused(server: FakeServer) -> int:
    at_handshake = sum(
        handshake.status not in (None, SWITCHING_PROTOCOLS) for handshake in server.handshakes
    )
    return at_handshake + sum(connection.over_limit for connection in server.connections)
