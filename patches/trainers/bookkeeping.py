"""What Trainer asks of every module at every step: the mode and a count, which do not change, and all parameters."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .scope import Method, within

_counts: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def remembered(trainer: type) -> dict[str, Method]:
    """Methods of a trainer's class, without walks through the model for nothing, and with short ones otherwise."""
    methods = {"training_step": _training_step, "floating_point_ops": _floating_point_ops}
    wrapped = {name: wrap(getattr(trainer, name)) for name, wrap in methods.items() if hasattr(trainer, name)}
    return {**wrapped, **within(trainer, _short_walks, "_inner_training_loop")}


_parameters = torch.nn.Module.parameters
_named = torch.nn.Module.named_parameters, torch.nn.Module.named_modules


def parameters(self: torch.nn.Module, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
    """`torch.nn.Module.parameters`: the same in the same order, without a name for each."""
    if not recurse or (type(self).named_parameters, type(self).named_modules) != _named:
        yield from _parameters(self, recurse)
        return
    todo, modules, seen = [self], set[int](), set[int]()
    while todo:
        module = todo.pop()
        if id(module) in modules:
            continue
        modules.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
        todo += [child for child in reversed(module._modules.values()) if child is not None]


@contextmanager
def _short_walks(*args: Any, **kwargs: Any) -> Iterator[None]:
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


def _is_training(model: torch.nn.Module) -> bool:
    """Whether `model.train()` would change nothing: all modules are in that mode, and none has its own idea of it."""
    todo = [model]
    while todo:
        module = todo.pop()
        if not module.training:
            return False
        own = type(module).train
        if own is not torch.nn.Module.train and not _is_transformers(own, module):
            return False
        todo += [child for child in module._modules.values() if child is not None]
    return True


def _is_transformers(own: Any, module: Any) -> bool:
    """Whether a class's `train` is that of transformers' models, which swaps kernels where they are used."""
    home = getattr(own, "__module__", "")
    return home == "transformers.modeling_utils" and not getattr(module, "use_kernels", False)


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
            return original(self, *args, **kwargs)
        finally:
            del vars(model)["train"]

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
