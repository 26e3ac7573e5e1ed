"""Fixtures, and the rule that no test leaves anything behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import xai_pool_patch
from tests.clock import VirtualLoop, real_time_loop
from xai_pool_patch.telemetry import log


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-turns", type=int, default=2000, help="turns of tests/live/test_soak.py"
    )
    parser.addoption(
        "--allow-unverified",
        action="store_true",
        help="take releases of LiveKit that nobody has read: install() takes them by default",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--allow-unverified"):
        xai_pool_patch.install.__kwdefaults__["allow_unverified"] = True
    if sys.version_info < (3, 11):
        # Python 3.10 says this of every TLS connection that the peer ended.
        unclosed = "ignore:unclosed transport <asyncio.sslproto:ResourceWarning"
        config.addinivalue_line("filterwarnings", unclosed)


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"loop": real_time_loop if item.get_closest_marker("real_time") else VirtualLoop}


def pytest_collection_finish() -> None:
    # Every test ends with a collection: without LiveKit's 200,000 objects it takes no time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def patched(request: pytest.FixtureRequest) -> Iterator[None]:
    """The patch with its default options, or with those that the fixture is parametrized with."""
    xai_pool_patch.install(getattr(request, "param", None))
    yield
    xai_pool_patch.uninstall()


@pytest.fixture(autouse=True)
def not_installed_afterwards() -> Iterator[None]:
    yield
    was_left = xai_pool_patch.is_installed()
    xai_pool_patch.uninstall()  # one test that fails is enough
    assert not was_left, "the test left the patch installed"


@pytest.fixture(autouse=True)
def a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No refusal of another test, whose host is the same, nor of what else runs here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


class _CapLog(pytest.LogCaptureFixture):
    """With what the running loop has yet to emit."""

    @property
    def records(self) -> list[logging.LogRecord]:
        log.flush()
        return super().records

    def clear(self) -> None:
        log.flush()
        super().clear()


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.__class__ = _CapLog
    return caplog


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_of_unpatched(record.exc_info[1] if record.exc_info else None):
            self.messages.append(record.getMessage())


def _is_of_unpatched(error: BaseException | None) -> bool:
    """A probe of a `FallbackAdapter` has outlived the HTTP session, without the patch."""
    if not isinstance(error, RuntimeError) or str(error) != "Session is closed":
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return not any("/xai_pool_patch/plugin/" in frame.filename for frame in frames)


@pytest.fixture(autouse=True)
def nothing_to_complain() -> Iterator[None]:
    """No "Task was destroyed", no unclosed session, no exception that nobody retrieved."""
    complaints = _Complaints()
    logging.getLogger("asyncio").addHandler(complaints)
    yield
    gc.collect()
    logging.getLogger("asyncio").removeHandler(complaints)
    assert complaints.messages == []


@pytest.fixture
async def no_tasks_left() -> AsyncIterator[None]:
    """For tests that close all they opened: nothing of it may go on in the background."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert left == set()
