"""The products for q, k and v with their low-rank terms, q and k turned, in one pass over them."""

from collections.abc import Sequence

import torch

from .common import implementation_beside
from .lora_glu import LowRank


def lora_rope(
    y: torch.Tensor,
    term: LowRank | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Sequence[int],
    *,
    separate: bool = False,
) -> None:
    """Add x b^T to y [B * S, heads * D], and turn the heads of q and k by cos and sin [1 or B, S, D]; both in place.

    `heads` are those of q, k and v, in the order of y's columns; 0 for what is not in y. With `separate` each of the
    three has ranks of its own, a third of the term's, and b is zero in the others. The sum is rounded to y's dtype, and
    what is turned as by `apply_rotary` with `keep_dtype`. y, cos and sin have unit stride in a row.
    """
    implementation_beside("reference_blocks", "lora_rope", y).lora_rope(y, term, cos, sin, heads, separate)


def supports_lora_rope(cos: torch.Tensor, sin: torch.Tensor, dim: int) -> bool:
    """Whether heads of `dim` features are turned whole by such tables, and are wide enough for the tiles."""
    tables = all(table.shape[-1] == dim and table.stride(-1) == 1 for table in (cos, sin))
    return tables and dim >= 16 and dim % 2 == 0
