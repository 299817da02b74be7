"""Running a causal language model so that its logits are deferred, where nothing about its head forbids it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.watched import is_watched, only_moves_inputs
from . import handlers as _handlers  # noqa: F401 - without them every operation would compute the logits
from .deferred import DeferredLogits, defer
from .labels import LabelCount
from .recipe import Recipe


def obstacle(model: torch.nn.Module, head: Any) -> str | None:
    """Why the logits of a model with this head cannot be deferred, or None.

    Asked before each forward, since adapters, hooks and sharding come and go.
    """
    if type(head) is not torch.nn.Linear:
        kind = type(head)
        return f"lm_head is a {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"
    hook = vars(head).get("_hf_hook")
    if is_watched(head) or not (hook is None or only_moves_inputs(hook)):
        return "lm_head has hooks"
    held = vars(head).get(_slot(head))
    plain = held is None or getattr(held, "__func__", None) is torch.nn.Linear.forward
    if not plain and not isinstance(held, _Deferral):
        return "lm_head's forward was replaced"
    weight = head._parameters.get("weight")
    if type(weight) is not torch.nn.Parameter or hasattr(weight, "ds_id") or hasattr(weight, "_fsdp_flattened"):
        return "lm_head's weight is sharded, or no plain parameter"
    if any(kind.__name__ == "FSDPModule" for kind in (*type(model).__mro__, *type(head).__mro__)):
        return "the model is sharded by FSDP"
    if weight.shape != (head.out_features, head.in_features) or not weight.is_floating_point():
        return "lm_head's weight is sharded or quantised"
    return None


def _slot(head: torch.nn.Module) -> str:
    """The attribute that holds the head's own forward: accelerate's hooks move it."""
    return "_old_forward" if "_hf_hook" in vars(head) else "forward"


@dataclass(frozen=True, slots=True)
class _Deferral:
    """Stands in for the forward of `head`."""

    head: torch.nn.Linear
    labels: LabelCount | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.head.weight, self.head.bias
        plain = type(rows) is torch.Tensor and rows.device == weight.device and not rows.is_inference()
        if not plain or not rows.numel() or torch._C._is_tracing():
            return torch.nn.functional.linear(rows, weight, bias)
        return defer(Recipe.of(rows, weight, bias, self.labels))


@contextmanager
def deferring(head: torch.nn.Linear, labels: object = None) -> Iterator[None]:
    """Within it, calls of `head` return `DeferredLogits`. `obstacle` must have found none.

    `labels` is what the model was called with; counting them now spares waiting for the device at the loss.
    """
    slot = _slot(head)
    held = vars(head).get(slot)
    if isinstance(held, _Deferral):  # inside another one
        yield
        return
    setattr(head, slot, _Deferral(head, LabelCount.of(labels)))
    try:
        yield
    finally:
        if held is None:
            vars(head).pop(slot, None)
        else:
            setattr(head, slot, held)


__all__ = ["DeferredLogits", "deferring", "obstacle"]
