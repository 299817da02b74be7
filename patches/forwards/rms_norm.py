"""RMSNorm forwards for modules with `weight` and `variance_epsilon` (or `eps`).

Norms of q and k in an attention may leave their work to the rotary embedding; see deferred_norm.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import ops
from .deferred_norm import NormKind, deferrable, defers, epsilon

Forward = Callable[..., torch.Tensor]

LLAMA = NormKind(offset=0.0, cast_before_weight=True)
OLMO2 = NormKind(offset=0.0, cast_before_weight=False)
GEMMA = NormKind(offset=1.0, cast_before_weight=False)


def _run(original: Forward, norm: Any, x: torch.Tensor, kind: NormKind) -> torch.Tensor:
    weight = norm.weight
    if not ops.supports_rms_norm(x, weight):  # first, since under torch.compile it is False and nothing else is traced
        return original(norm, x)
    if defers(norm, x):
        return x
    return ops.rms_norm(x, weight, epsilon(norm), offset=kind.offset, cast_before_weight=kind.cast_before_weight)


def cast_before_weight(original: Forward) -> Forward:
    """Llama's order: normalise in fp32, round to the input's dtype, multiply by the weight."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return _run(original, self, hidden_states, LLAMA)

    return deferrable(forward, LLAMA)


def cast_after_weight(original: Forward) -> Forward:
    """OLMo 2's order: normalise in fp32, multiply by the weight in fp32, round to the input's dtype."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return _run(original, self, hidden_states, OLMO2)

    return deferrable(forward, OLMO2)


def offset_one(original: Forward) -> Forward:
    """Gemma's: normalise in fp32, multiply by 1 + weight in fp32, round to the input's dtype."""

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _run(original, self, x, GEMMA)

    return deferrable(forward, GEMMA)
