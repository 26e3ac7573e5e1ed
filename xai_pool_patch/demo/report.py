"""Shows progress, a table and a bar per turn, and a summary; or prints all of it as JSON."""

from __future__ import annotations

import importlib.metadata
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..plugin.releases import DISTRIBUTION
from .conversation import Comparison, Run, Setting, Turn

UNPATCHED = "unpatched"
PATCHED = "patched"
GOOD, BAD, QUIET = "green", "red", "dim"
NAME_WIDTH = len(UNPATCHED)
PICTURE_WIDTH = 88
"""Columns. The same for every terminal."""


@dataclass(frozen=True)
class _Yardstick:
    """What the report compares times to first audio with. Seconds."""

    name: str
    seconds: float

    @classmethod
    def choose(cls, floor: float | None, comparison: Comparison) -> _Yardstick:
        """The floor, or the fastest turn if the floor is not known."""
        if floor is not None:
            return cls("floor", floor)
        runs = (comparison.unpatched, comparison.patched)
        return cls("fastest turn", min(min(_times(run)) for run in runs))


class Progress:
    """Prints every turn as it ends; in a terminal, also which turn is running."""

    def __init__(self, console: Console, setting: Setting) -> None:
        self._console = console
        self._turns = setting.plan.turns
        self._run = UNPATCHED
        self._status: Status = console.status("", spinner="line")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.stop()

    def run_begins(self, *, patched: bool) -> None:
        self._run = PATCHED if patched else UNPATCHED
        self._console.print()

    def turn_begins(self, number: int) -> None:
        self._status.update(f"{self._run}, turn {number} of {self._turns}")

    def turn_ended(self, turn: Turn) -> None:
        self._console.print(_line(self._run, turn, self._turns))


def _line(run: str, turn: Turn, turns: int) -> Text:
    line = Text(f"{run:<{NAME_WIDTH}}  turn {turn.number:>2} of {turns}")
    line.append(f"  first audio after {_ms(turn.time_to_first_audio):>8}")
    line.append(_remark(turn), style=QUIET)
    return line


def _remark(turn: Turn) -> str:
    if turn.interrupted:
        return "  interrupted"
    return "  connection reused" if turn.connection_reused else "  new connection"


def announce(console: Console, setting: Setting) -> None:
    """Print what the demo will do, and how long it will take."""
    plan = setting.plan
    interrupted = sum(plan.is_interrupted(number) for number in range(1, plan.turns + 1))
    plugin = f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
    console.print(
        f"An agent says {_plural(plan.turns, 'sentence')}, {interrupted or 'none'} interrupted:"
        f" first with {plugin} as it is, then patched."
    )
    console.print(_server(setting))
    console.print(f"This takes about {setting.expected_duration:.0f} s.", style="bold")


def _server(setting: Setting) -> str:
    if setting.round_trip is None or setting.floor is None:
        return "The server is api.x.ai, which charges for this."
    return (
        f"The server is a fake one on this machine, {_ms(setting.round_trip)} (round trip) away."
        f" Floor of the time to first audio: {_ms(setting.floor)}."
    )


def show(console: Console, comparison: Comparison, setting: Setting) -> None:
    """Print the whole report."""
    yardstick = _Yardstick.choose(setting.floor, comparison)
    console.print()
    console.print(_table(comparison))
    console.print(_notes(comparison))
    console.print()
    console.print(_bars(console, comparison, yardstick))
    console.print()
    console.print(_summary(comparison, yardstick))
    console.print(_saving(comparison))


def picture(comparison: Comparison, setting: Setting) -> str:
    """Everything that a terminal shows at the end, as SVG."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH, highlight=False)
    announce(console, setting)
    for name, run in ((UNPATCHED, comparison.unpatched), (PATCHED, comparison.patched)):
        console.print()
        for turn in run.turns:
            console.print(_line(name, turn, len(run.turns)))
    show(console, comparison, setting)
    return console.export_svg(title="xai-pool-patch demo")


# The table per turn


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("\nturn", justify="right", no_wrap=True)
    for name in (UNPATCHED, PATCHED):
        table.add_column(f"{name}\nfirst audio", justify="right", no_wrap=True)
        table.add_column("\nreused", no_wrap=True)
        table.add_column("\nacquire", justify="right", no_wrap=True)
    table.add_column("", style=QUIET, no_wrap=True)
    for before, after in _pairs(comparison):
        mark = "cut" if before.interrupted or after.interrupted else ""
        table.add_row(str(before.number), *_cells(before), *_cells(after), mark)
    return table


def _cells(turn: Turn) -> tuple[str, Text, str]:
    acquire = "-" if turn.acquire_time is None else _ms(turn.acquire_time)
    return _ms(turn.time_to_first_audio), _reused(turn), acquire


def _reused(turn: Turn) -> Text:
    if turn.connection_reused is None:
        return Text("-")
    return Text("yes", style=GOOD) if turn.connection_reused else Text("no", style=BAD)


def _notes(comparison: Comparison) -> Text:
    notes = ["reused, acquire: from the plugin's TTSMetrics"]
    runs = (comparison.unpatched, comparison.patched)
    if any(turn.connection_reused is None for run in runs for turn in run.turns):
        notes.append("cut: interrupted, so the plugin reports no metrics")
    made = [turn for turn in comparison.unpatched.turns if turn.connection_reused is False]
    if made and not any(turn.acquire_time for turn in made):
        notes.append("unpatched, the plugin says 0 ms however long its handshake took")
    return Text("\n".join(f"  {note}" for note in notes), style=QUIET)


# The bar per turn


def _bars(console: Console, comparison: Comparison, yardstick: _Yardstick) -> RenderableType:
    longest = max(_times(comparison.unpatched) + _times(comparison.patched))
    blocks = ("#", ".") if console.options.ascii_only else ("█", "░")
    scale = _Scale(yardstick, (console.width - NAME_WIDTH - 16) / longest, *blocks)
    lines = [scale.legend()]
    for before, after in _pairs(comparison):
        lines.append(Text(f"{before.number:>3} {UNPATCHED:<{NAME_WIDTH}} ") + scale.bar(before))
        lines.append(Text(f"    {PATCHED:<{NAME_WIDTH}} ") + scale.bar(after))
    return Group(*lines)


@dataclass(frozen=True)
class _Scale:
    """Turns times to first audio into bars: one block up to the yardstick, another above it."""

    yardstick: _Yardstick
    cells_per_second: float
    due: str
    excess: str

    def legend(self) -> Text:
        yardstick = f" {self.yardstick.name}, {_ms(self.yardstick.seconds)}  "
        return Text.assemble(
            ("Time to first audio  ", "bold"),
            (3 * self.due, GOOD),
            yardstick,
            (3 * self.excess, BAD),
            " on top of it",
        )

    def bar(self, turn: Turn) -> Text:
        seconds = turn.time_to_first_audio
        due = min(seconds, self.yardstick.seconds)
        return Text.assemble(
            (self.due * self._cells(due), GOOD),
            (self.excess * self._cells(seconds - due), BAD),
            f" {_ms(seconds)}",
        )

    def _cells(self, seconds: float) -> int:
        return round(seconds * self.cells_per_second)


# The summary


def _summary(comparison: Comparison, yardstick: _Yardstick) -> Table:
    runs = (comparison.unpatched, comparison.patched)
    table = Table(box=box.SIMPLE, padding=(0, 2, 0, 0))
    table.add_column(f"x: times the {yardstick.name}")
    table.add_column(UNPATCHED, justify="right")
    table.add_column(PATCHED, justify="right")
    for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
        cells = [_against(yardstick, percentile(_times(run), share)) for run in runs]
        table.add_row(f"time to first audio, {name}", *cells)
    table.add_row("turns reused", *[_reused_of(run) for run in runs])
    if comparison.unpatched.connections_made is not None:
        table.add_row("connections made", *[str(run.connections_made) for run in runs])
        table.add_row("most open at a time", *[str(run.peak_open) for run in runs])
    return table


def _against(yardstick: _Yardstick, seconds: float) -> str:
    return f"{_ms(seconds)}  {seconds / yardstick.seconds:.2f} x"


def _reused_of(run: Run) -> str:
    reported = [turn for turn in run.turns if turn.connection_reused is not None]
    return f"{_count_reused(run)} of {len(reported)}"


def _saving(comparison: Comparison) -> Text:
    seconds, turns = round(silence_saved(comparison), 1), len(comparison.patched.turns)
    change = f"{abs(seconds)} s {'less' if seconds > 0 else 'more'}" if seconds else "as much"
    return Text(f"  {change} silence over {_plural(turns, 'turn')}", style="bold")


# JSON


def as_json(comparison: Comparison, setting: Setting) -> dict[str, Any]:
    """The report as one document. Times are in milliseconds; unknown values are null."""
    return {
        "plugin_version": importlib.metadata.version(DISTRIBUTION),
        "live": setting.round_trip is None,
        "round_trip_ms": _rounded_ms(setting.round_trip),
        "floor_ms": _rounded_ms(setting.floor),
        "silence_saved_ms": _rounded_ms(silence_saved(comparison)),
        UNPATCHED: _run_as_json(comparison.unpatched),
        PATCHED: _run_as_json(comparison.patched),
    }


def _run_as_json(run: Run) -> dict[str, Any]:
    times = _times(run)
    return {
        "time_to_first_audio_ms": {
            "p50": _rounded_ms(percentile(times, 0.5)),
            "p95": _rounded_ms(percentile(times, 0.95)),
            "max": _rounded_ms(max(times)),
        },
        "turns_reused": _count_reused(run),
        "connections_made": run.connections_made,
        "peak_open": run.peak_open,
        "turns": [_turn_as_json(turn) for turn in run.turns],
    }


def _turn_as_json(turn: Turn) -> dict[str, Any]:
    return {
        "number": turn.number,
        "interrupted": turn.interrupted,
        "time_to_first_audio_ms": _rounded_ms(turn.time_to_first_audio),
        "connection_reused": turn.connection_reused,
        "acquire_time_ms": _rounded_ms(turn.acquire_time),
    }


# Numbers


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def silence_saved(comparison: Comparison) -> float:
    """Seconds by which first audio came earlier, over all turns."""
    return sum(_times(comparison.unpatched)) - sum(_times(comparison.patched))


def _times(run: Run) -> list[float]:
    return [turn.time_to_first_audio for turn in run.turns]


def _pairs(comparison: Comparison) -> list[tuple[Turn, Turn]]:
    return list(zip(comparison.unpatched.turns, comparison.patched.turns, strict=True))


def _count_reused(run: Run) -> int:
    return sum(turn.connection_reused is True for turn in run.turns)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _rounded_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
