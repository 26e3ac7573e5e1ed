"""The packages form layers: each module imports from lower layers only, and no imports circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import xai_pool_patch

ROOT = Path(xai_pool_patch.__file__).parent
NAME = xai_pool_patch.__name__

LAYERS = (
    {"__main__", "demo", "probe"},
    {"__init__"},
    {"installation"},
    {"plugin"},
    {"registry"},
    {"manager"},
    {"protocol"},
    {"sessions"},
    {"pool"},
    {"telemetry"},
    {"errors", "options", "python", "_version"},
)
"""From top to bottom."""

LEAVES = len(LAYERS) - 1

APART = "testing"
"""Of the package only the commands import it."""
KNOWS_THE_PATCH = "testing.patch"
"""Imports the public verbs; the rest of `testing` imports nothing of the package."""


def module_name(path: Path) -> str:
    """`pool.pool` for a module, `pool.__init__` for a package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def part_of(module: str) -> str:
    """The package or root module that a module belongs to."""
    return module.partition(".")[0]


def layer_of(module: str) -> int:
    """Counted from the top."""
    [layer] = [number for number, parts in enumerate(LAYERS) if part_of(module) in parts]
    return layer


def absolute_names(module: str, code: str) -> Iterator[str]:
    """Everything that the code of a module imports, wherever the import stands."""
    package = [NAME, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = [*start, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def own_modules(module: str, code: str) -> set[str]:
    """The modules of this package that the code of a module imports."""
    found = set()
    for name in absolute_names(module, code):
        top, *parts = name.split(".")
        if top != NAME:
            continue
        candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        candidates = [each for name in candidates for each in (name, f"{name}.__init__")]
        found.add(next((each for each in candidates if each in MODULES), "__init__"))
    return found - {module}


IMPORTS = {name: own_modules(name, path.read_text()) for name, path in MODULES.items()}


def test_every_kind_of_import_counts() -> None:
    """Relative, absolute, of a package, inside a function, and for type checking only."""
    code = """
import xai_pool_patch
from . import backoff
from .supervisor import spawn
from .. import telemetry
if TYPE_CHECKING:
    from ..registry import Registry
def late():
    from xai_pool_patch.protocol import lease
    import aiohttp.web
"""
    assert own_modules("pool.pool", code) == {
        "__init__",
        "pool.backoff",
        "pool.supervisor",
        "telemetry.__init__",
        "registry",
        "protocol.lease",
    }
    assert "aiohttp.web" in set(absolute_names("pool.pool", code))


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) != APART])
def test_imports_go_downwards(module: str) -> None:
    """A module imports from its own package and from lower layers."""
    for imported in IMPORTS[module]:
        if part_of(imported) == APART:
            assert layer_of(module) == 0, imported
        elif part_of(imported) != part_of(module):
            is_beside = layer_of(module) in (0, LEAVES) and layer_of(module) == layer_of(imported)
            assert is_beside or layer_of(imported) > layer_of(module), imported


def test_nothing_of_the_package_is_needed_for_testing() -> None:
    """The fake server and the slow network work without the patch."""
    for module in [name for name in MODULES if part_of(name) == APART]:
        allowed = {APART, "installation"} if module == KNOWS_THE_PATCH else {APART}
        assert {part_of(imported) for imported in IMPORTS[module]} <= allowed, module


def test_no_imports_in_a_circle() -> None:
    """Any module can be read, and loaded, before those that import it."""
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises if there is a circle


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) == "pool"])
def test_the_policy_knows_no_websocket(module: str) -> None:
    """`pool` can be read and tested without aiohttp, LiveKit or what is built on them."""
    names = set(absolute_names(module, MODULES[module].read_text()))
    assert {name.partition(".")[0] for name in names}.isdisjoint({"aiohttp", "livekit"})
