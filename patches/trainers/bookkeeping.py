"""What Trainer asks of every module at every step: the mode and a count, which do not change, and all parameters."""

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..kernels.module_tree import ModuleTree
from .scope import Method, within

_mode = operator.itemgetter("training")
_counts: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def remembered(trainer: type) -> dict[str, Method]:
    """Methods of a trainer's class, without walks through the model for nothing, and with short ones otherwise."""
    methods = {"training_step": _training_step, "floating_point_ops": _floating_point_ops}
    wrapped = {name: wrap(getattr(trainer, name)) for name, wrap in methods.items() if hasattr(trainer, name)}
    return {**wrapped, **within(trainer, _short_walks, "_inner_training_loop")}


_parameters = torch.nn.Module.parameters
_named = torch.nn.Module.named_parameters, torch.nn.Module.named_modules
_trees: WeakKeyDictionary[torch.nn.Module, ModuleTree] = WeakKeyDictionary()


def tree_of(model: torch.nn.Module) -> ModuleTree | None:
    """All below a model as it is now; None where modules keep their children elsewhere, as TorchScript's do."""
    known = _trees.get(model)
    if known is not None and known.is_of(model):
        return known
    try:
        tree = _trees[model] = ModuleTree(model)
    except (KeyError, TypeError):
        return None
    return tree


def parameters(self: torch.nn.Module, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
    """`torch.nn.Module.parameters`: the same in the same order; of a model that `tree_of` knows, from its list."""
    known = recurse and self in _trees and (type(self).named_parameters, type(self).named_modules) == _named
    tree = tree_of(self) if known else None
    return _parameters(self, recurse) if tree is None else iter(tree.parameters)


@contextmanager
def _short_walks(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """While a trainer trains: clipping and zeroing ask for the parameters of the model at every step."""
    if torch.nn.Module.parameters is not _parameters:
        yield
        return
    torch.nn.Module.parameters = parameters  # type: ignore[method-assign]  # for the time of the training
    try:
        yield
    finally:
        if torch.nn.Module.parameters is parameters:
            torch.nn.Module.parameters = _parameters  # type: ignore[method-assign]  # as it was
        _trees.clear()


def _is_training(model: torch.nn.Module) -> bool:
    """Whether `model.train()` would change nothing: all modules are in that mode, and none has its own idea of it.

    The device has nothing to do until this is answered, so modules that came since the last step are not looked for
    here, but once the device is busy. New ones are in that mode by themselves.
    """
    tree = _trees.get(model) or tree_of(model)
    if tree is None or not model.training or not all(map(_mode, tree.held)):
        return False
    swaps = any(map(dict.get, (vars(model), *tree.held), repeat("_use_kernels")))
    return all(_keeps_a_mode(kind.train, swaps) for kind in (type(model), *tree.kinds))


def _keeps_a_mode(train: Any, swaps_kernels: bool) -> bool:
    """Whether a class's `train` is torch's, or that of transformers' models, which may swap kernels besides."""
    is_transformers = getattr(train, "__module__", "") == "transformers.modeling_utils"
    return train is torch.nn.Module.train or (is_transformers and not swaps_kernels)


def _training_step(original: Method) -> Method:
    @functools.wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, torch.nn.Module) or "train" in vars(model) or not _is_training(model):
            return original(self, *args, **kwargs)

        def train(mode: bool = True) -> Any:
            return model if mode else type(model).train(model, mode)

        vars(model)["train"] = train
        try:
            loss = original(self, *args, **kwargs)
        finally:
            del vars(model)["train"]
        tree_of(model)
        return loss

    return training_step


def _floating_point_ops(original: Method) -> Method:
    @functools.wraps(original)
    def floating_point_ops(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of the model inside PEFT's, which hands the call on.
        model = getattr(getattr(self.model, "num_parameters", None), "__self__", None)
        if not isinstance(model, torch.nn.Module) or "num_parameters" in vars(model):
            return original(self, *args, **kwargs)
        counts = _counts.setdefault(model, {})

        def num_parameters(*given: Any, **named: Any) -> Any:
            key = (given, tuple(sorted(named.items())))
            if key not in counts:
                counts[key] = type(model).num_parameters(model, *given, **named)  # type: ignore[attr-defined]  # upstream's
            return counts[key]

        vars(model)["num_parameters"] = num_parameters
        try:
            return original(self, *args, **kwargs)
        finally:
            del vars(model)["num_parameters"]

    return floating_point_ops
