"""A module-level function with a replacement that only chosen modules see.

Upstream's attention calls `apply_rotary_pos_emb` through its module's globals, so one instance alone cannot be given
another function without copying its body. Instead the global becomes a dispatcher, and the `forward` of a patched
instance opens a scope in which the dispatcher takes the replacement. Everybody else still runs the original.
"""

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

Function = Callable[..., Any]


class ScopedFunction:
    """One module-level function, its replacement, and the modules that hold it."""

    def __init__(self, owner: ModuleType, name: str, original: Function, replacement: Function) -> None:
        self.owner = owner
        self.name = name
        self.original = original
        self.replacement = replacement
        self._in_scope: ContextVar[bool] = ContextVar(f"sloth_plugins.{owner.__name__}.{name}", default=False)
        self._holders: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._dispatcher = self._make_dispatcher()

    def _make_dispatcher(self) -> Function:
        original, replacement, in_scope = self.original, self.replacement, self._in_scope

        @functools.wraps(_with_signature(original))
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            # Under torch.compile the scope is never opened, and a ContextVar cannot be traced.
            if torch.compiler.is_compiling() or not in_scope.get():
                return original(*args, **kwargs)
            return replacement(*args, **kwargs)

        return dispatch

    @property
    def is_installed(self) -> bool:
        """Whether the module's global is our dispatcher now."""
        return getattr(self.owner, self.name) is self._dispatcher

    def hold(self, module: torch.nn.Module) -> None:
        """Install the dispatcher for as long as `module` is patched."""
        key = id(module)
        self._holders[key] = weakref.ref(module, lambda _: self._drop(key))
        if getattr(self.owner, self.name) is self.original:
            setattr(self.owner, self.name, self._dispatcher)

    def release(self, module: torch.nn.Module) -> None:
        """Put the original back when the last holder is gone, by revert or by garbage collection.

        A function that somebody else has set in the meantime stays.
        """
        self._drop(id(module))

    def _drop(self, key: int) -> None:
        self._holders.pop(key, None)
        if not self._holders and self.is_installed:
            setattr(self.owner, self.name, self.original)

    def caller(self, original_forward: Function) -> Function:
        """`original_forward` with the scope open around it."""
        in_scope = self._in_scope

        @functools.wraps(original_forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original_forward(self, *args, **kwargs)
            token = in_scope.set(True)
            try:
                return original_forward(self, *args, **kwargs)
            finally:
                in_scope.reset(token)

        return forward


_functions: dict[tuple[str, str, str], ScopedFunction] = {}


def is_unused_stand_in(function: Any) -> bool:
    """Whether a function is the module that the `kernels` package puts in its place, with no kernel loaded into it."""
    is_its = isinstance(function, torch.nn.Module) and type(function).__module__.partition(".")[0] == "kernels"
    return is_its and "forward" not in vars(function)


def _with_signature(function: Function) -> Function:
    """A stand-in's call takes anything; its forward tells what the function takes."""
    if not isinstance(function, torch.nn.Module):
        return function

    @functools.wraps(function.forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def original_of(function: Function) -> Function:
    """The function behind one of our dispatchers, or the function itself."""
    for scoped in _functions.values():
        if function is scoped._dispatcher:
            return scoped.original
    return function


def scoped_function(owner: ModuleType, name: str, original: Function, path: str, factory: Function) -> ScopedFunction:
    """The one `ScopedFunction` for a replacement (`path`) of `owner.name`, made by `factory` when it is new."""
    key = (owner.__name__, name, path)
    known = _functions.get(key)
    if known is None or known.original is not original:
        known = _functions[key] = ScopedFunction(owner, name, original, factory(_with_signature(original)))
    return known
