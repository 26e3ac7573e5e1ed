"""`xai-pool-patch check`: whether the installed plugin can be patched, and why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.demo.test_demo import COMMAND, command, environment
from tests.kit import SHAPE, VERSION
from xai_pool_patch.plugin.releases import MODULE

EDITED = f"""
import sys
from livekit.plugins.xai import tts
{{edit}}
sys.modules[{MODULE!r}] = tts
from xai_pool_patch.__main__ import main
main()
"""


def check(edit: str = "", **changes: str) -> tuple[int, list[str], str]:
    program = [*COMMAND[:1], "-c", EDITED.format(edit=edit)] if edit else COMMAND
    done = command("check", program=program, **changes)
    return done.returncode, done.stdout.splitlines(), done.stderr.strip()


def installed(folder: Path, distribution: str, version: str) -> None:
    """Let the metadata say that this version is installed."""
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)


def test_the_installed_plugin() -> None:
    """It passes: version, shape, whether the file is the published one, and what to do next."""
    assert check() == (
        0,
        [
            f"found: livekit-plugins-xai {VERSION}",
            f"shape: {SHAPE.value}",
            "file: as published",
            "can be patched: everything that is wrapped or relied on is as expected",
            "with a key, xai-pool-patch probe asks xAI what the patch assumes of its service",
        ],
        "",
    )


def test_an_edited_plugin_fails() -> None:
    """One line names what differs."""
    code, _, reason = check("del tts.TTS._close_ws")
    assert code == 1
    assert "cannot be patched" in reason
    assert "TTS._close_ws is missing" in reason


def test_an_unverified_plugin_fails(tmp_path: Path) -> None:
    """The message says how to use it all the same."""
    installed(tmp_path, "livekit_plugins_xai", "1.8.99")
    code, found, reason = check(PYTHONPATH=str(tmp_path))
    assert (code, found) == (1, ["found: livekit-plugins-xai 1.8.99"])
    assert "install(allow_unverified=True) takes it" in reason


def test_a_plugin_that_cannot_be_imported_fails(tmp_path: Path) -> None:
    """Older versions lack httpx beside openai 3."""
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('No module named aiohttp')")
    code, _, reason = check(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "cannot be imported: ModuleNotFoundError: No module named aiohttp" in reason


@pytest.mark.parametrize(
    ("agents", "remedy"),
    [
        ("1.5.2", 'pip install "openai<3"'),
        ("1.8.6", 'pip install "openai<3"'),
        ("1.8.7", "pip install httpx"),
        ("1.10.0", "pip install httpx"),
    ],
)
@pytest.mark.parametrize("asked", ["check", "demo"])
def test_a_missing_httpx_has_its_own_remedy(
    asked: str, agents: str, remedy: str, tmp_path: Path
) -> None:
    """Plugins up to 1.8.6 import it. openai 2 brings it, which later livekit-agents do not take."""
    without = "raise ModuleNotFoundError(\"No module named 'httpx'\", name='httpx')"
    (tmp_path / "aiohttp.py").write_text(without)
    installed(tmp_path, "livekit_agents", agents)
    done = command(asked, PYTHONPATH=str(tmp_path))
    assert done.returncode in (1, 2)
    assert done.stderr.rstrip().endswith(f": {remedy}")


@pytest.mark.parametrize("value", ["off", "0"])
def test_the_environment_variable_is_reported(value: str) -> None:
    """An operator who looks for the reason finds it."""
    code, _, reason = check(XAI_POOL_PATCH=value)
    assert code == 1
    assert f"XAI_POOL_PATCH={value} keeps the patch out" in reason


@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize("words", [["check"], ["--help"]])
def test_a_reader_may_leave(words: list[str], buffering: str) -> None:
    """As `head -1` does: no traceback, and no wrong reason."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [*COMMAND, *words],
            env=environment(PYTHONUNBUFFERED=buffering),
            stdout=nobody,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "")
