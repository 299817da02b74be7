"""A module-level function with replacements that only chosen modules see.

Upstream's attention calls `apply_rotary_pos_emb` through its module's globals, so one instance alone cannot be given
another function without copying its body. Instead the global becomes a dispatcher, and the `forward` of a patched
instance opens a scope in which the dispatcher takes that instance's replacement. Everybody else runs the original.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

Function = Callable[..., Any]


class ScopedFunction:
    """One module-level function and the modules for which it is replaced, whatever each of them replaces it by."""

    def __init__(self, owner: ModuleType, name: str, original: Function) -> None:
        self.owner = owner
        self.name = name
        self.original = original
        self._replacement: ContextVar[Function | None] = ContextVar(f"{owner.__name__}.{name}", default=None)
        self._holders: dict[int, weakref.ref[torch.nn.Module]] = {}
        self.dispatcher = self._make_dispatcher()

    def _make_dispatcher(self) -> Function:
        original, in_scope = self.original, self._replacement

        @functools.wraps(with_signature(original))
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            # Under torch.compile the scope is never opened, and a ContextVar cannot be traced.
            replacement = None if torch.compiler.is_compiling() else in_scope.get()
            return (original if replacement is None else replacement)(*args, **kwargs)

        return dispatch

    def hold(self, module: torch.nn.Module) -> None:
        """Install the dispatcher for as long as `module` is patched."""
        key = id(module)
        self._holders[key] = weakref.ref(module, lambda _: self._drop(key))
        if getattr(self.owner, self.name) is self.original:
            setattr(self.owner, self.name, self.dispatcher)

    def release(self, module: torch.nn.Module) -> None:
        """Put the original back when the last holder is gone, by revert or by garbage collection.

        A function that somebody else has set in the meantime stays.
        """
        self._drop(id(module))

    def _drop(self, key: int) -> None:
        self._holders.pop(key, None)
        if not self._holders and getattr(self.owner, self.name) is self.dispatcher:
            setattr(self.owner, self.name, self.original)

    def caller(self, original_forward: Function, replacement: Function) -> Function:
        """`original_forward`, with calls of the function from inside it going to `replacement`.

        A replacement with an attribute `around`, a function `forward -> forward`, has a say in the whole of it.
        """
        in_scope, scoped = self._replacement, self
        whole: Function = getattr(replacement, "around", lambda forward: forward)(original_forward)

        @functools.wraps(original_forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Somebody who has set another function since does not call ours, so nothing may be left to it.
            if torch.compiler.is_compiling() or getattr(scoped.owner, scoped.name) is not scoped.dispatcher:
                return original_forward(self, *args, **kwargs)
            token = in_scope.set(replacement)
            try:
                return whole(self, *args, **kwargs)
            finally:
                in_scope.reset(token)

        return forward


_functions: dict[tuple[str, str], list[ScopedFunction]] = {}


def original_of(function: Function) -> Function:
    """The function behind one of our dispatchers, or the function itself."""
    for scoped in itertools.chain.from_iterable(_functions.values()):
        if function is scoped.dispatcher:
            return scoped.original
    return function


def scoped_function(owner: ModuleType, name: str, original: Function) -> ScopedFunction:
    """The one `ScopedFunction` of `owner.name` and this `original`, of which the name may have had several."""
    known = _functions.setdefault((owner.__name__, name), [])
    found = next((scoped for scoped in known if scoped.original is original), None)
    if found is None:
        found = ScopedFunction(owner, name, original)
        known.append(found)
    return found


def is_unused_stand_in(function: Any) -> bool:
    """Whether a function is the module that the `kernels` package puts in its place, with no kernel loaded into it."""
    is_its = isinstance(function, torch.nn.Module) and type(function).__module__.partition(".")[0] == "kernels"
    return is_its and "forward" not in vars(function)


def with_signature(function: Function) -> Function:
    """The function, with the signature that its calls have: a stand-in takes anything, its forward tells."""
    if not isinstance(function, torch.nn.Module):
        return function

    @functools.wraps(function.forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
