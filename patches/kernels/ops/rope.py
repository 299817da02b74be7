"""Rotary embedding of q and k with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned
from .common import MAX_ROWS, fits_in_place, kernels_for, needs_graph


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, q: Any, k: Any, cos: Any, sin: Any, dim: int, keep_dtype: bool) -> Any:
        q_out, k_out = kernels.rope_fwd(q, k, cos, sin, dim, keep_dtype)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[1:3]
        ctx.mark_non_differentiable(*(o for o, need in zip((q_out, k_out), wanted, strict=True) if not need))
        ctx.kernels, ctx.dim, ctx.dtype = kernels, dim, q.dtype
        ctx.strides = q_out.stride(), k_out.stride()
        return q_out, k_out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_q: torch.Tensor | None, grad_k: torch.Tensor | None) -> Any:
        cos, sin = ctx.saved_tensors
        _, need_q, need_k = ctx.needs_input_grad[:3]
        dq = dk = None
        # In the layout of q and k, so that undoing the projection's transpose and view costs no copy.
        if need_q and grad_q is not None:
            reuse = fits_in_place(grad_q, ctx.strides[0], ctx.dtype) and exclusively_owned(grad_q, "incoming")
            dq = grad_q if reuse else _empty(grad_q, ctx.strides[0], ctx.dtype)
        if need_k and grad_k is not None:
            reuse = fits_in_place(grad_k, ctx.strides[1], ctx.dtype) and exclusively_owned(grad_k, "incoming")
            dk = grad_k if reuse else _empty(grad_k, ctx.strides[1], ctx.dtype)
        ctx.kernels.rope_bwd(grad_q, grad_k, cos, sin, ctx.dim, dq, dk)
        return None, dq, dk, None, None, None, None


_rotary: Any = _Rotary.apply


def _empty(grad: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(grad.shape, strides, dtype=dtype, device=grad.device)


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k: x * cos + rotate_half(x) * sin on the first R features, rotate_half((a, b)) = (-b, a).

    q [B, H, S, D] and k [B, Hk, S, D] for `unsqueeze_dim` 1, [B, S, H, D] and [B, S, Hk, D] for 2; cos and sin
    [1 or B, S, R] with even R <= D; any strides. Both products and their sum are rounded to the promoted dtype of q and
    cos, which the results have too, or q's dtype with `keep_dtype`. cos and sin get no gradient. Raises TypeError where
    `supports_rotary` is False because of the tensors' kind.
    """
    kernels = kernels_for("rope", q, k, cos, sin)
    if needs_graph(q, k):
        rotated: tuple[torch.Tensor, torch.Tensor] = _rotary(kernels, q, k, cos, sin, unsqueeze_dim, keep_dtype)
    else:
        rotated = kernels.rope_fwd(q, k, cos, sin, unsqueeze_dim, keep_dtype)
    return rotated


def supports_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> bool:
    """Whether `apply_rotary` takes these tensors here and now; False if cos or sin wants a gradient."""
    if backend_for(q, k, cos, sin) is None or unsqueeze_dim not in (1, 2):
        return False
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    if q.dtype is not k.dtype or cos.dtype is not sin.dtype or cos.requires_grad or sin.requires_grad:
        return False
    batch, seq, rotated = cos.shape
    q_shape, k_shape = q.shape, k.shape
    seq_at = 3 - unsqueeze_dim
    return (
        q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and q_shape[seq_at] == k_shape[seq_at] == seq
        and batch in (1, q_shape[0])
        and rotated % 2 == 0
        and rotated <= q_shape[3]
        and q_shape[0] * seq < MAX_ROWS
    )
