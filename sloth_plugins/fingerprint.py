"""Fingerprints of upstream code: whether what a patch replaces is still what it was written and tested for.

The fingerprint of a function is a hash of its syntax tree without docstrings, annotations and layout, together with
the functions of the same module and the methods of the same class that it calls. Two spellings of one program by
another formatter are equal; another order of operations is not.
"""

import ast
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from .origin import foreign_layer, home

DIGITS = 16
DISPATCHERS = f"{__package__}.scoped"
# Present or absent by the version of Python, or without effect on what runs.
IGNORED = frozenset({"ctx", "type_comment", "type_params", "kind", "annotation", "returns"})


class _Strip(ast.NodeTransformer):
    """Take away what does not run."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """A function without docstring and return annotation."""
        node.returns = None
        return self._body(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # the same fields

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        """A class without docstring."""
        return self._body(node)

    def visit_arg(self, node: ast.arg) -> Any:
        """A parameter without annotation."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """`x: int = 1` as `x = 1`; a bare annotation not at all."""
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def _canonical(node: Any) -> str:
    """A text of a syntax tree that does not depend on the version of Python."""
    if isinstance(node, ast.AST):
        parts = ((field, getattr(node, field, None)) for field in node._fields if field not in IGNORED)
        kept = (f"{field}={_canonical(value)}" for field, value in parts if value is not None and value != [])
        return f"{type(node).__name__}({','.join(kept)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _plain(function: Any) -> types.FunctionType | None:
    """The Python function behind decorators, bound methods and the `kernels` package's stand-ins."""
    if not inspect.isroutine(function) and hasattr(type(function), "forward"):
        cells = (cell.cell_contents for cell in type(function).forward.__closure__ or ())
        function = next((content for content in cells if isinstance(content, types.FunctionType)), None)
    function = inspect.unwrap(getattr(function, "__func__", function))
    return function if isinstance(function, types.FunctionType) else None


@lru_cache(maxsize=1024)
def _tree(function: types.FunctionType) -> ast.stmt:
    """The stripped syntax tree. Raises OSError where there is no source, SyntaxError where it cannot be read."""
    source = textwrap.dedent(inspect.getsource(function))
    (statement,) = ast.parse(source).body
    stripped: ast.stmt = _Strip().visit(statement)
    return ast.fix_missing_locations(stripped)


def _called(function: types.FunctionType, tree: ast.AST, owner: type | None) -> Iterator[types.FunctionType]:
    """Functions of the same module, and methods of the same class, that a function mentions."""
    module = function.__globals__
    for node in ast.walk(tree):
        found: Any = None
        if isinstance(node, ast.Name):
            found = module.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found = inspect.getattr_static(owner, node.attr, None) if owner is not None else None
        if isinstance(found, types.FunctionType | staticmethod):
            found = getattr(found, "__func__", found)
            # Our own dispatcher stands there while another patch replaces the function for its callers.
            while home(found) == DISPATCHERS and hasattr(found, "__wrapped__"):
                found = found.__wrapped__
            plain = _plain(found)
            if plain is not None and plain is not function and plain.__module__ == function.__module__:
                foreign = foreign_layer(found, function.__module__)
                if foreign is not None:
                    raise OSError(f"{found.__qualname__} was replaced by {foreign}")
                yield plain


def _trees(function: types.FunctionType, owner: type | None, deep: bool) -> list[ast.stmt]:
    """The function's tree, then with `deep` those of what it calls, by name."""
    first = _tree(function)
    others: dict[str, tuple[types.FunctionType, ast.stmt]] = {}
    todo = [(function, first)] if deep else []
    while todo:
        for called in _called(*todo.pop(), owner):
            if called is not function and called.__qualname__ not in others:
                others[called.__qualname__] = called, _tree(called)
                todo.append(others[called.__qualname__])
    return [first, *(others[name][1] for name in sorted(others))]


def normalised(function: Callable[..., Any], owner: type | None = None, *, deep: bool = True) -> str | None:
    """The code that a fingerprint stands for, as text for a diff; None where there is no source."""
    plain = _plain(function)
    try:
        return None if plain is None else "\n\n".join(ast.unparse(tree) for tree in _trees(plain, owner, deep)) + "\n"
    except (OSError, SyntaxError, ValueError):
        return None


def fingerprint(function: Callable[..., Any], owner: type | None = None, *, deep: bool = True) -> str | None:
    """16 hexadecimal digits for a function or a method of `owner`; None where there is no source of upstream's.

    With `deep` they cover what it calls in its own module and class as well.
    """
    plain = _plain(function)
    if plain is None:
        return None
    try:
        text = "\n".join(map(_canonical, _trees(plain, owner, deep)))
    except (OSError, SyntaxError, ValueError):
        # No source, or one that is not a definition (a lambda): not known, which the caller reports.
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
