"""docs/live-service.md has each question of the probe, in its words."""

from __future__ import annotations

import re
from pathlib import Path

from xai_pool_patch.probe.question import Question
from xai_pool_patch.probe.report import markdown_table
from xai_pool_patch.probe.run import EVERY

PAGE = Path(__file__).parents[2] / "docs/live-service.md"
HEAD = ("question", "supposed", "what the patch does", "if not", "options")


def row(question: Question) -> tuple[str, ...]:
    name = f"{question.name} (`{question.flag}`)" if question.flag else question.name
    options = ", ".join(f"`{option}`" for option in question.options)
    return (name, question.supposed, question.if_so, question.if_not, options)


def test_has_the_same_questions() -> None:
    """If this fails, put the lines that it expects into the page in place of the table there."""
    table = markdown_table(HEAD, [row(question) for question in EVERY])
    found = re.search(rf"^\| {HEAD[0]} \|.*?(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found.group().splitlines() == table


def test_the_recorded_run_is_marked() -> None:
    """Nobody takes it for what xAI does."""
    text = PAGE.read_text()
    heading = text.index("## A run against the fake server")
    assert text.index("xai-pool-patch probe --fake") > heading
    assert "asked a fake server on this machine" in text[heading:]
    for question in EVERY:
        assert question.flag or f"| {question.name}: **" in text[heading:]
