"""Which Pythons are accepted, and the message for all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xai_pool_patch import python
from xai_pool_patch.python import unsupported

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "Makefile"


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 12, 3), (3, 14, 99)])
def test_each_supported_python_is_accepted(version: tuple[int, ...]) -> None:
    """Whatever its third number."""
    assert unsupported(version) is None


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 15, 0), (4, 0, 0)])
def test_any_other_python_is_refused(version: tuple[int, ...]) -> None:
    """The message names the version found and the supported ones."""
    found = ".".join(map(str, version))
    assert unsupported(version) == f"found Python {found}; xai_pool_patch supports 3.10 to 3.14"


def on_an_older_one(code: str) -> str:
    pretend = f"import sys; sys.version_info = (3, 9, 18, 'final', 0); {code}"
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


REFUSAL = "found Python 3.9.18; xai_pool_patch supports 3.10 to 3.14"


def test_an_older_python_gets_one_line_at_import() -> None:
    """Before anything is imported that such a Python cannot import."""
    assert on_an_older_one("import xai_pool_patch").splitlines()[-1] == f"ImportError: {REFUSAL}"


def test_an_older_python_gets_one_line_from_make() -> None:
    """The Makefile runs python.py, before pip prints its many lines."""
    assert f"$(PYTHON) {Path(python.__file__).relative_to(ROOT)}\n" in MAKEFILE.read_text()
    run = f"import runpy; runpy.run_path({python.__file__!r}, run_name='__main__')"
    assert on_an_older_one(run) == f"{REFUSAL}\n"
