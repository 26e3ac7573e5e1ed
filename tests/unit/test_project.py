"""What the project says in two places is the same in both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import noxfile

ROOT = Path(__file__).parents[2]


def targets(file: str) -> list[str]:
    """What a file asks of make, in order; `sessions` only lists what `matrix` is to run."""
    asked = re.findall(r"^[^#\n]*make (?:-\S+ )*(\w+)", (ROOT / file).read_text(), re.MULTILINE)
    return [target for target in asked if target != "sessions"]


def test_the_workflow_and_ci_run_the_same_targets() -> None:
    """Neither passes where the other fails."""
    assert targets(".ci/run") == ["lint", "test", "matrix"]
    assert targets(".github/workflows/ci.yml") == targets(".ci/run")


def test_the_workflow_installs_every_python() -> None:
    """The last one listed runs make."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    [matrix] = re.findall(r"python-version: \|\n((?: +3\.\d+\n)+)", workflow)
    assert sorted(matrix.split()) == noxfile.PYTHONS


def test_the_commit_hook_runs_make_lint() -> None:
    """So it uses the same tools in the same versions as CI."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    assert re.findall(r"entry: (.+)", hooks) == ["make lint"]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of the documentation names a file, and a heading in it if it has a `#`."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    """A newcomer reads it to its end; details belong in `docs/`."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_release_workflow_runs_all_checks_of_ci() -> None:
    """The wheel that it publishes comes from a session of the matrix that exists."""
    release = (ROOT / ".github/workflows/release.yml").read_text()
    assert targets(".github/workflows/release.yml") == targets(".ci/run")
    assert f"matrix(plugin-{noxfile.PLUGINS[-1]}-python-3.11)" in release


def test_every_target_that_a_workflow_asks_for_exists() -> None:
    """Nobody would notice if a nightly one was missing."""
    makefile = (ROOT / "Makefile").read_text()
    for workflow in (ROOT / ".github/workflows").iterdir():
        for target in targets(str(workflow.relative_to(ROOT))):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
