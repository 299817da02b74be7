"""Noticing whether anything changed that the reading of a layer depended on, for much less than reading it again."""

import operator
from collections import defaultdict
from itertools import chain, repeat
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.module_tree import Held, ModuleTree, are_same, is_empty

# What the readers look at beside classes, hooks, children and parameters. Lists and dicts are compared by value.
_ATTRIBUTES = (
    "training", "forward", "_hf_hook", "p", "eps", "variance_epsilon", "head_dim", "scaling", "attention_dropout",
    "_disable_adapters", "merged_adapters", "_active_adapter", "lora_variant", "use_dora", "cast_input_dtype_enabled",
    "fan_in_fan_out", "compute_dtype", "act", "approximate",
)  # fmt: skip
_hooks = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_traits = operator.attrgetter("requires_grad", "dtype")
_quant_state = operator.attrgetter("quant_state")


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.copy() if isinstance(value, list | dict) else value


class Watch:
    """The state of all modules below a layer when it was read, and which they were.

    Without the layer itself, whose hooks run around what was read.
    """

    __slots__ = ("_bare", "_forwards", "_four_bit", "_getters", "_groups", "_parameters", "_states", "_tree", "_values")

    def __init__(self, layer: torch.nn.Module) -> None:
        # Who puts something into an empty container changes others, too.
        self._tree = ModuleTree(layer, leave_out=is_empty)
        below = self._tree.held
        self._forwards = [kind.forward for kind in self._tree.kinds]
        self._bare = [held for held in below if "forward" not in held]
        groups: dict[tuple[str, ...], list[Held]] = defaultdict(list)
        for held in below:
            groups[tuple(name for name in _ATTRIBUTES if name in held)].append(held)
        groups.pop((), None)
        self._getters = [operator.itemgetter(*names) for names in groups]
        self._groups = list(groups.values())
        self._parameters = self._tree.parameters
        self._four_bit = [p for p in self._parameters if getattr(p, "quant_state", None) is not None]
        self._states = list(map(_quant_state, self._four_bit))
        self._values = [list(map(_copied, values)) for values in self._look()]

    def _look(self) -> list[list[Any]]:
        """All that is compared by value."""
        # A four-bit weight answers in Python otherwise, and slowly.
        with torch._C.DisableTorchFunctionSubclass():
            return [
                list(map(torch.Tensor.data_ptr, self._parameters)),
                list(map(_traits, self._parameters)),
                *map(list, map(map, self._getters, self._groups)),
            ]

    def is_unchanged(self, layer: torch.nn.Module) -> bool:
        """Whether the layer would be read as it was."""
        if _has_any_global_hook() or not self._tree.is_of(layer):  # type: ignore[no-untyped-call]  # torch's
            return False
        if any(chain.from_iterable(map(_hooks, self._tree.held))):
            return False
        if any(map(operator.contains, self._bare, repeat("forward"))):
            return False
        if not are_same([kind.forward for kind in self._tree.kinds], self._forwards):
            return False
        try:
            return are_same(list(map(_quant_state, self._four_bit)), self._states) and self._look() == self._values
        except (AttributeError, KeyError):
            # What was there is not any more.
            return False
