"""A mark that the processes of one user on one machine see: a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..mark import Mark

T = TypeVar("T")

FOLDER = "xai_pool_patch"
"""In the user's runtime directory. In the folder for temporary files the user's number follows."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Neither through a link nor into a pipe that nobody writes. Windows has neither flag."""
_HAS_OWNERS = hasattr(os, "getuid")


class MachineStore:
    """A file for each API key, in a folder that belongs to the user alone.

    The time stamp of the file is the end of the mark, and its content the length. As long as the
    time stamp is the same, a look is one `stat`.

    All I/O happens in one thread of the store's own. A disk that hangs blocks that thread, neither
    an event loop nor the threads that the application's `asyncio.to_thread` shares.

    Args:
        folder: made by the first write. None: `xai_pool_patch` in the user's runtime directory,
            else in the folder for temporary files.

    Raises:
        PermissionError: from `read` and `write`, if the folder or the file is somebody else's, can
            be written by others, or is a link.
        OSError: from `read` and `write`, if the folder or the file cannot be used.
        ValueError: from `read`, if the file's content is not a number.
    """

    name = "machine"
    interval = 1.0

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="xai_pool_patch")
        self._last: dict[str, tuple[int, Mark]] = {}

    async def read(self, digest: str) -> Mark | None:
        return await self._in_thread(lambda: self._read(digest))

    async def write(self, digest: str, mark: Mark) -> None:
        await self._in_thread(lambda: self._write(digest, mark))

    async def aclose(self) -> None:
        """Do nothing: no file stays open, and the thread ends with the store."""

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read(self, digest: str) -> Mark | None:
        path = self._path_of(digest)
        try:
            found = path.lstat()
            changed_ns, mark = self._last.get(digest, (None, None))
            if changed_ns != found.st_mtime_ns:
                changed_ns, mark = self._read_anew(path)
                self._last[digest] = changed_ns, mark
        except FileNotFoundError:
            _check_writable(path.parent)
            return None
        return mark

    def _read_anew(self, path: Path) -> tuple[int, Mark]:
        _check(path.parent.lstat(), stat.S_ISDIR)
        # Both from one open file: another process may replace it at any moment.
        file = os.open(path, os.O_RDONLY | _NO_LINKS)
        try:
            found = os.fstat(file)
            _check(found, stat.S_ISREG)
            length = float(os.read(file, 64))
        finally:
            os.close(file)
        return found.st_mtime_ns, Mark(found.st_mtime_ns / 1e9, length)

    def _write(self, digest: str, mark: Mark) -> None:
        path = self._path_of(digest)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        _check(path.parent.lstat(), stat.S_ISDIR)
        file, name = tempfile.mkstemp(prefix=f"{digest}.", dir=path.parent)
        written = Path(name)
        try:
            try:
                os.write(file, repr(mark.length).encode())
            finally:
                os.close(file)
            # Before the file gets its name: a reader must not see the time of writing as the end.
            os.utime(written, (mark.until, mark.until))
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise

    def _path_of(self, digest: str) -> Path:
        if self._folder is None:  # looking for a temporary folder may be I/O: not in __init__
            self._folder = _own_folder()
        return self._folder / digest


def _own_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime, FOLDER)
    # Windows has a folder for temporary files for each user.
    user = f"-{os.getuid()}" if _HAS_OWNERS else ""
    return Path(tempfile.gettempdir(), f"{FOLDER}{user}")


def _check_writable(folder: Path) -> None:
    """
    Raises:
        PermissionError: there is no mark because nobody could leave one.
    """
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK):
        raise PermissionError("not writable")


def _check(found: os.stat_result, is_expected_type: Callable[[int], bool]) -> None:
    """
    Raises:
        PermissionError: it is of another type, somebody else's, or writable by others.
    """
    if not is_expected_type(found.st_mode):
        raise PermissionError("not of the expected type")
    if _HAS_OWNERS and found.st_uid != os.getuid():
        raise PermissionError("somebody else's")
    if _HAS_OWNERS and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("writable by others")
