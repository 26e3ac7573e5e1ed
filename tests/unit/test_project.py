"""What the project says in two places is the same in both."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import noxfile
from xai_pool_patch.options import MAX_SESSIONS, PoolOptions
from xai_pool_patch.plugin.releases import RELEASES, SUPPORTED

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


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of the documentation names a file, and a heading in it if it has a `#`."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """From the root on, or from the package on."""
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.[a-z]+)`", page.read_text())
    for path in named:
        assert any((root / path).exists() for root in (ROOT, ROOT / "xai_pool_patch")), path


def functions_of(file: Path) -> dict[str, set[str]]:
    """The functions of each class of a module; under "" those of the whole file."""
    tree = ast.parse(file.read_text())
    found: dict[str, set[str]] = {"": set()}
    for scope in ast.walk(tree):
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[""].add(scope.name)
        elif isinstance(scope, ast.ClassDef):
            found[scope.name] = {getattr(each, "name", "") for each in scope.body}
    return found


PACKAGE = {path: functions_of(path) for path in (ROOT / "xai_pool_patch").rglob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_methods_that_a_page_names_exist(page: Path) -> None:
    """Those of the package's own classes."""
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)(?:\(\))?`", page.read_text()):
        classes = [functions[owner] for functions in PACKAGE.values() if owner in functions]
        assert not classes or any(name in each for each in classes), f"{owner}.{name}"


def test_the_functions_of_a_warm_turn_are_where_the_page_says() -> None:
    """`python -m benchmarks profile` counts them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("### What a warm turn passes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `\w+(?:/\w+)?\.py`.*$", table, re.MULTILINE)
    assert rows
    for row in rows:
        files = [ROOT / "xai_pool_patch" / name for name in re.findall(r"`([\w/]+\.py)`", row)]
        known = set().union(*(PACKAGE[file][""] for file in files))
        named = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", row.split("|")[2]))
        assert named <= known, row


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


README = (ROOT / "README.md").read_text()


def test_the_readme_names_the_supported_versions() -> None:
    """Those of the table `RELEASES`, and the one to pin is the newest."""
    newest = RELEASES[-1].versions[-1]
    assert f"| livekit-plugins-xai | {SUPPORTED} |" in README
    assert f"| Python | {noxfile.PYTHONS[0]} to {noxfile.PYTHONS[-1]} |" in README
    assert f"livekit-plugins-xai=={newest} livekit-agents=={newest}" in README
    last_without_pool = [
        release.versions[-1] for release in RELEASES if release.shape.value != "native pool"
    ][-1]
    assert f"| {RELEASES[0].versions[0]} to {last_without_pool} | patched |" in README


def test_the_readme_names_every_option_with_its_default() -> None:
    """And no option that is gone."""
    rows = dict(
        re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.split("## Options")[1], re.MULTILINE)
    )
    assert rows == {
        option.name: f'`"{option.default}"`'
        if isinstance(option.default, str)
        else str(option.default).removesuffix(".0")
        for option in dataclasses.fields(PoolOptions)
    }


def test_the_bounds_of_openai_are_those_of_the_matrix() -> None:
    """The first livekit-agents beside which openai 3 works."""
    [bound] = set(re.findall(r"Before (\S+) both LiveKit packages import `httpx`", README))
    before = [v for v in noxfile.PLUGINS if "openai<3" in noxfile.ENVIRONMENTS[f"plugin-{v}"]]
    assert f'Version("{bound}")' in (ROOT / "noxfile.py").read_text()
    assert all(noxfile.Version(v) < noxfile.Version(bound) for v in before)


def test_the_limit_of_sessions_is_said_once() -> None:
    """As the options check it."""
    text = (ROOT / "docs/sessions.md").read_text()
    assert re.findall(r"documentation says (\d+)", text) == [str(MAX_SESSIONS)]
