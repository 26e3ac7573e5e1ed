"""What a question is, and what an answer is."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..options import PoolOptions
from .service import Service


class Verdict(enum.Enum):
    """How a finding compares with what the patch assumes."""

    AS_SUPPOSED = "as supposed"
    OTHERWISE = "otherwise"
    UNKNOWN = "unknown"
    """The question could not be answered, so the safe default stays."""


@dataclass(frozen=True)
class Answer:
    """What the service did.

    Attributes:
        advises: options of `PoolOptions` that suit it.
        measured: the figures behind it; the unit is part of the name.
    """

    verdict: Verdict
    found: str
    advises: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing that the patch assumes of the service.

    Attributes:
        name: as the report has it.
        supposed: what the patch assumes.
        if_so: what the patch does.
        if_not: what it means if not.
        options: those of `PoolOptions` that an answer may advise.
        flag: the option of the command that asks it; empty if it is asked by default.
        characters: how many are spoken, and so billed.
        seconds: about how long it takes.
        ask: finds the answer.
    """

    name: str
    supposed: str
    if_so: str
    if_not: str
    options: tuple[str, ...] = ()
    flag: str = ""
    characters: int = 0
    seconds: float
    ask: Callable[[Service], Awaitable[Answer]] = field(repr=False)


@dataclass(frozen=True)
class Finding:
    """A question and its answer."""

    question: Question
    answer: Answer

    @property
    def consequence(self) -> str:
        """What the patch does."""
        if self.answer.verdict is Verdict.UNKNOWN:
            return "The default is the safe choice."
        so = self.answer.verdict is Verdict.AS_SUPPOSED
        return self.question.if_so if so else self.question.if_not


_BY_CAUTION: dict[str, list[str]] = {
    "interruption": ["discard", "clear"],
    "warm": ["reply", "auto", "always"],
}


def advice(findings: Iterable[Finding]) -> dict[str, Any]:
    """The options to take. Where two answers differ, the more cautious one counts."""
    advised: dict[str, Any] = {}
    for finding in findings:
        for name, value in finding.answer.advises.items():
            advised[name] = _more_cautious(name, advised.get(name, value), value)
    defaults = {field.name: field.default for field in fields(PoolOptions)}
    return {
        name: value
        for name, value in advised.items()
        if name not in defaults or value != defaults[name]
    }


def _more_cautious(name: str, one: Any, other: Any) -> Any:
    if name in _BY_CAUTION:
        return min(one, other, key=_BY_CAUTION[name].index)
    return min(one, other)  # a time


def options_line(advised: Mapping[str, Any]) -> str:
    """What to write into the application."""
    return f"PoolOptions({', '.join(f'{name}={value!r}' for name, value in advised.items())})"
