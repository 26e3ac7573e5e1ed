"""A shortage that the processes of one user on one machine see: the time stamp of a file."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from .store import Store

FOLDER = "xai_pool_patch"
"""In the user's runtime directory. In the folder for temporary files the user's number follows."""

_HAS_OWNERS = hasattr(os, "getuid")


class MachineStore(Store):
    """An empty file for each host, in a folder that is the user's alone. Its time stamp is the end.

    Args:
        folder: None for one in the user's runtime directory, else among the temporary files. Two
            folders for temporary files, as two containers have, do not know of each other.

    Raises:
        PermissionError: the folder or the file belongs to another user, is a link, or is writable
            by others.
        OSError: it cannot be used.
    """

    name = "machine"

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def _read(self, name: str) -> float | None:
        path = self._path(name)
        try:
            _checked(path.parent, stat.S_ISDIR)
            return _checked(path, stat.S_ISREG).st_mtime
        except FileNotFoundError:
            return None

    def _write(self, name: str, until: float) -> None:
        path = self._path(name)
        new = _new_file(path)
        try:
            # Before the file gets its name: until then its time stamp is no end.
            os.utime(new, (until, until))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)  # after replace() there is none

    def _probe(self, name: str) -> None:
        _new_file(self._path(name)).unlink()

    def _path(self, name: str) -> Path:
        # Looking for a temporary folder is I/O: not in __init__.
        self._folder = self._folder or _own_folder()
        return self._folder / name


def _own_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime, FOLDER)
    # Windows has a folder for temporary files for each user.
    user = f"-{os.getuid()}" if _HAS_OWNERS else ""
    return Path(tempfile.gettempdir(), f"{FOLDER}{user}")


def _new_file(path: Path) -> Path:
    """An empty file beside that path."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _checked(path.parent, stat.S_ISDIR)
    file, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    os.close(file)
    return Path(name)


def _checked(path: Path, is_expected_type: Callable[[int], bool]) -> os.stat_result:
    """
    Raises:
        PermissionError: it is of another type, belongs to another user, or is writable by others.
    """
    found = path.lstat()
    if not is_expected_type(found.st_mode):
        raise PermissionError("not of the expected type")
    if _HAS_OWNERS and found.st_uid != os.getuid():
        raise PermissionError("belongs to another user")
    if _HAS_OWNERS and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("writable by others")
    return found
