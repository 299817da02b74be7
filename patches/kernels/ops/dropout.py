"""Dropout whose mask is never kept: a seed gives it again."""

from typing import Any

import torch

from .common import implementation_beside


def _kernels(x: torch.Tensor) -> Any:
    return implementation_beside("reference_blocks", "dropout", x)


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x [T, N] with each element zero with probability p and multiplied by 1 / (1 - p) otherwise.

    The same seed and shape give the same mask, whatever x's values, dtype and strides are. 0 < p <= 1.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _kernels(x).dropout_fwd(x, p, seed, out)
    return out


def add_dropped(total: torch.Tensor, x: torch.Tensor, p: float, seed: int) -> None:
    """total += dropped(x, p, seed), in place, for tensors [T, N] of unit stride in a row."""
    _kernels(x).dropout_add(x, p, seed, total)
