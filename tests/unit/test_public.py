"""The public names: each says what it is for, and is seen by the type checkers."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from dataclasses import fields
from pathlib import Path

import pytest

import xai_pool_patch
from xai_pool_patch import PoolOptions

NAMES = xai_pool_patch.__all__
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(xai_pool_patch, name))]
TYPED_USE = Path(__file__).parents[1] / "typed/use.py"


def section(name: str, title: str) -> set[str]:
    """What a docstring's `Args` or `Raises` names."""
    _, _, after = inspect.getdoc(getattr(xai_pool_patch, name)).partition(f"{title}:\n")
    return set(re.findall(r"^    (\w+):", after.partition("\n\n")[0], re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_docstring(name: str) -> None:
    """Of its own: neither inherited nor what dataclasses make of the fields."""
    doc = vars(getattr(xai_pool_patch, name)).get("__doc__", getattr(xai_pool_patch, name).__doc__)
    assert doc
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_tell_their_arguments_and_errors(name: str) -> None:
    """All of the ones, and of the others what an application can import."""
    assert section(name, "Args") == set(inspect.signature(getattr(xai_pool_patch, name)).parameters)
    assert section(name, "Raises") <= set(NAMES)


def test_options_tell_their_reasons() -> None:
    """Every field is followed by its docstring."""
    [definition] = ast.parse(inspect.getsource(PoolOptions)).body
    body = [ast.unparse(part) for part in definition.body]
    told = [a.partition(":")[0] for a, b in itertools.pairwise(body) if b[0] in "'\""]
    assert told == [field.name for field in fields(PoolOptions)]


@pytest.mark.parametrize("name", NAMES)
def test_the_type_checkers_see_its_use(name: str) -> None:
    """In the file that they judge as an application's."""
    assert re.search(rf"\b{name}\b", TYPED_USE.read_text())
