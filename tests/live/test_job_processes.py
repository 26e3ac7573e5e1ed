"""A real worker's page beside what `stats()` say in each of its jobs, and a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/prometheus"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are missing: apt-get install prometheus",
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def worker(folder: Path, *options: str, by: str = "variable") -> Iterator[int]:
    """The port of its page. In the block its jobs have ended, and it still runs."""
    port, shared = free_port(), folder / "shared"
    shared.mkdir()
    environment = dict(os.environ)
    if by == "variable":
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
    else:
        options = (*options, f"--directory={shared}")
    command = [sys.executable, "-m", "tests.live.worker", f"--folder={folder}", f"--port={port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        with process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline(), (folder / "log").read_text()
                yield port
            finally:
                process.kill()


def shown(page: str) -> dict[str, float]:
    """Sums over all labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@pytest.mark.parametrize("by", ["variable", "argument"])
@pytest.mark.parametrize("executor", ["process", "thread"])
def test_the_page_says_what_all_jobs_did(executor: str, by: str, tmp_path: Path) -> None:
    """Also one that was killed. `installed` is in the log of the worker and of each job."""
    with worker(tmp_path, f"--executor={executor}", by=by):
        page = shown((tmp_path / "page.txt").read_text())
        kinds = ("refused", "interrupted", "killed")
        stats = [json.loads((tmp_path / f"{kind}.json").read_text()) for kind in kinds]
    if executor == "thread":
        stats = stats[-1:]  # of the one process
    for name, statistic in {
        "connections_reused_total": "connections_reused",
        "connect_seconds_count": "connections_made",
        "dials_refused_total": "rate_limited",
    }.items():
        said = sum(each[statistic] for each in stats)
        assert page[f"xai_pool_patch_{name}"] == said > 0, name
    turns = page["xai_pool_patch_connections_reused_total"]
    turns += page["xai_pool_patch_connection_wait_seconds_count"]
    assert turns == 18
    assert page["xai_pool_patch_info"] == 1
    log = (tmp_path / "log").read_text().splitlines()
    told = [line.split()[0] for line in log if "xai_pool_patch" in line and " installed: " in line]
    assert len(told) == len(set(told)) == (4 if executor == "process" else 1)


@needs_prometheus
def test_the_rules_and_alerts() -> None:
    """By `promtool test rules`, and each alert in its test."""
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = (EXAMPLES / "alerts_test.yml").read_text()
    for line in (EXAMPLES / "alerts.yml").read_text().splitlines():
        if "alert:" in line:
            assert f"alertname: {line.split()[-1]}" in tested


CONFIG = """
global: {scrape_interval: 250ms, evaluation_interval: 250ms}
rule_files: [%s]
scrape_configs: [{job_name: w, static_configs: [{targets: ["127.0.0.1:%d"]}]}]
"""


def ask(port: int, query: str) -> list[Any]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=5.0) as response:
        return list(json.load(response)["data"]["result"])


def share(part: str, whole: str) -> str:
    query = f"sum(xai_pool_patch:{part}:increase15m) / sum(xai_pool_patch:{whole}:increase15m)"
    assert query in (ROOT / "docs/observability.md").read_text()
    return query


def queries() -> list[str]:
    """Those of the dashboard."""
    panels = json.loads((EXAMPLES / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@needs_prometheus
def test_a_real_prometheus_sees_the_truth(tmp_path: Path) -> None:
    """The two queries of the documentation, and each panel of the dashboard."""
    with worker(tmp_path) as port:
        config, own = tmp_path / "prometheus.yml", free_port()
        config.write_text(CONFIG % (EXAMPLES / "alerts.yml", port))
        prometheus = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{own}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            page = shown((tmp_path / "page.txt").read_text())
            waits = page["xai_pool_patch_connection_wait_seconds_count"]
            dials = 1 + page["xai_pool_patch_connect_seconds_count"]
            assert answer(own, share("waits", "acquisitions")) == pytest.approx(waits / 18)
            assert answer(own, share("refused", "dials")) == pytest.approx(1 / dials)
            for query in queries():
                assert ask(own, query), query
        finally:
            prometheus.kill()
            prometheus.wait()


def answer(port: int, query: str) -> float:
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            result = ask(port, query)
            if result:
                return float(result[0]["value"][1])
        time.sleep(0.25)
    raise AssertionError(f"no answer to {query}")
