"""`xai-pool-patch check`: whether the installed plugin can be patched, and why."""

from __future__ import annotations

from pathlib import Path

from tests.demo.test_demo import COMMAND, command
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


def test_the_installed_plugin() -> None:
    """It passes: version, shape, whether the file is the published one, and what to do next."""
    assert check() == (
        0,
        [
            f"found: livekit-plugins-xai {VERSION}",
            f"shape: {SHAPE.value}",
            "file: as published",
            "can be patched: everything that is wrapped or relied on is as expected",
            "with a key, xai-pool-patch probe asks xAI what the patch supposes of its service",
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
    info = tmp_path / "livekit_plugins_xai-1.8.99.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: livekit-plugins-xai\nVersion: 1.8.99\n"
    (info / "METADATA").write_text(metadata)
    code, found, reason = check(PYTHONPATH=str(tmp_path))
    assert (code, found) == (1, ["found: livekit-plugins-xai 1.8.99"])
    assert "install(allow_unverified=True) takes it" in reason


def test_a_plugin_that_cannot_be_imported_fails(tmp_path: Path) -> None:
    """Older versions lack httpx beside openai 3."""
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('No module named aiohttp')")
    code, _, reason = check(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "cannot be imported: ModuleNotFoundError: No module named aiohttp" in reason


def test_the_environment_variable_is_reported() -> None:
    """An operator who looks for the reason finds it."""
    code, _, reason = check(XAI_POOL_PATCH="off")
    assert code == 1
    assert "XAI_POOL_PATCH=off keeps the patch out" in reason
