"""Which Pythons are taken, and what the others are told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xai_pool_patch.python import unsupported


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 12, 3), (3, 14, 99)])
def test_supported(version: tuple[int, ...]) -> None:
    """With whatever third number."""
    assert unsupported(version) is None


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 15, 0), (4, 0, 0)])
def test_unsupported(version: tuple[int, ...]) -> None:
    """What was found, and what would do."""
    found = ".".join(map(str, version))
    assert unsupported(version) == f"found Python {found}; xai_pool_patch supports 3.10 to 3.14"


def test_an_older_one_is_told_at_import() -> None:
    """In one line, ahead of everything that such a Python cannot import."""
    pretend = "import sys; sys.version_info = (3, 9, 18, 'final', 0); import xai_pool_patch"
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert done.returncode == 1
    told = "ImportError: found Python 3.9.18; xai_pool_patch supports 3.10 to 3.14"
    assert done.stderr.splitlines()[-1] == told
