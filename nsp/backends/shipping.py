"""The text that travels: the modules of the remote block joined to one that no server can mistake for an installed one.

nnsight ships a function by its source where it finds the function in no importable module, under the name of its
file. The joined module is made here from source, under a name that says what it holds and nothing about this machine.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import linecache
from types import ModuleType
from typing import Any

import nsp.backends.server_steps

_NAME = "nsp_remote_block"
_TYPES = "nsp.engine.program"  # annotations alone, which do not travel


@functools.cache
def remote_block() -> dict[str, Any]:
    """The functions of the remote block, by name; `submit` runs a job."""
    modules: dict[str, ModuleType] = {}
    _collect(nsp.backends.server_steps, modules)
    text = "\n\n".join(_without_nsp(module) for module in modules.values())
    # Servers keep the sources of what they ran by file name: another text must have another name.
    filename = f"<nsp {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    lines = text.splitlines(keepends=True)
    linecache.cache[filename] = (len(text), None, lines, filename)
    namespace: dict[str, Any] = {"__name__": _NAME}
    exec(compile(text, filename, "exec"), namespace)
    return namespace


def _collect(module: ModuleType, found: dict[str, ModuleType]) -> None:
    """The modules of nsp that ``module`` takes functions from, and itself, each after what it needs."""
    if module.__name__ in found:
        return
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "nsp" and node.module != _TYPES:
            _collect(importlib.import_module(str(node.module)), found)
    found[module.__name__] = module


def _without_nsp(module: ModuleType) -> str:
    """A module's source without its docstrings, annotations and imports of nsp."""
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if not _left_out(node)]
    return ast.unparse(ast.fix_missing_locations(_Bare().visit(tree)))


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or str(node.module).split(".")[0] == "nsp"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class _Bare(ast.NodeTransformer):
    """Takes out annotations, which name types of nsp, and the docstrings of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else ast.Assign([node.target], node.value)
