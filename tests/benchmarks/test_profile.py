"""The calls of a warm turn: the one cost that a busy machine does not change."""

from __future__ import annotations

import re

from tests.benchmarks.test_bench import bench
from tests.kit import HAS_NATIVE_POOL

GOAL = 1.30 if HAS_NATIVE_POOL else 1.18
"""Times the calls of the unpatched plugin; without a native pool its handshakes count."""


def test_a_warm_turn_takes_few_calls() -> None:
    """And passes the lease on its way."""
    done = bench("profile")
    assert (done.returncode, done.stderr) == (0, "")
    [ratio] = re.findall(r": (\d\.\d\d) x\.", done.stdout)
    assert 0.8 < float(ratio) <= GOAL
    assert "Lease.receive" in done.stdout
