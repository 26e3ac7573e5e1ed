"""A log handler that runs the event loop again, as nest_asyncio lets an application do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

DEPTH = 3
"""Handlers within handlers."""
ITERATIONS = 5
"""Of the loop, at each record: what becomes ready meanwhile runs too."""


class RunsTheLoop(logging.Handler):
    """At each record, what is ready in the loop runs, and what comes of it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.depth = self.callbacks = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.depth == DEPTH:
            return
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is not None:
            asyncio.tasks._leave_task(loop, task)
        self.depth += 1
        try:
            for _ in range(ITERATIONS):
                self._run_once(loop)
        finally:
            self.depth -= 1
            if task is not None:
                asyncio.tasks._enter_task(loop, task)

    def _run_once(self, loop: Any) -> None:
        loop._process_events(loop._selector.select(0))
        for _ in range(len(loop._ready)):
            handle = loop._ready.popleft()
            loop.call_soon(lambda: None)  # the iteration under way counts on as many
            if not handle._cancelled:
                self.callbacks += 1
                handle._run()


@contextlib.contextmanager
def log_that_runs_the_loop() -> Iterator[RunsTheLoop]:
    """Adds such a handler for every record of the package."""
    logger = logging.getLogger("xai_pool_patch")
    before, handler = logger.level, RunsTheLoop()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
