"""From a patch's strings to the objects they name, and every reason why that cannot be done."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from sloth_plugins.registry import Patch, Skip

from .compatibility import known_fingerprints
from .errors import nearest
from .fingerprint import fingerprint
from .origin import foreign_layer
from .scoped import ScopedFunction, is_unused_stand_in, original_of, scoped_function, with_signature

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Binding:
    """A patch with its objects: instances of `kind` get `wrap(forward)` in place of their `forward`.

    `drift` says which upstream code is not one that the patch was tested with; None where all is known.
    """

    patch: Patch
    kind: type
    # Made anew by each `bind`; two bindings of one patch to the same objects are equal.
    wrap: Callable[[Forward], Forward] = field(compare=False)
    scoped: ScopedFunction | None = None
    drift: str | None = field(default=None, compare=False)


class _Refused(Exception):
    def __init__(self, skip: Skip) -> None:
        super().__init__(str(skip))
        self.skip = skip


def _look_up(path: str, field: str) -> tuple[ModuleType, Any]:
    module_name, _, attribute = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise _Refused(Skip(f"{field} {path} cannot be imported ({type(error).__name__}: {error})")) from error
    try:
        return module, getattr(module, attribute)
    except AttributeError as error:
        hint = nearest(attribute, dir(module))
        raise _Refused(Skip(f"{field} {path} does not exist{hint}")) from error


def _class(path: str, field: str) -> type:
    """The class, provided that it and its forward are upstream's own."""
    module, kind = _look_up(path, field)
    if not isinstance(kind, type) or not callable(getattr(kind, "forward", None)):
        raise _Refused(Skip(f"{field} {path} is not a class with a forward"))
    if kind.__module__ != module.__name__:
        raise _Refused(Skip(f"{field} {path} was replaced by {kind.__module__}.{kind.__qualname__}"))
    defining = next(base for base in kind.__mro__ if "forward" in vars(base))
    foreign = foreign_layer(defining.forward, defining.__module__)  # type: ignore[attr-defined]  # it is in its vars
    if foreign is not None:
        raise _Refused(Skip(f"{kind.__qualname__}.forward was replaced by {foreign}"))
    return kind


def accepts(replacement: Forward, original: Forward) -> str | None:
    """None if `replacement` accepts every call that `original` accepts, else what it lacks."""
    new = inspect.signature(replacement, follow_wrapped=False).parameters
    kinds = [parameter.kind for parameter in new.values()]
    any_positional = inspect.Parameter.VAR_POSITIONAL in kinds
    any_keyword = inspect.Parameter.VAR_KEYWORD in kinds
    old = inspect.signature(original).parameters
    positional = [name for name, p in new.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for index, (name, parameter) in enumerate(old.items()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            missing = not any_positional
        elif parameter.kind is parameter.VAR_KEYWORD:
            missing = not any_keyword
        elif parameter.kind is parameter.KEYWORD_ONLY:
            missing = name not in new and not any_keyword
        else:
            in_place = index < len(positional) and positional[index] == name
            missing = not in_place and not (index >= len(positional) and any_positional and any_keyword)
        if missing:
            return f"parameter {name!r}"
    for name, parameter in new.items():
        required = parameter.default is parameter.empty
        if required and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name not in old:
            return f"a default for its own parameter {name!r}"
    return None


def _make(factory: Any, patch: Patch, original: Forward) -> Forward:
    try:
        replacement = factory(original)
    except Exception as error:
        reason = f"replacement {patch.replacement} raised {type(error).__name__}: {error}"
        raise _Refused(Skip(reason)) from error
    if not callable(replacement):
        raise _Refused(Skip(f"replacement {patch.replacement} returned {replacement!r}, not a forward"))
    lacking = accepts(replacement, original)
    if lacking:
        raise _Refused(
            Skip(f"replacement {patch.replacement} does not fit the signature of {patch.target}: it lacks {lacking}")
        )
    return replacement  # type: ignore[no-any-return]  # checked to be callable


def target_path(patch: Patch) -> str:
    """The path of a patch's target in the installed upstream: the first of its paths that exists, or its own."""
    for path in (patch.target, *patch.formerly) if patch.formerly else ():
        module_name, _, attribute = path.partition(":")
        try:
            found = getattr(import_module(module_name), attribute, None)
        except Exception:  # noqa: BLE001 - `bind` imports it again and reports why it cannot be
            continue
        # A name that a module only imports is another module's own.
        if getattr(found, "__module__", module_name) == module_name and found is not None:
            return path
    return patch.target


def _drift(patch: Patch, path: str, function: Forward, owner: type | None, *, deep: bool) -> str | None:
    """What is not known about a piece of upstream's code, or None. Nothing is asked of code that nobody recorded."""
    known = frozenset(patch.fingerprints) or known_fingerprints(path)
    if known is None:
        return None
    found = fingerprint(function, owner, deep=deep)
    if found in known:
        return None
    name = path.partition(":")[2]
    return f"{name} cannot be compared to what was tested" if found is None else f"{name} is not as tested ({found})"


def bind(patch: Patch) -> Binding | Skip:
    """Resolve a patch's target and replacement; a `Skip` says what is missing or no longer upstream's own."""
    try:
        _, factory = _look_up(patch.replacement, "replacement")
        path = target_path(patch)
        owner, target = _look_up(path, "target")
        if isinstance(target, type):
            kind = _class(path, "target")
            original_forward: Forward = kind.forward  # type: ignore[attr-defined]  # `_class` has checked it
            _make(factory, patch, original_forward)
            drift = _drift(patch, path, original_forward, kind, deep=True)
            return Binding(patch, kind, lambda original: _make(factory, patch, original), drift=drift)
        if patch.within is None:
            return Skip(f"target {path} is a function, so `within` must name the class that calls it")
        name = path.partition(":")[2]
        original = original_of(target)
        foreign = None if is_unused_stand_in(original) else foreign_layer(original, owner.__name__)
        if foreign is not None:
            return Skip(f"{name} was replaced by {foreign}")
        replacement = _make(factory, patch, with_signature(original))
        scoped = scoped_function(owner, name, original)
        caller = _class(patch.within, "within")
        caller_forward: Forward = caller.forward  # type: ignore[attr-defined]  # `_class` has checked it
        drift = _drift(patch, path, original, None, deep=True)
        drift = drift or _drift(patch, patch.within, caller_forward, caller, deep=False)
        return Binding(patch, caller, lambda forward: scoped.caller(forward, replacement), scoped, drift)
    except _Refused as refused:
        return refused.skip
