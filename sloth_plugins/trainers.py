"""Trainers: which patches are meant for one, what they find there, and which trainers a model has had.

A trainer patch names a class of TRL's. Whether a trainer is one is told by the names in its class's bases, so that TRL
is never imported only to look.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sloth_plugins.registry import Patch

from .application import Check, Survey, patched
from .origin import home
from .resolving import Binding, Refused

if TYPE_CHECKING:
    import torch

# In the order in which they came, by identity, since a trainer may define equality.
_seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def remember(trainer: Any) -> None:
    """Note a trainer that was looked at; it is forgotten when it is collected."""
    _seen.pop(id(trainer), None)
    _seen[id(trainer)] = trainer


def trains(trainer: Any, model: "torch.nn.Module") -> bool:
    """Whether a trainer's model is this one, wraps it, or is a part of it."""
    from torch.nn import Module

    own = getattr(trainer, "model", None)
    return isinstance(own, Module) and (
        any(module is model for module in own.modules()) or any(module is own for module in model.modules())
    )


def trainers_of(model: "torch.nn.Module") -> Iterator[Any]:
    """The trainers of a model that were looked at, the latest first."""
    return (trainer for trainer in reversed(list(_seen.values())) if trains(trainer, model))


def stock_class(trainer: Any) -> type:
    """A trainer's class without our patches."""
    state = patched(trainer)
    return state.original if state is not None else type(trainer)


def target_class(patch: Patch, trainer: Any) -> type | None:
    """The class of a trainer that is a patch's target; None where the trainer is no such trainer."""
    kinds = {f"{kind.__module__}:{kind.__qualname__}": kind for kind in reversed(stock_class(trainer).__mro__)}
    return next((kinds[path] for path in (patch.target, *patch.formerly) if path in kinds), None)


def is_meant(patch: Patch, trainer: Any, args: Any) -> bool:
    """Whether a patch is for a trainer as this one, made already, and for arguments that it has, whatever they say."""
    has_all = all(hasattr(args, path.partition(".")[0]) for path in patch.where)
    return has_all and not patch.constructor and target_class(patch, trainer) is not None


def _hidden(trainer: Any, binding: Binding) -> str | None:
    """Whose method a patch would hide, or None if all that it replaces is that of its target or runs what was there."""
    kind = stock_class(trainer)
    try:
        methods = binding.methods(kind)
    except Refused as refused:
        return str(refused.skip)
    for name, method in methods.items():
        # Ours stands there for the time of the training, in which the trainer is looked at again.
        own = home(vars(trainer)[name]) if name in vars(trainer) else ""
        if own and not own.startswith("sloth_plugins.patches."):
            return f"{name} of this {kind.__name__} was replaced by {own}"
        defining = next(base for base in kind.__mro__ if name in vars(base))
        is_wrapped = getattr(method, "__wrapped__", None) is getattr(kind, name)
        if not is_wrapped and not issubclass(binding.kind, defining):
            return f"{defining.__name__} has its own {name}"
    return None


def survey_trainer(trainer: Any, bindings: Iterable[Binding], check: Check) -> tuple[list[Survey], list[Binding]]:
    """What each binding finds in a trainer, and those that are wanted there. Changes nothing."""
    surveys, wanted = [], []
    for binding in bindings:
        result = Survey(binding)
        refusal = check(binding, trainer) or _hidden(trainer, binding)
        if refusal is None:
            result.modules.append(stock_class(trainer).__name__)
            wanted.append(binding)
        else:
            result.refusals[refusal] += 1
        surveys.append(result)
    return surveys, wanted
