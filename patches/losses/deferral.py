"""Running a causal language model so that its logits are deferred, where nothing about its head forbids it."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..kernels.watched import is_watched
from . import handlers as _handlers  # noqa: F401 - without them every operation would compute the logits
from .deferred import DeferredLogits, defer
from .recipe import Recipe


def obstacle(model: torch.nn.Module, head: Any) -> str | None:
    """Why the logits of a model with this head cannot be deferred, or None.

    Asked before each forward, since adapters, hooks and sharding come and go.
    """
    if type(head) is not torch.nn.Linear:
        kind = type(head)
        return f"lm_head is a {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"
    held = vars(head)
    if "_hf_hook" in held or is_watched(head):
        return "lm_head has hooks"
    if "forward" in held and getattr(held["forward"], "__func__", None) is not _deferred:
        return "lm_head's forward was replaced"
    weight = head._parameters.get("weight")
    if type(weight) is not torch.nn.Parameter or hasattr(weight, "ds_id") or hasattr(weight, "_fsdp_flattened"):
        return "lm_head's weight is sharded, or no plain parameter"
    if any(kind.__name__ == "FSDPModule" for kind in (*type(model).__mro__, *type(head).__mro__)):
        return "the model is sharded by FSDP"
    if weight.shape != (head.out_features, head.in_features) or not weight.is_floating_point():
        return "lm_head's weight is sharded or quantised"
    return None


def _deferred(self: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    plain = type(rows) is torch.Tensor and rows.device == self.weight.device and not rows.is_inference()
    if not plain or not rows.numel() or torch._C._is_tracing():
        return torch.nn.functional.linear(rows, self.weight, self.bias)
    return defer(Recipe.of(rows, self.weight, self.bias))


@contextmanager
def deferring(head: torch.nn.Linear) -> Iterator[None]:
    """Within it, calls of `head` return `DeferredLogits`. `obstacle` must have found none."""
    if "forward" in vars(head):  # inside another one
        yield
        return
    head.forward = types.MethodType(_deferred, head)  # type: ignore[method-assign]  # for as long as the model runs
    try:
        yield
    finally:
        vars(head).pop("forward", None)


__all__ = ["DeferredLogits", "deferring", "obstacle"]
