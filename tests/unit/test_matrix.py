"""The package declares the versions that the matrix tests, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nox.project
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import noxfile
from xai_pool_patch import python
from xai_pool_patch.plugin import releases

ROOT = Path(noxfile.__file__).parent
PINNED = sorted((ROOT / "constraints").iterdir())
TOML: dict[str, Any] = nox.project.load_toml(ROOT / "pyproject.toml")
PROJECT: dict[str, Any] = TOML["project"]
TOOLS = [Requirement(tool) for tool in TOML["dependency-groups"]["dev"]]
REQUIRED = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["redis"]
DECLARED = {r.name: r.specifier for r in map(Requirement, REQUIRED)}


def pins(environment: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{environment}.txt").read_text().splitlines()
    return dict(line.split(" ;")[0].split("==") for line in lines)


@pytest.mark.parametrize("package", ["livekit-plugins-xai", "livekit-agents"])
def test_pip_accepts_releases_from_the_first_tested_to_the_next_major(package: str) -> None:
    """install(), not pip, refuses what is newer than the last tested one."""
    assert DECLARED[package] == SpecifierSet(f">={noxfile.PLUGINS[0]},<2")
    assert Version(noxfile.PLUGINS[-1]) in DECLARED[package]


def test_the_verified_releases_are_those_from_the_first_tested_to_the_last() -> None:
    """In the table that install() uses, each of whose rows is tested, and in the README."""
    verified = [version for release in releases.RELEASES for version in release.versions]
    assert verified == sorted(verified, key=Version)
    assert (verified[0], verified[-1]) == (noxfile.PLUGINS[0], noxfile.PLUGINS[-1])
    for release in releases.RELEASES:
        assert set(release.versions) & set(noxfile.PLUGINS)
    readme = (ROOT / "README.md").read_text()
    for package in ("livekit-plugins-xai", "livekit-agents"):
        assert f"| {package} | {releases.SUPPORTED}" in readme


@pytest.mark.parametrize("floor", noxfile.FLOORS)
def test_the_lowest_declared_versions_are_tested(floor: str) -> None:
    """In the environments whose name ends in `floors`."""
    package, lowest = floor.split("==")
    assert f">={lowest}" in map(str, DECLARED[package])


def test_every_dependency_has_a_lowest_version_in_the_matrix() -> None:
    """Unless livekit-agents sets it."""
    floors = {floor.split("==")[0] for floor in noxfile.FLOORS}
    set_by_agents = {package for package, declared in DECLARED.items() if not declared}
    assert set(DECLARED) - set_by_agents == floors | {"livekit-plugins-xai", "livekit-agents"}
    assert set_by_agents == {"prometheus-client"}


def test_the_declared_pythons_are_those_tested() -> None:
    """In pyproject.toml, install() and the README, each with both thorough plugins, and besides
    them the machine's own."""
    first, last = noxfile.PYTHONS[0], noxfile.PYTHONS[-1]
    beyond = f"3.{int(last.split('.')[1]) + 1}"
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={first},<{beyond}")
    said = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert said == noxfile.PYTHONS
    assert f"{first} to {last}" == python.SUPPORTED
    assert f"| Python | {python.SUPPORTED} |" in (ROOT / "README.md").read_text()
    for version in noxfile.THOROUGH:
        run = {name for name, environment in noxfile.RUNS if environment == f"plugin-{version}"}
        assert run == {*noxfile.PYTHONS, noxfile.SYSTEM}


def test_each_environment_has_a_constraints_file_and_each_file_an_environment() -> None:
    """No file is left over, and none is missing."""
    assert {file.stem for file in PINNED} == set(noxfile.ENVIRONMENTS)
    assert {environment for _, environment in noxfile.RUNS} == set(noxfile.ENVIRONMENTS)


@pytest.mark.parametrize("environment", noxfile.ENVIRONMENTS)
def test_a_constraints_file_pins_what_its_environment_fixes(environment: str) -> None:
    """A file edited by hand could differ."""
    pinned = pins(environment)
    for requirement in map(Requirement, noxfile.ENVIRONMENTS[environment]):
        assert pinned[requirement.name] in requirement.specifier


@pytest.mark.parametrize("environment", noxfile.ENVIRONMENTS)
def test_a_constraints_file_pins_the_development_tools(environment: str) -> None:
    """Each in a version that the dependency group allows."""
    pinned = pins(environment)
    for tool in TOOLS:
        assert pinned[tool.name] in tool.specifier


def test_all_environments_but_the_floors_pin_the_same_version() -> None:
    """One of each dependency, above its floor."""
    for floor in noxfile.FLOORS:
        package, lowest = floor.split("==")
        (newest,) = {pins(e)[package] for e in noxfile.ENVIRONMENTS if not e.endswith("floors")}
        assert newest in SpecifierSet(f">{lowest}")


@pytest.mark.parametrize("file", PINNED, ids=lambda file: file.stem)
def test_no_constraints_file_names_a_package_index(file: Path) -> None:
    """Whoever installs from it has one."""
    assert not [line for line in file.read_text().splitlines() if "==" not in line or "//" in line]
