"""RMSNorm of each head of q and k and the rotary embedding after it, with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned
from .common import fits_in_place, kernels_for, needs_graph
from .rope import supports_rotary

MAX_DIM = 1024
# A program of the backward counts up to twice as many tokens in 32 bits.
MAX_TOKENS = 2**30


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, how: Any
    ) -> Any:
        q_out, k_out, q_rstd, k_rstd = kernels.qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, *how)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)
        ctx.set_materialize_grads(False)
        _, need_q, need_k, need_q_weight, need_k_weight = ctx.needs_input_grad[:5]
        wanted = need_q or need_q_weight, need_k or need_k_weight
        ctx.mark_non_differentiable(*(o for o, need in zip((q_out, k_out), wanted, strict=True) if not need))
        ctx.kernels, ctx.how = kernels, how
        ctx.strides = q_out.stride(), k_out.stride()
        return q_out, k_out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_q: torch.Tensor | None, grad_k: torch.Tensor | None) -> Any:
        q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
        _, need_q, need_k, need_q_weight, need_k_weight = ctx.needs_input_grad[:5]
        _, _, offset, cast_first, dim, _ = ctx.how
        dq = dk = None
        # In the layout of q and k, so that undoing the projection's transpose and view costs no copy.
        if need_q and grad_q is not None:
            reuse = fits_in_place(grad_q, ctx.strides[0], q.dtype) and exclusively_owned(grad_q, "incoming")
            dq = grad_q if reuse else torch.empty_like(q)
        if need_k and grad_k is not None:
            reuse = fits_in_place(grad_k, ctx.strides[1], k.dtype) and exclusively_owned(grad_k, "incoming")
            dk = grad_k if reuse else torch.empty_like(k)
        dws = ctx.kernels.qk_norm_rope_bwd(
            grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd,
            offset, cast_first, dim, dq, dk, need_q_weight, need_k_weight,
        )  # fmt: skip
        return None, dq, dk, *dws, None, None, None


_qk_norm_rope: Any = _QKNormRope.apply


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_eps: float,
    k_eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of every head of q and of k, then `apply_rotary` of both, rounded wherever these two would round.

    q [B, H, S, D] and k [B, Hk, S, D] for `unsqueeze_dim` 1, [B, S, H, D] and [B, S, Hk, D] for 2, any strides;
    weights [D] of one dtype; cos and sin [1 or B, S, D] with even D up to 1024. The results have the promoted dtype of
    the norm's result and cos, or that of the norm's result with `keep_dtype`. cos and sin get no gradient. Raises
    ValueError for an offset with `cast_before_weight`, and TypeError where `supports_qk_norm_rope` is False because of
    the tensors' kind.
    """
    if offset and cast_before_weight:
        raise ValueError(f"offset {offset} needs cast_before_weight=False")
    kernels = kernels_for("qk_norm_rope", q, k, q_weight, k_weight, cos, sin)
    how = q_eps, k_eps, offset, cast_before_weight, unsqueeze_dim, keep_dtype
    if needs_graph(q, k, q_weight, k_weight):
        rotated: tuple[torch.Tensor, torch.Tensor] = _qk_norm_rope(kernels, q, k, q_weight, k_weight, cos, sin, how)
        return rotated
    q_out, k_out, _, _ = kernels.qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, *how)
    return q_out, k_out


def supports_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> bool:
    """Whether `qk_norm_rope` takes these tensors here and now; False if only a part of D is rotated."""
    if backend_for(q, q_weight, k_weight) is None or not supports_rotary(q, k, cos, sin, unsqueeze_dim):
        return False
    dim = q.shape[-1]
    return (
        cos.shape[-1] == dim <= MAX_DIM
        and q_weight.shape == k_weight.shape == (dim,)
        and q_weight.dtype is k_weight.dtype
        and q.shape[0] * cos.shape[1] <= MAX_TOKENS
    )
