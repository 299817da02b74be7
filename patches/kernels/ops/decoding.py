"""One token of each row: attention over a cache, and the low-rank terms of its projections. Without autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .common import implementation_beside

Tensor = torch.Tensor
# Outputs that one launch adds to: those of q, k and v.
MAX_TERMS = 3


@dataclass(frozen=True, slots=True, eq=False)
class AddedTerm:
    """The term xa[:, cols] b^T for an output y [T, n] of unit stride in a row; b [n, r] of any strides."""

    y: Tensor
    b: Tensor
    cols: slice


def _attention(x: Tensor) -> Any:
    return implementation_beside("reference_decoding", "decode_attention", x)


def _low_rank(x: Tensor) -> Any:
    return implementation_beside("reference_decoding", "decode_low_rank", x)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one token of each row over its own cache; returns [B, H, D] in q's dtype.

    q [B, H, D], keys and values [B, Hk, capacity, D] of unit stride in the last dimension; `lengths` [B] int64 is how
    many tokens of a row stand before this one, whose own key and value are in the cache already. With a `window` a
    token sees so many, itself among them; scores are softcap * tanh(scores / softcap) where there is one.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attention(q).decode_attention(q, keys, values, lengths, out, scale, window, softcap)
    return out


def low_rank(x: Tensor, a: Tensor, scales: Tensor) -> Tensor:
    """Parts [s, T, r], in fp32, of the sum scales * x a^T for x [T, k], a [r, k] and scales [r], computed in fp32."""
    found: Tensor = _low_rank(x).low_rank(x, a, scales)
    return found


def add_low_rank(xa: Tensor, terms: Sequence[AddedTerm], residual: Tensor | None = None) -> None:
    """Add terms to their outputs in place, rounded once; then `residual` [T, n], where it is given, rounded again.

    `xa` [s, T, r] is what `low_rank` gave; at most `MAX_TERMS` terms, whose b have one dtype and their y one dtype.
    """
    if terms:
        _low_rank(xa).add_low_rank(xa, terms, residual)
