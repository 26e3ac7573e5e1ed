"""The calls of one warm turn, counted by `sys.setprofile`: a figure that no other load changes."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

from livekit.plugins import xai
from rich.console import Console
from rich.table import Table

import xai_pool_patch
from xai_pool_patch.testing import Behaviour

from . import servers
from .costs import SPOKEN_TEXT, speak
from .runs import crew_at_work
from .servers import Address, client_session

REAL_TIME = 8.0
"""The server sends audio so many times faster than it is played."""
TURNS = 10
PACKAGE = str(Path(xai_pool_patch.__file__).parent)


@dataclass(frozen=True)
class Step:
    """A function of the package that a turn passes."""

    file: str
    function: str
    calls: float
    """Of a turn."""


@dataclass(frozen=True)
class Profile:
    """What was counted, of one turn on average. Each time that a coroutine goes on counts, too."""

    calls: float
    """Of functions in Python, whosever they are."""
    steps: list[Step]
    """In the order in which a turn passes them first."""

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(step.file for step in self.steps))


def profile_turns(address: Address, *, patched: bool) -> Profile:
    """Count the calls of the plugin's turns in this process; the first turn does not count."""
    if patched:
        xai_pool_patch.install()
    try:
        counted = asyncio.run(_count(address))
    finally:
        xai_pool_patch.uninstall()
    steps = [
        Step(str(Path(code.co_filename).relative_to(PACKAGE)), _name(code), calls / TURNS)
        for code, calls in counted.items()
        if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<")
    ]
    return Profile(sum(counted.values()) / TURNS, steps)


async def _count(address: Address) -> Counter[CodeType]:
    counted: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            counted[frame.f_code] += 1

    async with client_session(address) as http:
        tts = xai.TTS(api_key=Behaviour().api_key, http_session=http)
        await speak(tts)
        for _ in range(TURNS):
            sys.setprofile(count)
            try:
                await speak(tts)
            finally:
                sys.setprofile(None)
        await tts.aclose()
    return counted


def _name(code: CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on


def profile() -> None:
    """Count the calls of a warm turn of 40 messages, as it is and patched, and show our part."""
    with crew_at_work() as crew:
        pace = REAL_TIME / Behaviour().chunk
        address = crew.server.run(servers.open_servers, 1, messages_per_second=pace)
        unpatched: Profile = crew.unpatched.run(profile_turns, address, patched=False)
        patched: Profile = crew.patched.run(profile_turns, address, patched=True)
    console = Console(highlight=False)
    ours = sum(step.calls for step in patched.steps)
    table = Table("function", "file", "calls", title=f"A turn of {len(SPOKEN_TEXT)} characters")
    for step in patched.steps:
        table.add_row(step.function, step.file, f"{step.calls:g}")
    console.print(table)
    console.print(
        f"Calls: {unpatched.calls:,.0f} unpatched, {patched.calls:,.0f} patched:"
        f" {patched.calls / unpatched.calls:.2f} x. {ours:,.0f} are ours, of"
        f" {len(patched.steps)} functions in {len(patched.files)} files."
    )
