"""RMSNorm forwards for modules with `weight` and `variance_epsilon` (or `eps`)."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def _forward(original: Forward, *, offset: float, cast_before_weight: bool) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not ops.supports_rms_norm(hidden_states, weight):
            return original(self, hidden_states)
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return ops.rms_norm(hidden_states, weight, eps, offset=offset, cast_before_weight=cast_before_weight)

    return forward


def cast_before_weight(original: Forward) -> Forward:
    """Llama's order: normalise in fp32, round to the input's dtype, multiply by the weight."""
    return _forward(original, offset=0.0, cast_before_weight=True)


def cast_after_weight(original: Forward) -> Forward:
    """OLMo 2's order: normalise in fp32, multiply by the weight in fp32, round to the input's dtype."""
    return _forward(original, offset=0.0, cast_before_weight=False)
