"""Shows progress, two bars for each turn, and a summary; or prints all of it as JSON."""

from __future__ import annotations

import importlib.metadata
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..plugin.releases import DISTRIBUTION
from .conversation import Comparison, Plan, Run, Setting, Situation, Turn

UNPATCHED = "unpatched"
PATCHED = "patched"
GOOD, BAD, QUIET = "green", "red", "dim"
CUT = "*"
"""Marks a turn that was interrupted."""
RETRIED = "!"
"""Marks a turn that failed at first."""
NOTICEABLE = 0.03
"""Seconds; a gain that is less may be chance."""
_LABEL = f"    {{:<{len(UNPATCHED)}}} "
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
        return cls("fastest turn", min(min(_times(run.turns)) for run in runs))


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
        self._console.print(_heading(self._run))

    def turn_begins(self, number: int) -> None:
        self._status.update(f"{self._run}, turn {number} of {self._turns}")

    def turn_ended(self, turn: Turn) -> None:
        self._console.print(_line(turn))


def _heading(run: str) -> Text:
    return Text(f"\n{plugin()}, {run}", style="bold")


def _line(turn: Turn) -> Text:
    line = Text(f"turn {turn.number:>2}  {_ms(turn.time_to_first_audio):>8}  ")
    return line.append(_situation(turn), style=QUIET).append(_retried(turn), style=BAD)


def _situation(turn: Turn) -> str:
    return f"{turn.situation.value}{CUT if turn.interrupted else ''}"


def _retried(turn: Turn) -> str:
    return f" {RETRIED}" if turn.retried else ""


def plugin() -> str:
    """Name and version of what is installed."""
    return f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"


def announce(console: Console, setting: Setting) -> None:
    """Print what the demo will do, and how long it will take."""
    plan = setting.plan
    console.print(
        f"An agent says {_plural(plan.turns, 'sentence')}, first with {plugin()} as it is, then"
        f" patched. {_events(plan)}"
    )
    console.print(_server(setting))
    console.print(f"This takes about {setting.expected_duration:.0f} s.", style="bold")


def _events(plan: Plan) -> str:
    interrupted = sum(plan.is_interrupted(number) for number in range(1, plan.turns + 1))
    happens = plan.situations()
    return (
        f"Interruptions: {interrupted},"
        f" changes of voice: {happens.count(Situation.NEW_VOICE)},"
        f" connections that the server closes between turns: {happens.count(Situation.DEAD)}."
    )


def _server(setting: Setting) -> str:
    if setting.round_trip is None or setting.floor is None:
        return "The server is api.x.ai, which charges for this."
    return (
        f"The server is a fake one on this machine, {_ms(setting.round_trip)} (round trip) away."
        f" Floor of the time to first audio: {_ms(setting.floor)}."
    )


def show(console: Console, comparison: Comparison, setting: Setting) -> None:
    """Print the whole report."""
    console.print()
    console.print(_bars(console, comparison, _Yardstick.choose(setting.floor, comparison)))
    console.print()
    console.print(_summary(comparison))
    console.print()
    console.print(_verdict(comparison))
    console.print(_saving(comparison))


def picture(comparison: Comparison, setting: Setting) -> str:
    """The announcement and the report, as SVG."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH, highlight=False)
    announce(console, setting)
    show(console, comparison, setting)
    return console.export_svg(title="xai-pool-patch demo")


# The bars of a turn


def _bars(console: Console, comparison: Comparison, yardstick: _Yardstick) -> RenderableType:
    longest = max(_times(comparison.unpatched.turns) + _times(comparison.patched.turns))
    blocks = ("#", ".") if console.options.ascii_only else ("█", "░")
    scale = _Scale(
        yardstick,
        (console.width - len(_LABEL.format(UNPATCHED)) - len(" 12,345 ms !")) / longest,
        *blocks,
    )
    lines = [scale.legend()]
    for before, after in _pairs(comparison):
        lines.append(Text(f"{before.number:>3} {_situation(before)}", style=QUIET))
        lines.append(Text(_LABEL.format(UNPATCHED)) + scale.bar(before))
        lines.append(Text(_LABEL.format(PATCHED)) + scale.bar(after))
    return Group(*lines)


@dataclass(frozen=True)
class _Scale:
    """Turns times to first audio into bars: one block up to the yardstick, another above it."""

    yardstick: _Yardstick
    cells_per_second: float
    due: str
    excess: str

    def legend(self) -> Text:
        return Text.assemble(
            ("Time to first audio\n", "bold"),
            (3 * self.due, GOOD),
            f" {self.yardstick.name}, {_ms(self.yardstick.seconds)}\n",
            (3 * self.excess, BAD),
            f" on top of it\n{CUT} interrupted while it was heard\n",
            f"{RETRIED} failed, and LiveKit tried again\n",
        )

    def bar(self, turn: Turn) -> Text:
        seconds = turn.time_to_first_audio
        due = min(seconds, self.yardstick.seconds)
        return Text.assemble(
            (self.due * self._cells(due), GOOD),
            (self.excess * self._cells(seconds - due), BAD),
            f" {_ms(seconds)}",
            (_retried(turn), BAD),
        )

    def _cells(self, seconds: float) -> int:
        return round(seconds * self.cells_per_second)


# The summary


def _summary(comparison: Comparison) -> Table:
    runs = (comparison.unpatched, comparison.patched)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("median wait")
    table.add_column(UNPATCHED, justify="right")
    table.add_column(PATCHED, justify="right")
    for situation, times in _by_situation(comparison).items():
        table.add_row(situation.value, *[_ms(statistics.median(each)) for each in times])
    table.add_row()
    table.add_row("turns reused", *[_reused_of(run) for run in runs])
    if comparison.unpatched.connections_made is not None:
        table.add_row("connections made", *[str(run.connections_made) for run in runs])
        table.add_row("most open", *[str(run.peak_open) for run in runs])
    return table


def _by_situation(comparison: Comparison) -> dict[Situation, tuple[list[float], list[float]]]:
    """Times to first audio in each situation that occurred, unpatched and patched."""
    times: dict[Situation, tuple[list[float], list[float]]] = {}
    for situation in Situation:
        pairs = [pair for pair in _pairs(comparison) if pair[0].situation is situation]
        if pairs:
            before, after = zip(*pairs, strict=True)
            times[situation] = (_times(before), _times(after))
    return times


def _reused_of(run: Run) -> str:
    reported = [turn for turn in run.turns if turn.connection_reused is not None]
    return f"{_count_reused(run)} of {len(reported)}"


def _verdict(comparison: Comparison) -> str:
    """In words, which turns gain something with the installed plugin."""
    gains = {
        situation: statistics.median(before) - statistics.median(after)
        for situation, (before, after) in _by_situation(comparison).items()
    }
    faster = [situation for situation, gain in gains.items() if gain >= NOTICEABLE]
    others = [situation for situation in gains if situation not in faster]
    if not others:
        return f"Every turn is faster with the patch than with {plugin()} as it is."
    sentences = []
    if Situation.STEADY in others:
        others.remove(Situation.STEADY)
        sentences.append(f"A steady turn gains nothing: {plugin()} is as fast without the patch.")
    if others:
        sentences.append(f"No gain: {_listed(others)}.")
    if faster:
        sentences.append(f"Faster with the patch: {_listed(faster)}.")
    return " ".join(sentences)


def _listed(situations: list[Situation]) -> str:
    return ", ".join(situation.value for situation in situations)


def _saving(comparison: Comparison) -> Text:
    seconds, turns = round(silence_saved(comparison), 1), len(comparison.patched.turns)
    change = f"{abs(seconds)} s {'less' if seconds > 0 else 'more'}" if seconds else "as much"
    return Text(f"{change} silence over {_plural(turns, 'turn')}", style="bold")


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
    times = _times(run.turns)
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
        "situation": turn.situation.value,
        "interrupted": turn.interrupted,
        "retried": turn.retried,
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
    return sum(_times(comparison.unpatched.turns)) - sum(_times(comparison.patched.turns))


def _times(turns: Sequence[Turn]) -> list[float]:
    return [turn.time_to_first_audio for turn in turns]


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
