"""Processes of their own, which run one function after another for the benchmark."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from xai_pool_patch.telemetry.log import describe

PRELOADED = "benchmarks.runs"
"""Takes two seconds to import, with the framework: a dozen processes share that."""


class HelperFailedError(Exception):
    """A function failed in a helper's process. The message says which and why."""


@dataclass(frozen=True)
class _Failure:
    """Takes the place of a result."""

    reason: str


class Helper:
    """A process of its own, which runs one function after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._pipe, its_end = context.Pipe()
        self._process = context.Process(target=_help, args=(its_end,), daemon=True)
        with _ctrl_c_ignored():
            self._process.start()
        its_end.close()

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._pipe.send((function, args, kwargs))

    def result(self) -> Any:
        """What the function that was begun returned.

        Raises:
            HelperFailedError: it raised an exception, or the process has died.
        """
        try:
            result = self._pipe.recv()
        except EOFError:
            result = _Failure("a process of the bench has died")
        if isinstance(result, _Failure):
            raise HelperFailedError(result.reason)
        return result

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.begin(function, *args, **kwargs)
        return self.result()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _help(pipe: Pipe) -> None:
    """What a helper does until the pipe is closed."""
    logging.disable()  # what goes wrong is part of the result
    with contextlib.suppress(EOFError):
        while True:
            function, args, kwargs = pipe.recv()
            # A full collection of all that has been imported by now takes 0.1 s, and would hit
            # one subject or the other by chance.
            gc.collect()
            gc.freeze()
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                result = _Failure(f"{_name(function)} failed: {describe(error)}")
            pipe.send(result)


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return function.__name__


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A process that starts meanwhile ignores it for good: it is for us to end that one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
