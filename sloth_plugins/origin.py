"""Whose code a function is: told by where it was compiled, since `functools.wraps` copies names."""

from collections.abc import Iterator
from typing import Any

# Decorators of these may stand around upstream's functions (`torch.no_grad` for one).
NEUTRAL = ("torch",)


def home(function: Any) -> str:
    """The module that defines a function's code, or a callable object's class."""
    function = getattr(function, "__func__", getattr(function, "func", function))
    names = getattr(function, "__globals__", None)
    return str(names.get("__name__", "?")) if names is not None else type(function).__module__


def _layers(function: Any) -> Iterator[Any]:
    yield function
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        yield function


def foreign_layer(function: Any, module: str) -> str | None:
    """The first module that is neither `module`'s package nor neutral in a function's chain of wrappers, or None."""
    package = module.partition(".")[0]
    for layer in _layers(function):
        where = home(layer)
        is_innermost = not hasattr(layer, "__wrapped__")
        if where.partition(".")[0] not in (package, *NEUTRAL) or (is_innermost and where != module):
            return where
    return None
