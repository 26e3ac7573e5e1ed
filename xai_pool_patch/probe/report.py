"""What the probe shows: an announcement, progress, a table. Or JSON, or a file for an issue.

None of it holds a key, the name of an account or a spoken text. The answers hold none: see
`redaction`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from .._version import __version__
from .question import Finding, Question, Verdict, advice, options_line
from .service import HOST

STYLES = {Verdict.AS_SUPPOSED: "green", Verdict.OTHERWISE: "red", Verdict.UNKNOWN: "yellow"}
FAKE = "a fake server on this machine"
COLUMNS = ("question", "supposed", "found", "what the patch does")


def announcement(questions: Sequence[Question], *, fake: bool) -> str:
    """What the questions will cost."""
    characters = sum(question.characters for question in questions)
    seconds = sum(question.seconds for question in questions)
    spoken = "spoken" if fake else "spoken and billed"
    lines = [
        f"{len(questions)} questions to {FAKE if fake else HOST}.",
        f"About {_duration(seconds)}, up to {characters:,} characters to be {spoken}.",
    ]
    if not fake and any(question.name == "sessions" for question in questions):
        lines.append(
            "Warning: while it looks for the limit it takes sessions from your team's calls."
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """All answers that were found.

    Attributes:
        characters: how many were spoken.
        fake: whether a fake server gave the answers.
    """

    findings: Sequence[Finding]
    characters: int
    fake: bool

    @property
    def service(self) -> str:
        return FAKE if self.fake else HOST

    @property
    def deviations(self) -> list[str]:
        """The names of the questions whose answers are not as supposed."""
        return self.named(Verdict.OTHERWISE)

    @property
    def options_line(self) -> str:
        return options_line(advice(self.findings))

    def named(self, verdict: Verdict) -> list[str]:
        """The names of the questions with such an answer."""
        return [found.question.name for found in self.findings if found.answer.verdict is verdict]


class Progress:
    """Shows each answer as it comes, and in a terminal also the question being asked."""

    def __init__(self, console: Console, count: int) -> None:
        self.findings: list[Finding] = []
        self.characters = 0
        self._console = console
        self._count = count
        self._status: Status = console.status("connecting", spinner="line")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.stop()

    def question_begins(self, question: Question) -> None:
        place = f"{len(self.findings) + 1} of {self._count}"
        self._status.update(f"{place}: {question.name}, about {_duration(question.seconds)}")

    def answered(self, finding: Finding, characters: int) -> None:
        self.findings.append(finding)
        self.characters = characters
        place = f"{len(self.findings):>2} of {self._count}"
        self._console.print(
            Text.assemble(f"{place}  {finding.question.name:<18}", _marked(finding))
        )


def show(console: Console, outcome: Outcome) -> None:
    """Prints the table and the advice."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 1, 0))
    table.add_column(COLUMNS[0])
    for column in COLUMNS[1:]:
        table.add_column(column, overflow="fold", ratio=1)
    for finding in outcome.findings:
        name = Text.assemble(f"{finding.question.name}\n", _marked(finding))
        table.add_row(name, *map(Text, _cells(finding)))
    console.print(table)
    console.print(Text(conclusion(outcome)))
    console.print(Text(f"\n    {outcome.options_line}\n", style="bold"))


def _marked(finding: Finding) -> Text:
    verdict = finding.answer.verdict
    return Text(verdict.value, style=STYLES[verdict])


def _cells(finding: Finding) -> tuple[str, str, str]:
    return finding.question.supposed, finding.answer.found, finding.consequence


def conclusion(outcome: Outcome) -> str:
    """What is not as supposed, and whether options should be taken."""
    lines = [
        f"{verdict.value.capitalize()}: {', '.join(outcome.named(verdict))}."
        for verdict in (Verdict.OTHERWISE, Verdict.UNKNOWN)
        if outcome.named(verdict)
    ]
    has_advice = bool(advice(outcome.findings))
    lines = lines or ["All is as supposed."]
    lines.append("These options suit the service:" if has_advice else "The defaults suit it:")
    return "\n".join(lines)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The report as one document. Each figure has its unit in its name."""
    return {
        **_versions(),
        "service": outcome.service,
        "characters": outcome.characters,
        "otherwise": outcome.deviations,
        "unknown": outcome.named(Verdict.UNKNOWN),
        "questions": [_finding_as_json(finding) for finding in outcome.findings],
        "options": advice(outcome.findings),
    }


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.question.name,
        "supposed": finding.question.supposed,
        "verdict": finding.answer.verdict.value,
        "found": finding.answer.found,
        "measured": dict(finding.answer.measured),
        "consequence": finding.consequence,
        "advises": dict(finding.answer.advises),
    }


def as_markdown(outcome: Outcome) -> str:
    """The report as a text that can be attached to an issue."""
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    rows = [
        (f"{finding.question.name}: **{finding.answer.verdict.value}**", *_cells(finding))
        for finding in outcome.findings
    ]
    return "\n".join(
        [
            f"`xai-pool-patch probe` asked {outcome.service}.",
            f"{versions}; {outcome.characters:,} characters spoken.",
            "",
            *markdown_table(COLUMNS, rows),
            "",
            *conclusion(outcome).splitlines(),
            "",
            f"```python\n{outcome.options_line}\n```",
            "",
        ]
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def _versions() -> dict[str, str]:
    return {
        "xai_pool_patch": __version__,
        "aiohttp": aiohttp.__version__,
        "python": platform.python_version(),
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
