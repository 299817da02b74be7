"""The norms of a decoder block, row by row and without autograd: `patches/blocks` has the graph around them."""

from dataclasses import dataclass
from typing import Any

import torch

from .common import implementation_beside


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """What a norm computes: RMSNorm, or LayerNorm with `is_layer`; weight and bias [N], frozen.

    `offset` is added to the weight; with `cast_before_weight` the normalised row is rounded to the input's dtype before
    the weight is applied.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    offset: float = 0.0
    cast_before_weight: bool = False
    is_layer: bool = False


def _kernels(x: torch.Tensor) -> Any:
    return implementation_beside("reference_blocks", "block_norm", x)


def norm_rows(x: torch.Tensor, norm: Norm, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Write norm(x), plus `residual` where there is one, into `out`; returns the statistics that the backward takes.

    x, out and residual [T, N] with unit stride in a row, dtypes of their own; the sums are in fp32.
    """
    stats = torch.empty((2 if norm.is_layer else 1, x.shape[0]), dtype=torch.float32, device=x.device)
    _kernels(x).block_norm_fwd(x, norm, residual, out, stats)
    return stats


def norm_rows_backward(
    dn: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    stats: torch.Tensor,
    *,
    dx: torch.Tensor | None,
    residual_grad: torch.Tensor | None = None,
    restore: bool = False,
) -> None:
    """Write the gradient of x, plus `residual_grad`, into `dx` unless it is None.

    With `restore` the memory of the gradient `dn` [T, N] then holds norm(x) again, bit for bit what `norm_rows` wrote
    into a tensor of that dtype. dx may be `residual_grad` itself.
    """
    _kernels(x).block_norm_bwd(dn, x, norm, stats, residual_grad, dx, restore)
