"""Replaces and restores one attribute of one class of the plugin.

Each change is one record, so that installing and uninstalling walk the same list.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import wrapt

from ..telemetry.log import LogEvent, log_event


class Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """One of ours. It may stay behind, switched off, where another wrapper covered it."""


class _Missing(enum.Enum):
    MISSING = "missing"


@dataclass(eq=False)
class Patch:
    """One attribute of one class, and its replacement.

    Args:
        make_wrapper: makes the replacement from the attribute and the switch.
        switch: not empty while the replacement is in use. wrapt looks at it in each call. It is a
            list because that needs no call of ours, which could fail.
    """

    owner: type
    name: str
    make_wrapper: Callable[[Any, list[str]], Any]
    switch: list[str] = field(default_factory=list)
    _original: Any = _Missing.MISSING
    _ours: Any = None

    def apply(self) -> None:
        self._original = vars(self.owner).get(self.name, _Missing.MISSING)
        is_inherited = self._original is _Missing.MISSING
        # Not with getattr() if it need not be: that would bind a wrapper that is there already.
        wrapped = getattr(self.owner, self.name, None) if is_inherited else self._original
        self._ours = self.make_wrapper(wrapped, self.switch)
        # Before the attribute is set: another thread that reads `TTS._pool` in between would see
        # the switch off, and that attribute would stay off.
        self.switch.append("on")
        setattr(self.owner, self.name, self._ours)

    def undo(self) -> None:
        """Restore the attribute. Beneath a foreign wrapper, ours stays and passes through."""
        self.switch.clear()
        if vars(self.owner).get(self.name) is not self._ours:
            log_event(LogEvent.COVERED, attribute=f"{self.owner.__name__}.{self.name}")
        elif self._original is _Missing.MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._original)
