"""From a patch's strings to the objects they name, and every reason why that cannot be done."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

from sloth_plugins.registry import Patch, Skip

from .compatibility import known_fingerprints
from .errors import nearest
from .fingerprint import fingerprint
from .origin import foreign_layer
from .scoped import ScopedFunction, is_unused_stand_in, original_of, scoped_function, with_signature

Forward = Callable[..., Any]
Translate = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], str]]
"""The arguments of a call of a constructor, in, and those that it gets, with what was changed in words, out."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A patch with its objects: instances of `kind` get `methods(their class)`, `forward` for one, in place of theirs.

    `refuses` says why a module does not get it, or None; it is what the replacement has under that name, if anything,
    as `methods` of a replacement are those that the class gets beside its forward.
    `drift` says which upstream code is not one that the patch was tested with; None where all is known.
    """

    patch: Patch
    kind: type
    # Made anew by each `bind`; two bindings of one patch to the same objects are equal.
    methods: Callable[[type], Mapping[str, Any]] = field(compare=False)
    scoped: ScopedFunction | None = None
    refuses: Callable[[Any], str | None] | None = field(default=None, compare=False)
    drift: str | None = field(default=None, compare=False)


ALONE = " alone"


@dataclass(frozen=True, slots=True)
class Code:
    """A function of upstream's, or a method of `owner`; `module` is where upstream has it compiled.

    `deep` says that what it calls counts as well.
    """

    path: str
    function: Any
    owner: type | None
    module: str
    deep: bool = True


class Refused(Exception):
    """Why something cannot be resolved, as the `Skip` that says so."""

    def __init__(self, skip: Skip) -> None:
        super().__init__(str(skip))
        self.skip = skip


def _look_up(path: str, field: str) -> tuple[ModuleType, Any]:
    module_name, _, attribute = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise Refused(Skip(f"{field} {path} cannot be imported ({type(error).__name__}: {error})")) from error
    try:
        return module, getattr(module, attribute)
    except AttributeError as error:
        hint = nearest(attribute, dir(module))
        raise Refused(Skip(f"{field} {path} does not exist{hint}")) from error


def _defining(kind: type, name: str) -> type:
    """The class that gives `kind` an attribute."""
    return next(base for base in kind.__mro__ if name in vars(base))


def _class(path: str, field: str) -> type:
    """The class, provided that it and its forward are upstream's own."""
    module, kind = _look_up(path, field)
    if not isinstance(kind, type) or not callable(getattr(kind, "forward", None)):
        raise Refused(Skip(f"{field} {path} is not a class with a forward"))
    if kind.__module__ != module.__name__:
        raise Refused(Skip(f"{field} {path} was replaced by {kind.__module__}.{kind.__qualname__}"))
    defining = _defining(kind, "forward")
    foreign = foreign_layer(defining.forward, defining.__module__)  # type: ignore[attr-defined]  # it is in its vars
    if foreign is not None:
        raise Refused(Skip(f"{kind.__qualname__}.forward was replaced by {foreign}"))
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
        replacement = factory(original) if patch.layout is None else factory(original, patch.layout)
    except Exception as error:
        reason = f"replacement {patch.replacement} raised {type(error).__name__}: {error}"
        raise Refused(Skip(reason)) from error
    if not callable(replacement):
        raise Refused(Skip(f"replacement {patch.replacement} returned {replacement!r}, not a forward"))
    lacking = accepts(replacement, original)
    if lacking:
        raise Refused(
            Skip(f"replacement {patch.replacement} does not fit the signature of {patch.target}: it lacks {lacking}")
        )
    return replacement  # type: ignore[no-any-return]  # checked to be callable


def _make_methods(factory: Any, patch: Patch, kind: type) -> dict[str, Any]:
    """What a factory of trainer methods has for a class, each fit for every call of the method that it replaces."""
    try:
        methods: dict[str, Any] = dict(factory(kind))
    except Exception as error:
        raise Refused(Skip(f"replacement {patch.replacement} raised {type(error).__name__}: {error}")) from error
    if not methods:
        raise Refused(Skip(f"replacement {patch.replacement} has nothing to replace in {kind.__qualname__}"))
    for name, method in methods.items():
        original = getattr(kind, name, None)
        if not callable(original):
            raise Refused(Skip(f"{kind.__qualname__} has no method {name}"))
        function = getattr(method, "__func__", method)
        if not callable(function) or _is_static(method) != _is_static(inspect.getattr_static(kind, name)):
            raise Refused(
                Skip(f"replacement {patch.replacement} returned {method!r} for {name}, which is another kind")
            )
        lacking = accepts(function, original)
        if lacking:
            where = f"{kind.__qualname__}.{name}"
            raise Refused(
                Skip(f"replacement {patch.replacement} does not fit the signature of {where}: it lacks {lacking}")
            )
    return methods


def _is_static(method: Any) -> bool:
    return isinstance(method, staticmethod)


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


def upstream_code(path: str) -> Code | None:
    """The code of "module:function", "module:Class.method", or "module:Class" for its forward; None where it is not.

    With " alone" behind, it is the code without what that calls.
    """
    module_name, _, name = path.removesuffix(ALONE).partition(":")
    name, _, method = name.partition(".")
    try:
        found = getattr(import_module(module_name), name, None)
    except Exception:  # noqa: BLE001 - what cannot be imported is not here, and the caller says so
        return None
    # A name that a module only imports is another module's own.
    if found is None or getattr(found, "__module__", module_name) != module_name:
        return None
    if not isinstance(found, type):
        return None if method else Code(path, original_of(found), None, module_name, not path.endswith(ALONE))
    method = method or "forward"
    function = getattr(found, method, None)
    if not callable(function):
        return None
    return Code(path, function, found, _defining(found, method).__module__, not path.endswith(ALONE))


def replaced_code(patch: Patch) -> list[Code | str]:
    """What a patch names in `replaces`, each the first of its alternatives that exists, or the entry if none does."""
    found: list[Code | str] = []
    for entry in patch.replaces:
        codes = (upstream_code(path) for path in entry.split(" | "))
        found.append(next((code for code in codes if code is not None), entry))
    return found


def _replaced_drift(patch: Patch) -> str | None:
    """What is not known about the code that a patch names in `replaces`, or None."""
    drift = None
    for code in replaced_code(patch):
        if isinstance(code, str):
            raise Refused(Skip(f"{code}, which it stands in for, does not exist"))
        foreign = foreign_layer(code.function, code.module)
        if foreign is not None:
            raise Refused(Skip(f"{code.path.partition(':')[2]} was replaced by {foreign}"))
        drift = drift or _drift(patch, code.path, code.function, code.owner, deep=code.deep)
    return drift


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
            made = _make(factory, patch, original_forward)
            refuses, others = getattr(made, "refuses", None), getattr(made, "methods", {})
            drift = _drift(patch, path, original_forward, kind, deep=True) or _replaced_drift(patch)
            methods = _forward(lambda original: _make(factory, patch, original), others)
            return Binding(patch, kind, methods, refuses=refuses, drift=drift)
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
        drift = drift or _drift(patch, patch.within, caller_forward, caller, deep=False) or _replaced_drift(patch)
        methods = _forward(lambda forward: scoped.caller(forward, replacement))
        return Binding(patch, caller, methods, scoped, drift=drift)
    except Refused as refused:
        return refused.skip


def _forward(
    wrap: Callable[[Forward], Forward], others: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[type], Mapping[str, Any]]:
    """The methods of a binding that replaces the forward, and `others` with it."""
    return lambda kind: {"forward": wrap(kind.forward), **others}  # type: ignore[attr-defined]  # only such are bound


def bind_trainer(patch: Patch, kind: type) -> Binding | Skip:
    """Resolve a patch of trainers for the class that is its target; a `Skip` says what is missing or not upstream's."""
    try:
        _, factory = _look_up(patch.replacement, "replacement")
        for name in _make_methods(factory, patch, kind):
            defining = _defining(kind, name)
            foreign = foreign_layer(getattr(defining, name), defining.__module__)
            if foreign is not None:
                return Skip(f"{defining.__qualname__}.{name} was replaced by {foreign}")
        drift, refuses = _replaced_drift(patch), getattr(factory, "refuses", None)
        return Binding(patch, kind, lambda below: _make_methods(factory, patch, below), refuses=refuses, drift=drift)
    except Refused as refused:
        return refused.skip


def bind_constructor(patch: Patch, kind: type) -> Translate | Skip:
    """Resolve a patch of the constructor of a class; a `Skip` says what is missing or not upstream's."""
    try:
        _, factory = _look_up(patch.replacement, "replacement")
        defining = _defining(kind, "__init__")
        foreign = foreign_layer(vars(defining)["__init__"], defining.__module__)
        if foreign is not None:
            return Skip(f"{defining.__qualname__}.__init__ was replaced by {foreign}")
        translate: Translate = factory(kind)
        return translate
    except Refused as refused:
        return refused.skip
