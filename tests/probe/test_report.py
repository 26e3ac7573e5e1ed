"""What the probe advises, shows and writes, and what it keeps to itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from tests.probe.kit import HASTY, Listener, serving_both
from xai_pool_patch import PoolOptions
from xai_pool_patch.probe import quick, report, run
from xai_pool_patch.probe.question import (
    Answer,
    Finding,
    Question,
    Verdict,
    advice,
    options_line,
)
from xai_pool_patch.probe.redaction import LONGEST, plain_words, public_headers
from xai_pool_patch.testing import Behaviour

KEY = Behaviour.api_key


async def never(service: object) -> Answer:
    raise AssertionError


def finding(
    verdict: Verdict, advises: Mapping[str, Any] | None = None, found: str = "something"
) -> Finding:
    question = Question(
        name="a question",
        supposed="this",
        if_so="so",
        if_not="not so",
        seconds=1,
        ask=never,
    )
    return Finding(question, Answer(verdict, found, advises or {}))


SO, OTHERWISE, UNKNOWN = Verdict.AS_SUPPOSED, Verdict.OTHERWISE, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("advised", "taken"),
    [
        ([{"interruption": "clear"}, {"interruption": "discard"}], {}),
        ([{"interruption": "discard"}, {"interruption": "clear"}], {}),
        ([{"interruption": "clear"}, {}], {"interruption": "clear"}),
        ([{"heartbeat": 10.0}, {"heartbeat": 15.0}], {"heartbeat": 10.0}),
        ([{"max_age": 900.0}, {"max_age": 500.0}], {"max_age": 500.0}),
        ([{"max_age": PoolOptions.max_age}], {}),
        ([{"warm": "always"}, {"warm": "reply"}], {"warm": "reply"}),
    ],
)
def test_the_more_cautious_advice_counts(
    advised: list[dict[str, Any]], taken: dict[str, Any]
) -> None:
    """And what is the default already is left out."""
    assert advice([finding(OTHERWISE, each) for each in advised]) == taken


def test_the_line_to_take() -> None:
    """It is valid Python, and the options take it."""
    line = options_line({"interruption": "clear", "max_age": 300.0})
    assert line == "PoolOptions(interruption='clear', max_age=300.0)"
    assert eval(line) == PoolOptions(interruption="clear", max_age=300.0)


@pytest.mark.parametrize("question", run.EVERY, ids=lambda question: question.name)
def test_each_question_advises_options_that_exist(question: Question) -> None:
    """Under the names that `PoolOptions` has."""
    assert set(question.options) <= set(PoolOptions.__dataclass_fields__)


def test_what_is_asked_by_default_is_cheap() -> None:
    """Some two minutes, and fewer than 1,000 characters."""
    questions = run.chosen(idle=None, deadline=False, sessions=None)
    assert sum(question.characters for question in questions) < 1000
    assert sum(question.seconds for question in questions) < 150
    assert "382 characters to be spoken and billed" in report.announcement(questions, fake=False)


def test_warns_of_taking_sessions() -> None:
    """Before anything is done, and only if it is."""
    with_sessions = run.chosen(idle=600.0, deadline=True, sessions=50)
    assert [question.name for question in with_sessions[-3:]] == [
        "idle connection",
        "deadline",
        "sessions",
    ]
    assert "takes sessions" in report.announcement(with_sessions, fake=False)
    without = run.chosen(idle=600.0, deadline=True, sessions=None)
    assert "takes sessions" not in report.announcement(without, fake=False)


@pytest.mark.parametrize(
    ("verdict", "consequence"), [(SO, "so"), (OTHERWISE, "not so"), (UNKNOWN, "safe choice")]
)
def test_shows_what_the_patch_makes_of_it(verdict: Verdict, consequence: str) -> None:
    """In the table: the question, what was supposed and found, the consequence, and the options."""
    console = Console(file=io.StringIO(), width=100)
    outcome = report.Outcome([finding(verdict, {"heartbeat": 7.0})], 12, fake=False)
    report.show(console, outcome)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("a question", "this", "something", consequence, "PoolOptions(heartbeat=7.0)"):
        assert part in shown
    assert (f"{verdict.value.capitalize()}: a question." in shown) == (verdict is not SO)
    assert outcome.deviations == (["a question"] if verdict is OTHERWISE else [])


def test_a_report_is_a_table() -> None:
    """Markdown, in which a bar in an error message opens no column."""
    text = report.as_markdown(report.Outcome([finding(OTHERWISE, found="a | b")], 12, fake=True))
    assert "asked a fake server" in text
    assert "12 characters" in text
    assert "| a question: **otherwise** | this | a / b | not so |" in text
    assert "PoolOptions()" in text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("TTS pipeline timed out after 2101s: Deadline expired", None),
        ("unknown message type: text.clear", None),
        ("Too many concurrent sessions (limit 50).", None),
        ("Team Acme has no session", "Team … has no session"),
        ("team 6f1c2d90-aa of bob@example.com: quota", "team … of … quota"),
        ("key xai-AbC123 is invalid", "key … is invalid"),
        ("request 123456789 failed", "request … failed"),
        ('in "My name is Bob": unknown voice', "in … is … unknown voice"),
        ("no " * 100, ("no " * 100)[:LONGEST]),
    ],
)
def test_only_plain_words_are_shown(said: str, shown: str | None) -> None:
    """Of an error message: nothing that names a team, a user, a key or a request."""
    assert plain_words(said) == (said if shown is None else shown)


def test_only_harmless_headers_are_shown() -> None:
    """Those that say when to come back, if that is a number."""
    headers = {
        "Retry-After": "7",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Team": "acme",
        "Set-Cookie": "7",
    }
    assert public_headers(headers) == {"Retry-After": "7", "X-RateLimit-Remaining": "0"}


async def test_keeps_secrets() -> None:
    """No key and no spoken text, even if the service quotes them in its errors."""
    quoting = f"team acme-7 with {KEY} said {quick.HELLO!r} and {quick.LONG!r}"
    questions = [each for each in run.QUICK if each.name not in ("first audio", "fence")]
    listener = Listener()
    async with serving_both(HASTY, error_on_text=quoting) as (service, _):
        for question in questions:
            listener.answered(Finding(question, await question.ask(service)), 0)
        assert KEY not in repr(vars(service.timing)) + repr(service)
    outcome = report.Outcome(listener.findings, 0, fake=False)
    assert "error: team" in report.as_markdown(outcome)
    written = report.as_markdown(outcome) + json.dumps(report.as_json(outcome))
    for secret in (KEY, "acme", quick.HELLO, quick.LONG[:20], quick.PIECES[0].strip()):
        assert secret not in written
