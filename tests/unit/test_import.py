"""What `import xai_pool_patch` costs an application that may never use it."""

from __future__ import annotations

import subprocess
import sys

MEASURE = """
import sys
before = set(sys.modules)
import xai_pool_patch
print(*sys.modules.keys() - before)
"""
HEAVY = {"asyncio", "concurrent", "email", "hashlib", "http", "random", "ssl", "urllib"}
"""Of the standard library: what the patch needs later, and an application most likely has."""


def test_importing_the_package_imports_neither_livekit_nor_anything_slow() -> None:
    """An application that never uses the patch pays nothing for it."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=60
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported - sys.stdlib_module_names == {"xai_pool_patch"}
    assert imported & HEAVY == set()
