"""Makes any function of the package fail on demand, by name, without the function's help.

The source of every module is compiled again with a probe at the beginning of each function, lambdas
and inner functions included, and the code of the functions that exist is replaced.
"""

from __future__ import annotations

import ast
import builtins
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType

import xai_pool_patch

PROBE = "__xai_pool_patch_probe__"
ROOT = Path(xai_pool_patch.__file__).parent
ELSEWHERE = ("demo", "probe", "testing", "__main__")
"""What runs in no agent."""


class BugError(Exception):
    """What a broken function raises."""

    def __init__(self) -> None:
        super().__init__("a bug of ours, with a secret in its message")


class _Prober(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self._path = [module]

    def _inner(self, node: ast.AST, name: str) -> str:
        self._path.append(name)
        self.generic_visit(node)
        path = ".".join(self._path)
        self._path.pop()
        return path

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._inner(node, node.name)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        path = self._inner(node, node.name)
        has_docstring = ast.get_docstring(node, clean=False) is not None
        node.body.insert(int(has_docstring), _call(path, node))
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.visit_FunctionDef(node)  # type: ignore[arg-type]

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        path = self._inner(node, f"<lambda:{node.lineno}>")
        probe = _call(path, node).value
        node.body = ast.copy_location(ast.BoolOp(ast.Or(), [probe, node.body]), node)
        return node


def _call(path: str, place: ast.AST) -> ast.Expr:
    call = ast.Call(ast.Name(PROBE, ast.Load()), [ast.Constant(path)], [])
    expression = ast.Expr(ast.copy_location(call, place))
    ast.fix_missing_locations(ast.copy_location(expression, place))
    return expression


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


class Probes:
    """What the probes do.

    Attributes:
        calls: how often each function was called since `watch`.
        broken: the function that is, or was.
        raised: how often it has raised.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.raised = 0
        self.broken: str | None = None
        self._is_broken = False
        self._nth: int | None = None

    def watch(self, broken: str | None = None, nth: int | None = None) -> None:
        """From now on that function raises, at its nth call or at every one."""
        self.calls.clear()
        self.raised = 0
        self.broken, self._nth = broken, nth
        self._is_broken = broken is not None

    def restore(self) -> None:
        """Nothing is broken any more."""
        self._is_broken = False

    def __call__(self, path: str) -> None:
        self.calls[path] += 1
        if self._is_broken and path == self.broken and self._nth in (None, self.calls[path]):
            self.raised += 1
            raise BugError


@contextmanager
def instrumented() -> Iterator[Probes]:
    """All functions of the package that are imported have their probes."""
    probes = Probes()
    setattr(builtins, PROBE, probes)
    probed: dict[tuple[str, str, int], CodeType] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == xai_pool_patch.__name__ and module.__file__ is not None:
            file = Path(module.__file__)
            part = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            if part.split(".")[0] not in ELSEWHERE:
                tree = _Prober(part).visit(ast.parse(file.read_text("utf-8"), str(file)))
                code = compile(tree, str(file), "exec", dont_inherit=True)
                probed.update((_key(each), each) for each in _codes(code))
    gc.unfreeze()  # of what conftest has frozen nothing is listed
    functions = [each for each in gc.get_objects() if isinstance(each, FunctionType)]
    gc.freeze()
    originals = [(each, each.__code__) for each in functions if _key(each.__code__) in probed]
    for function, code in originals:
        function.__code__ = probed[_key(code)]
    try:
        yield probes
    finally:
        for function, code in originals:
            function.__code__ = code
        delattr(builtins, PROBE)
