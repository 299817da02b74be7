"""Apply and revert: the only code that changes somebody else's object.

A module is patched by giving it a generated subclass of its own class, with the same name, whose `forward` is the
replacement; a trainer by one with other methods. Nothing is stored on the instance, so `state_dict`, `isinstance` and
hooks are as before, a deep copy of a module stays patched, and reverting is giving the class back. A pickle holds the
original class, so that it loads where this package is not installed.
"""

import copy
import copyreg
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch

from .errors import SlothError
from .origin import home
from .resolving import Binding

MARK = "_sloth_patched"


@dataclass(frozen=True, slots=True)
class Patched:
    """What a generated class remembers: the class it stands for, its methods of then, and the bindings it runs."""

    original: type
    methods: tuple[tuple[str, Any], ...]
    bindings: tuple[Binding, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """What tells two generated classes of one original apart."""
        return _key(self.bindings)


def _key(bindings: Iterable[Binding]) -> tuple[str, ...]:
    return tuple(f"{binding.patch.target}={binding.patch.replacement}" for binding in bindings)


def patched(module: object) -> Patched | None:
    """What is applied to a module or a trainer, or None. Sees through a class that somebody derived from ours."""
    return getattr(type(module), MARK, None)


def _deepcopy(self: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    duplicate: torch.nn.Module = type(self).__new__(type(self))
    memo[id(self)] = duplicate
    duplicate.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]  # torch's
    _hold(duplicate)
    return duplicate


def _copy(self: torch.nn.Module) -> torch.nn.Module:
    duplicate: torch.nn.Module = type(self).__new__(type(self))
    duplicate.__dict__.update(self.__dict__)
    _hold(duplicate)
    return duplicate


def _reduce_to(original: type) -> Callable[[Any, Any], Any]:
    reduce_ex: Callable[..., Any] = original.__reduce_ex__

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        constructor, arguments, *rest = reduce_ex(self, protocol)
        if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]  # missing in typeshed
            # pickle insists that __newobj__ gets the object's own class; this equivalent takes any.
            constructor, arguments = copyreg._reconstructor, (arguments[0], object, None)  # type: ignore[attr-defined]
        generated = next(kind for kind in type(self).__mro__ if MARK in vars(kind))
        return constructor, tuple(original if item is generated else item for item in arguments), *rest

    return __reduce_ex__


def _new_of(original: type) -> Callable[..., Any]:
    """Whoever makes another of a patched object's class (`type(model).from_pretrained`) gets a stock one."""
    new: Callable[..., Any] = original.__new__

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Without arguments it is what copies are made with, and those stay what they are.
        if MARK in vars(cls) and (args or kwargs):
            return original(*args, **kwargs)
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    return __new__


_generated: dict[tuple[type, tuple[str, ...]], type] = {}


def _generate(original: type, bindings: tuple[Binding, ...]) -> type:
    """The subclass of `original` that runs `bindings`; made once for each combination."""
    key = (original, _key(bindings))
    known = _generated.get(key)
    # Somebody may have given upstream's class another method since.
    if known is not None:
        names = [name for name, _ in getattr(known, MARK).methods]
        if getattr(known, MARK) == Patched(original, _methods_of(original, names), bindings):
            return known
    methods: dict[str, Any] = {}
    for binding in bindings:
        # Each wraps what those before it have made.
        methods |= binding.methods(_subclass(original, methods) if methods else original)
    members: dict[str, Any] = {
        **methods,
        "__new__": _new_of(original),
        "__reduce_ex__": _reduce_to(original),
        MARK: Patched(original, _methods_of(original, methods), bindings),
    }
    if issubclass(original, torch.nn.Module) and not hasattr(original, "__deepcopy__"):
        members["__deepcopy__"] = _deepcopy
    if issubclass(original, torch.nn.Module) and not hasattr(original, "__copy__"):
        members["__copy__"] = _copy
    _generated[key] = _subclass(original, members)
    return _generated[key]


def _methods_of(kind: type, names: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, getattr(kind, name, None)) for name in names)


def _subclass(original: type, members: dict[str, Any]) -> type:
    """A subclass that cannot be told from the original by its name."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: type = type(original)(original.__name__, (original,), {**members, **names})
    return made


def _hold(module: Any) -> None:
    state = patched(module)
    for binding in state.bindings if state else ():
        if binding.scoped is not None:
            binding.scoped.hold(module)


def _release(module: Any, state: Patched) -> None:
    for binding in state.bindings:
        if binding.scoped is not None:
            binding.scoped.release(module)


def _own_bound_forwards(module: Any) -> dict[str, MethodType]:
    """The module's own forward where accelerate's hooks or upstream's capture of outputs keep it in the instance."""
    held = {name: vars(module).get(name) for name in ("forward", "_old_forward")}
    own = getattr(type(module), "forward", None)
    return {name: bound for name, bound in held.items() if isinstance(bound, MethodType) and bound.__func__ is own}


def _swap(module: Any, kind: type, bound: dict[str, MethodType]) -> None:
    """Give a module or a trainer another class, and the bound forwards that go with it."""
    before = patched(module)
    vars(module).update(bound)
    module.__class__ = kind
    if before is not None:
        _release(module, before)
    _hold(module)


def _foreign(module: torch.nn.Module, binding: Binding, original: type) -> str | None:
    """Who else has replaced this module's forward, or None if it is upstream's own."""
    if original.forward is not binding.kind.forward:  # type: ignore[attr-defined]  # both are module classes
        return f"{original.__module__}.{original.__qualname__} has its own forward"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized, which gives it a class of its own"
    state = vars(module)
    slot = "_old_forward" if "_hf_hook" in state else "forward"
    held = state.get(slot)
    if held is None or (isinstance(held, MethodType) and held.__func__ is type(module).forward):
        return None
    return f"forward already replaced by {home(held)}"


@dataclass(slots=True)
class Survey:
    """What one binding finds in a model: module names it can run in, and refusals with their counts.

    Of a trainer the one name is that of its class, and a refusal has no example.
    """

    binding: Binding
    modules: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    refused_example: str = ""


Check = Callable[[Binding, Any], str | None]
Covers = Callable[[Binding, str], bool]


def survey(
    model: torch.nn.Module, bindings: Iterable[Binding], covers: Covers, check: Check
) -> tuple[list[Survey], dict[str, Any]]:
    """Which modules each binding can run in, and the wanted `(module, bindings)` by module name. Changes nothing.

    A module whose name a binding does not cover is none of its business; `check` is asked for each of the others and
    may refuse with a reason.
    """
    surveys = [Survey(binding) for binding in bindings]
    wanted: dict[str, tuple[torch.nn.Module, list[Binding]]] = {}
    for name, module in model.named_modules():
        state = patched(module)
        original = state.original if state else type(module)
        found: list[Binding] = []
        for result in surveys:
            if not issubclass(original, result.binding.kind) or not covers(result.binding, name):
                continue
            taken = next((other for other in found if other.patch.target == result.binding.patch.target), None)
            refusal = check(result.binding, module) or _foreign(module, result.binding, original)
            if refusal is None and taken is not None:
                refusal = f"patch {taken.patch.name!r} already replaces {taken.patch.target.partition(':')[2]}"
            if refusal is None and result.binding.refuses is not None:
                refusal = result.binding.refuses(module)
            if refusal is None:
                result.modules.append(name)
                found.append(result.binding)
            else:
                result.refusals[refusal] += 1
                result.refused_example = result.refused_example or name
        if found or state:
            wanted[name] = (module, found)
    return surveys, wanted


def apply(wanted: Iterable[tuple[Any, Sequence[Binding]]]) -> int:
    """Bring each module, or trainer, to exactly its bindings; returns how many changed.

    All or nothing: whatever interrupts it, a keyboard interrupt too, those changed so far get their class back.
    """
    done: list[tuple[Any, type, dict[str, MethodType]]] = []
    try:
        for module, bindings in wanted:
            state = patched(module)
            if (state.bindings if state else ()) == tuple(bindings):
                continue
            if state is not None and MARK not in vars(type(module)):
                raise SlothError(
                    f"the class of a {type(module).__qualname__} was changed after it was patched (by sharding or "
                    "parametrization); revert the model before that"
                )
            original = state.original if state else type(module)
            kind = _generate(original, tuple(bindings)) if bindings else original
            own = _own_bound_forwards(module)
            done.append((module, type(module), own))
            new = {name: MethodType(kind.forward, module) for name in own}  # type: ignore[attr-defined]  # a module class
            _swap(module, kind, new)
    except BaseException:
        for module, kind, own in reversed(done):
            _swap(module, kind, own)
        raise
    return len(done)


def patched_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Every module of a model that runs a replacement."""
    return (module for module in model.modules() if patched(module) is not None)


def revert(model: torch.nn.Module, trainers: Iterable[Any] = ()) -> int:
    """Give every module its class back, and each of the trainers; returns how many modules had been patched.

    Raises `SlothError` after sharding.
    """
    modules = list(patched_modules(model))
    apply([(patched_object, []) for patched_object in (*modules, *filter(patched, trainers))])
    return len(modules)
