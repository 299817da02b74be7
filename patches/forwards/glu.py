"""Gated MLP forwards for modules with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.

The projections are called as modules, so LoRA, 4-bit layers and hooks on them work as before.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import ops

Forward = Callable[..., torch.Tensor]

# By name: transformers' own class is not imported here, and it differs between versions.
SILU = frozenset({"torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"})


def _is_plain_silu(activation: object) -> bool:
    kind = type(activation)
    return f"{kind.__module__}.{kind.__qualname__}" in SILU and "forward" not in vars(activation)


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether a hook of any kind expects the module to be called."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]  # torch's


def swiglu(original: Forward) -> Forward:
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`; another activation, or one with hooks, takes upstream's path."""

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        activation = self.act_fn
        if torch.compiler.is_compiling():  # first, since Dynamo cannot trace the questions below
            return original(self, x)
        if not _is_plain_silu(activation) or _is_watched(activation):
            return original(self, x)
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        if ops.supports_swiglu(gate, up):
            hidden = ops.swiglu(gate, up)
        else:
            hidden = activation(gate) * up
        down: torch.Tensor = self.down_proj(hidden)
        return down

    return forward
