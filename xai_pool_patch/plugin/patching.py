"""One attribute of one class of the plugin, and what replaces it.

What is changed is kept as data, one record each, so that putting in and taking out walk the same
list.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..telemetry.log import LogEvent, log_event


class _Missing(enum.Enum):
    MISSING = "missing"


@dataclass(eq=False)
class Patch:
    """One attribute of one class, and what stands in for it.

    Args:
        make_wrapper: makes it from what there was, and from the switch.
        after: what else there is to undo.
        switch: not empty while what stands in is to be used. wrapt looks at it in each call; a list
            needs no call of ours, which could fail.
    """

    owner: type
    name: str
    make_wrapper: Callable[[Any, list[str]], Any]
    after: Callable[[], None] = lambda: None
    switch: list[str] = field(default_factory=list)
    _original: Any = _Missing.MISSING
    _ours: Any = None

    def apply(self) -> None:
        self._original = vars(self.owner).get(self.name, _Missing.MISSING)
        inherited = getattr(self.owner, self.name, None)
        self._ours = self.make_wrapper(inherited, self.switch)
        setattr(self.owner, self.name, self._ours)
        self.switch.append("on")

    def undo(self) -> None:
        """Takes out what is ours. Beneath somebody else's wrapper it only passes through."""
        self.switch.clear()
        try:
            if vars(self.owner).get(self.name) is not self._ours:
                log_event(LogEvent.COVERED, attribute=f"{self.owner.__name__}.{self.name}")
            elif self._original is _Missing.MISSING:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._original)
        finally:
            self.after()
