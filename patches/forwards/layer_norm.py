"""LayerNorm forward for torch.nn.LayerNorm over one dimension."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def _widened(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast hands them on: for F.layer_norm on CUDA fp32 copies, and the result stays fp32."""
    if tensors[0] is None or tensors[0].device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(None if t is None else t.float() for t in tensors)


def layer_norm(original: Forward) -> Forward:
    """Mean and variance over the last dimension, weight and bias or neither, rounded once to the input's dtype."""

    @functools.wraps(original)
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self.normalized_shape != input.shape[-1:]:
            return original(self, input)
        x, weight, bias = _widened(input, self.weight, self.bias)
        if x is None or not ops.supports_layer_norm(x, weight, bias):
            return original(self, input)
        return ops.layer_norm(x, weight, bias, self.eps)

    return forward
