"""What an application gets. `make matrix` runs this where the wheel is and its source is not."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import xai_pool_patch

INSTALLED = importlib.metadata.distribution("xai_pool_patch")
FILES = [file for file in INSTALLED.files or [] if file.suffix != ".pyc"]


def test_it_is_the_wheel_that_is_tested() -> None:
    """And not a source tree at hand."""
    assert Path(xai_pool_patch.__file__).is_relative_to(sysconfig.get_path("purelib"))


def test_it_holds_the_package_and_nothing_else() -> None:
    """No test, example or benchmark; no name in site-packages that others may use as well."""
    package = [file for file in FILES if file.parts[0] == "xai_pool_patch"]
    assert {file.suffix for file in package} == {".py", ".typed"}
    assert not any("bench" in str(file) for file in package)
    others = {file.parts[0] for file in FILES} - {"xai_pool_patch"}
    assert others == {f"xai_pool_patch-{INSTALLED.version}.dist-info", ".."}
    assert [file.name for file in FILES if file.parts[0] == ".."] == ["xai-pool-patch"]


def test_it_brings_the_fake_server() -> None:
    """With an extra of its own: people's tests need it, and their applications do not."""
    files = set(map(str, FILES))
    assert {f"xai_pool_patch/testing/{name}.py" for name in ("__init__", "fixtures")} <= files
    assert "testing" in INSTALLED.metadata.get_all("Provides-Extra")


def test_it_is_typed() -> None:
    """A type checker takes the annotations only with this file."""
    assert "xai_pool_patch/py.typed" in map(str, FILES)


def test_it_brings_its_licence() -> None:
    """By name and in full."""
    assert INSTALLED.metadata["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in {file.name for file in FILES}


def test_its_description_has_no_dead_link() -> None:
    """A package index shows it, beside none of this repository's files."""
    text = str(INSTALLED.metadata.get_payload() or INSTALLED.metadata["Description"])
    assert "## Do I need this?" in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link] == []


def test_its_version_is_the_one_in_its_metadata() -> None:
    """The version is said in one place."""
    assert INSTALLED.version == xai_pool_patch.__version__


@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sys.executable).with_name("xai-pool-patch"))],
        [sys.executable, "-m", "xai_pool_patch"],
    ],
)
def test_its_command(command: list[str]) -> None:
    """Under either name."""
    output = subprocess.check_output([*command, "--version"], text=True, timeout=60)
    assert output == f"xai_pool_patch {INSTALLED.version}\n"
