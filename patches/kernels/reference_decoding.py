"""The kernels of decoding, one token of each row, in plain torch, with the functions of the Triton modules."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .ops.decoding import AddedTerm

Tensor = torch.Tensor


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, out: Tensor,
    scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """out = softmax(cap(scale q k^T)) v over the tokens 0 to `lengths` of each row; in fp32."""
    rows, n_q, dim = q.shape
    n_k, capacity = keys.shape[1:3]
    at = torch.arange(capacity, device=q.device)
    seen = at <= lengths[:, None]
    if window is not None:
        seen &= at > lengths[:, None] - window
    grouped = q.view(rows, n_k, n_q // n_k, dim)
    scores = torch.einsum("bhgd,bhnd->bhgn", grouped.float(), keys.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    # What lies beyond a row's tokens may be anything, and 0 times it must be 0.
    clean = values.float().masked_fill(~seen[:, None, :, None], 0.0)
    out.copy_(torch.einsum("bhgn,bhnd->bhgd", weights, clean).view(rows, n_q, dim))


def low_rank(x: Tensor, a: Tensor, scales: Tensor) -> Tensor:
    """scales * x a^T as the one part [1, T, r] of a sum, in fp32."""
    return (x.float() @ a.float().t() * scales)[None]


def add_low_rank(xa: Tensor, terms: "Sequence[AddedTerm]", residual: Tensor | None) -> None:
    """y = y + sum(xa) b^T, rounded, [+ residual, rounded], in the memory of each y."""
    total = xa.sum(0)
    for term in terms:
        made = term.y.float() + total[:, term.cols] @ term.b.float().t()
        term.y.copy_(made if residual is None else made.to(term.y.dtype).float() + residual.float())
