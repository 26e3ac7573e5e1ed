"""What functions look like, in a module that is imported or in the file of one that is not.

A file is read and not run: importing the plugin registers it, and only the application may do that.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, NamedTuple

NAMESPACE = "livekit.plugins"
"""A package, like its parent, without a file of its own: importing it runs nothing."""


@dataclass(frozen=True)
class Imported:
    """A module as it is now, with all changes since its import."""

    module: ModuleType

    def function(self, owner: str, name: str) -> CodeType | None:
        scope: Any = getattr(self.module, owner, object) if owner else self.module
        unwrapped = inspect.unwrap(vars(scope).get(name))  # others may have wrapped it
        code = getattr(unwrapped, "__code__", None)
        return code if isinstance(code, CodeType) else None

    def overrides(self, owner: str, name: str) -> bool:
        """A wrapper around the inherited method does not count."""
        type_ = getattr(self.module, owner, object)
        defined = [vars(base)[name] for base in type_.__mro__ if name in vars(base)]
        return name in vars(type_) and len({inspect.unwrap(each) for each in defined}) > 1


@dataclass(frozen=True)
class InFile:
    """A module as its file has it."""

    code: CodeType

    def has(self, owner: str) -> bool:
        return not owner or _inner(self.code, owner) is not None

    def function(self, owner: str, name: str) -> CodeType | None:
        scope = _inner(self.code, owner) if owner else self.code
        return _inner(scope, name) if scope is not None else None

    def overrides(self, owner: str, name: str) -> bool:
        return self.function(owner, name) is not None


View = Imported | InFile
"""A module, imported or not. An owner is a class of it, or "" for the module itself."""


class Method(NamedTuple):
    """What a function must look like that the patch wraps or relies on."""

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    """None if they do not matter."""
    is_coroutine: bool
    uses: frozenset[str]

    @classmethod
    def of(cls, line: str) -> Method:
        """Read `async Owner.name(parameters): names that it uses`. Only a name is always there."""
        signature, _, uses = line.strip().partition(": ")
        path, is_given, parameters = signature.removeprefix("async ").rstrip(")").partition("(")
        owner, _, name = path.rpartition(".")
        taken = tuple(parameters.split(", ")) if is_given else None
        return cls(owner, name, taken, signature.startswith("async "), frozenset(uses.split()))

    def difference(self, view: View) -> str | None:
        where = f"{self.owner}.{self.name}".lstrip(".")
        code = view.function(self.owner, self.name)
        if code is None:
            return f"{where} is missing"
        named, *variadic = inspect.getargs(code)
        parameters = (*named, *filter(None, variadic))
        if self.parameters not in (None, parameters):
            return f"{where} takes {parameters}, not {self.parameters}"
        if bool(code.co_flags & inspect.CO_COROUTINE) != self.is_coroutine:
            return f"{where} is {'not ' if self.is_coroutine else ''}a coroutine function"
        unused = self.uses.difference(code.co_names)
        return f"{where} does not use {', '.join(sorted(unused))}" if unused else None


def methods_by_title(text: str) -> dict[str, list[Method]]:
    """Read titles, and below each its methods, which are indented."""
    parts = (part.splitlines() for part in re.split(r"\n(?=\S)", text.strip()))
    return {title: [Method.of(line) for line in lines] for title, *lines in parts}


def differences_of(view: View, methods: list[Method]) -> list[str]:
    return [difference for each in methods if (difference := each.difference(view))]


def _inner(code: CodeType, name: str) -> CodeType | None:
    """The code of a class or function that other code defines. The last one counts."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return next((each for each in reversed(inner) if each.co_name == name), None)


def code_of(name: str) -> CodeType | None:
    """The code of a module, which is not imported for that; None if it cannot be read."""
    try:
        loader: Any = getattr(find(name), "loader", None)
        code = loader.get_code(name)
    except Exception:  # of a loader of the application's own, or of a file with an error
        return None
    return code if isinstance(code, CodeType) else None


def find(name: str) -> ModuleSpec | None:
    """Find a module as an import would. None if there is none.

    `importlib.util.find_spec` would import the packages above it.
    """
    try:
        return _find(name)
    except Exception:  # of a finder of the application's own, as frozen ones have
        return None


def _find(name: str) -> ModuleSpec | None:
    module = sys.modules.get(name)
    if module is not None and module.__spec__ is not None:
        return module.__spec__
    path = None
    if parent := name.rpartition(".")[0]:
        above = _find(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        if above.origin is None and NAMESPACE.startswith(parent):
            importlib.import_module(parent)  # the path of one inside another needs it
        path = list(above.submodule_search_locations)
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
