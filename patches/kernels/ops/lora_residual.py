"""The end of a block: the residual plus a product and its low-rank term, in one pass."""

import torch

from .common import implementation_beside
from .lora_glu import LowRank


def lora_residual(y: torch.Tensor, term: LowRank, residual: torch.Tensor, out: torch.Tensor) -> None:
    """Write residual + (y + x b^T) into `out`; y, residual and out [T, N] of unit stride in a row.

    The inner sum is rounded to y's dtype before the residual is added, as upstream's separate steps do. A small term
    added to the sum of the other two would be lost: that is rounded already, and moves by whole units only.
    `out` has the residual's dtype and may be y or the residual.
    """
    implementation_beside("reference_blocks", "lora_residual", y).lora_residual(y, term, residual, out)
