"""Replaces and restores one attribute of one class of the plugin.

Each change is one record, so that installing and uninstalling walk the same list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import wrapt

from ..telemetry.log import LogEvent, log_event


class Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """One of ours. It may stay behind, switched off, where another wrapper covered it."""


_MISSING: Any = object()


@dataclass(eq=False)
class Patch:
    """One attribute of one class, and its replacement.

    Args:
        wrapper: is called in place of the attribute, with what it wraps, the instance and the
            arguments. None if a subclass has another replacement.
        switch: not empty while the replacement is in use. wrapt looks at it in each call. It is a
            list because that needs no call of ours, which could fail.
    """

    owner: type
    name: str
    wrapper: Any = None
    switch: list[str] = field(default_factory=list)
    _original: Any = _MISSING
    _ours: Any = None

    def apply(self) -> None:
        self._original = vars(self.owner).get(self.name, _MISSING)
        is_inherited = self._original is _MISSING
        # Not with getattr() if it need not be: that would bind a wrapper that is there already.
        wrapped = getattr(self.owner, self.name, None) if is_inherited else self._original
        self._ours = self.replacement(wrapped)
        # Before the attribute is set: another thread that reads `TTS._pool` in between would see
        # the switch off, and that attribute would stay off.
        self.switch.append("on")
        setattr(self.owner, self.name, self._ours)

    def replacement(self, original: Any) -> Any:
        return Wrapper(original, self._call, enabled=self.switch)  # type: ignore[arg-type]

    def _call(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Also for a call as a plain function, by code that took it from the class."""
        if instance is None:
            instance, *args = args
            wrapped = wrapped.__get__(instance)
        return self.wrapper(wrapped, instance, args, kwargs)

    def undo(self) -> None:
        """Restore the attribute. Beneath a foreign wrapper, ours stays and passes through."""
        self.switch.clear()
        if vars(self.owner).get(self.name) is not self._ours:
            log_event(LogEvent.COVERED, attribute=f"{self.owner.__name__}.{self.name}")
        elif self._original is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._original)
