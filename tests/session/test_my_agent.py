"""`examples/test_my_agent.py`: run as somebody who has copied it would run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import xai_pool_patch

SOURCE = Path(__file__).parents[2] / "examples/test_my_agent.py"
WHERE_IT_IS_IMPORTED_FROM = Path(xai_pool_patch.__file__).parents[1]


def test_a_copy_of_the_example_test_passes(tmp_path: Path) -> None:
    """Alone in a directory, without configuration, so pytest-asyncio is in its strict mode."""
    shutil.copy(SOURCE, tmp_path)
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", "-q", "-rA"]
    done = subprocess.run(
        [*run, SOURCE.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(WHERE_IT_IS_IMPORTED_FROM)},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
