"""LayerNorm forward for torch.nn.LayerNorm over one dimension."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def _autocast_widens(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether autocast may change a dtype: on CUDA it runs F.layer_norm on fp32 copies and the result stays fp32."""
    if not torch.is_autocast_enabled(x.device.type):
        return False
    return any(t is not None and t.dtype is not torch.float32 for t in (x, *parameters))


def layer_norm(original: Forward) -> Forward:
    """Mean and variance over the last dimension, weight and bias or neither, rounded once to the input's dtype."""

    @functools.wraps(original)
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if (
            not ops.supports_layer_norm(input, weight, bias)
            or self.normalized_shape != input.shape[-1:]
            or _autocast_widens(input, weight, bias)
        ):
            return original(self, input)
        return ops.layer_norm(input, weight, bias, self.eps)

    return forward
