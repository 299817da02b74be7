"""LayerNorm forward for torch.nn.LayerNorm over one dimension."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def _widened(tensor: torch.Tensor | None) -> Any:
    """A tensor as autocast hands it on: F.layer_norm on CUDA runs on fp32 copies, its result stays so; fp64 is left."""
    return tensor if tensor is None or tensor.dtype is torch.float64 else tensor.float()


def layer_norm(original: Forward) -> Forward:
    """Mean and variance over the last dimension, weight and bias or neither, rounded once to the input's dtype."""

    @functools.wraps(original)
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self.normalized_shape != input.shape[-1:]:
            return original(self, input)
        x, weight, bias = input, self.weight, self.bias
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x, weight, bias = _widened(x), _widened(weight), _widened(bias)
        if not ops.supports_layer_norm(x, weight, bias):
            return original(self, input)
        return ops.layer_norm(x, weight, bias, self.eps)

    return forward
