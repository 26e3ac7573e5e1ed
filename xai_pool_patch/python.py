"""The Pythons that are supported. Older ones can read this file, and print why they are refused.

Run by itself, as the Makefile does, it says on stderr what is wrong with the Python that runs it.
"""

from __future__ import annotations

import sys

FIRST, LAST = (3, 10), (3, 14)


def unsupported(found: tuple[int, ...] = sys.version_info[:3]) -> str | None:
    """What there is to say of that version of Python; None if it is supported."""
    if FIRST <= found[:2] <= LAST:
        return None
    return f"found Python {_written(found)}; xai_pool_patch supports {SUPPORTED}"


def check_python() -> None:
    """
    Raises:
        UnsupportedPluginError: this Python is not supported.
    """
    from .errors import UnsupportedPluginError

    if (reason := unsupported()) is not None:
        raise UnsupportedPluginError(reason)


def _written(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


SUPPORTED = f"{_written(FIRST)} to {_written(LAST)}"

if __name__ == "__main__":
    sys.exit(unsupported())
if sys.version_info[:2] < FIRST:  # other modules would fail on it, in less plain words
    raise ImportError(unsupported())
