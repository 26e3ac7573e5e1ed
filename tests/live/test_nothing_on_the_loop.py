"""A7: after `install()` this package imports, compiles and opens nothing on an event loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit import python

TURNS = """
import asyncio, logging, sys
import xai_pool_patch
from livekit.plugins import xai
from tests.kit import API_KEY, line_to, speak
xai_pool_patch.install()
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)

OURS = xai_pool_patch.__path__[0]
WHOSE = (OURS, "/structlog/", "/rich/", "/prometheus_client/")
found = []

def audit(event, arguments):
    if event not in ("import", "open", "compile"):
        return
    if asyncio._get_running_loop() is None:
        return
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS + "/testing/"):
            return  # the server, which another machine would run
        if path.startswith("/") and any(part in path for part in WHOSE):
            found.append(f"{event} {arguments[0]!r} at {path}:{frame.f_lineno}")
            return
        if "/aiohttp/" in path or "/livekit/" in path or "/tests/" in path:
            return  # theirs: it would happen without the patch, too
        frame = frame.f_back

async def main():
    async with line_to() as line:
        sys.addaudithook(audit)
        EXTRA
        tts = line.tts()
        tts.prewarm()
        for text in ("First.", "Second.", "Third."):
            assert (await speak(tts, text)).error is None
        await tts.aclose()
        xai_pool_patch.stats()
    await asyncio.sleep(0.1)

asyncio.run(main())
print(*found, sep="\\n", file=sys.stderr)
"""


def found(extra: str, **environment: str) -> list[str]:
    done = python(TURNS.replace("EXTRA", extra), **environment)
    assert done.returncode == 0, done.stderr
    assert "reused a connection" in done.stdout
    return done.stderr.split("\n")[:-1]


@pytest.mark.parametrize("shared", [False, True], ids=["one process", "a shared directory"])
def test_nothing_is_imported_compiled_or_opened(shared: bool, tmp_path: Path) -> None:
    """Not for the first log record, and not for the metrics of a directory that all share."""
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if shared else {}
    assert [line for line in found("pass", **environment) if line] == []


def test_the_hook_notices() -> None:
    """An import on the loop by this package is found."""
    code = "from xai_pool_patch import _version as our"
    code += "; exec(compile('import this', our.__file__, 'exec'))"
    assert "import 'this'" in "\n".join(found(code))
