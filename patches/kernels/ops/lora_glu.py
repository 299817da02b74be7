"""The gated activation of an MLP with adapters: low-rank terms are added where gate and up are read anyway."""

from dataclasses import dataclass
from typing import Any

import torch

from .activation import known
from .common import implementation_beside

# Beyond, a product of its own costs less than what the tiles of one kernel would hold.
MAX_RANK = 64


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The term x b^T, with x [T, r] of unit stride in a row and b [N, r] of any strides, r at most `MAX_RANK`."""

    x: torch.Tensor
    b: torch.Tensor


Sums = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Gradients in fp32 of b of gate and of up, [N, r], and of b^T of down, [r, N]."""


def _kernels(x: torch.Tensor) -> Any:
    return implementation_beside("reference_blocks", "lora_glu", x)


def lora_glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_term: LowRank | None,
    up_term: LowRank | None,
    activation: str,
    out: torch.Tensor,
) -> None:
    """Write act(gate + gate_term) * (up + up_term) into `out`; gate, up and out [T, N] of unit stride in a row.

    The sums are rounded to the dtype, and so is the activation.
    """
    _kernels(gate).lora_glu_fwd(gate, up, gate_term, up_term, known(activation), out)


def lora_glu_backward(
    dy: torch.Tensor,
    dy_term: LowRank | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    activation: str,
    gate_term: LowRank | None = None,
    up_term: LowRank | None = None,
    *,
    sum_up: bool = False,
    sum_down: bool = False,
) -> Sums:
    """Write the gradients of gate and up for that of the output, dy + dy_term; dy then becomes the output itself.

    gate, up and their terms are what `lora_glu` got; reading its sums would cost as much memory and more time to write
    them. dgate and dup may be gate and up. Gradients of the terms' b are summed on the way where that is asked for:
    `sum_up` those of gate and up, `sum_down` the one of dy_term, which is all that takes the output, so dy is lost.
    """
    sums: Sums = _kernels(gate).lora_glu_bwd(
        dy, dy_term, gate, up, dgate, dup, known(activation), gate_term, up_term, sum_up, sum_down
    )
    return sums
