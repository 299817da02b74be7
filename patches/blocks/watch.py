"""Noticing whether anything changed that the reading of a layer depended on, for less than reading it again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

# What the readers look at beside classes, hooks, children and parameters. Lists and dicts are compared by value.
_ATTRIBUTES = (
    "training", "forward", "_hf_hook", "p", "eps", "variance_epsilon", "head_dim", "scaling", "attention_dropout",
    "_disable_adapters", "merged_adapters", "_active_adapter", "lora_variant", "use_dora", "cast_input_dtype_enabled",
    "fan_in_fan_out", "compute_dtype", "act", "approximate",
)  # fmt: skip


def _attributes(held: dict[str, Any]) -> dict[str, Any]:
    found = {name: held[name] for name in _ATTRIBUTES if name in held}
    return {name: value.copy() if isinstance(value, list | dict) else value for name, value in found.items()}


def _children(layer: torch.nn.Module) -> tuple[int, ...]:
    return *map(id, layer._modules.values()), *map(id, layer._parameters.values())


class Watch:
    """The state of all modules below a layer when it was read, and which they were."""

    __slots__ = ("_forwards", "_modules", "_own", "_parameters")

    def __init__(self, layer: torch.nn.Module) -> None:
        # Without the layer itself, which holds this: its hooks run around what was read.
        self._own = _children(layer)
        modules = [module for module in layer.modules() if module is not layer]
        self._modules = [
            (
                vars(module),
                module,
                type(module),
                tuple(map(id, module._modules.values())),
                tuple(map(id, module._parameters.values())),
                _attributes(vars(module)),
            )
            for module in modules
        ]
        self._forwards: list[tuple[Any, Callable[..., Any]]] = [
            (kind, kind.forward) for kind in {type(module) for module in modules}
        ]
        parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        self._parameters = [
            (p, p.data_ptr(), p.requires_grad, p.dtype, getattr(p, "quant_state", None)) for p in parameters.values()
        ]

    def is_unchanged(self, layer: torch.nn.Module) -> bool:
        """Whether the layer would be read as it was."""
        if _has_any_global_hook() or _children(layer) != self._own:  # type: ignore[no-untyped-call]  # torch's
            return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        for held, module, kind, children, parameters, attributes in self._modules:
            if (
                type(module) is not kind
                or held["_forward_hooks"]
                or held["_forward_pre_hooks"]
                or held["_backward_hooks"]
                or held["_backward_pre_hooks"]
                or tuple(map(id, held["_modules"].values())) != children
                or tuple(map(id, held["_parameters"].values())) != parameters
            ):
                return False
            for name, value in attributes.items():
                if held.get(name) != value:
                    return False
            if "forward" in held and "forward" not in attributes:
                return False
        for p, pointer, requires_grad, dtype, state in self._parameters:
            if p.data_ptr() != pointer or p.requires_grad is not requires_grad or p.dtype is not dtype:
                return False
            if state is not None and getattr(p, "quant_state", None) is not state:
                return False
        return True
