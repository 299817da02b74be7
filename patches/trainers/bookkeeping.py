"""What Trainer asks of every module at every step, although the answer does not change: the mode, and a count."""

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .scope import Method

_counts: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def remembered(trainer: type) -> dict[str, Method]:
    """`training_step` and `floating_point_ops` of a trainer's class, without walks through the model for nothing."""
    methods = {"training_step": _training_step, "floating_point_ops": _floating_point_ops}
    return {name: wrap(getattr(trainer, name)) for name, wrap in methods.items() if hasattr(trainer, name)}


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
    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if "train" in vars(model) or not _is_training(model):
            return original(self, model, *args, **kwargs)

        def train(mode: bool = True) -> Any:
            return model if mode else type(model).train(model, mode)

        vars(model)["train"] = train
        try:
            return original(self, model, *args, **kwargs)
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
