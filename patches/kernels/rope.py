"""Rotary position embedding in Triton: q and k of one token in one program, forward and backward."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .rows import TL_DTYPE, next_power_of_2


@triton.jit
def rotated(a, b, cos1, sin1, cos2, sin2, MID: tl.constexpr):
    """Both halves of heads, turned: a * cos1 - b * sin1 and b * cos2 + a * sin2, all in fp32.

    Each product is rounded to MID on its own, as the separate elementwise ops would leave it, and so are the sums.
    """
    low = (a * cos1).to(MID).to(tl.float32) - (b * sin1).to(MID).to(tl.float32)
    high = (b * cos2).to(MID).to(tl.float32) + (a * sin2).to(MID).to(tl.float32)
    return low.to(MID).to(tl.float32), high.to(MID).to(tl.float32)


@triton.jit
def _rotate_heads(
    src, dst, cos1, sin1, cos2, sin2, s_head, s_dim, d_head, d_dim,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_TAIL: tl.constexpr, MID: tl.constexpr, BACKWARD: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    low = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, :]
    high = low + HALF
    for first in tl.static_range(0, HEADS, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        mask = (heads < HEADS) & (low < HALF)
        a = tl.load(src + heads * s_head + low * s_dim, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(src + heads * s_head + high * s_dim, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            out1, out2 = rotated(a, b, cos1, -sin2, cos2, -sin1, MID)
        else:
            out1, out2 = rotated(a, b, cos1, sin1, cos2, sin2, MID)
        element = dst.dtype.element_ty
        if SHARED:
            # Several threads have read each number, which dst may share with src: none may write before all have.
            tl.debug_barrier()
        tl.store(dst + heads * d_head + low * d_dim, out1.to(element), mask=mask)
        tl.store(dst + heads * d_head + high * d_dim, out2.to(element), mask=mask)
        if TAIL > 0:
            tail = tl.arange(0, BLOCK_TAIL).to(tl.int64)[None, :]
            tail_mask = (heads < HEADS) & (tail < TAIL)
            tail += 2 * HALF
            rest = tl.load(src + heads * s_head + tail * s_dim, mask=tail_mask, other=0.0).to(tl.float32)
            tl.store(dst + heads * d_head + tail * d_dim, rest.to(element), mask=tail_mask)


@triton.jit
def rope_fwd_kernel(
    q, q_out, k, k_out, cos, sin, seq,
    q_b, q_h, q_s, q_d, qo_b, qo_h, qo_s, qo_d, k_b, k_h, k_s, k_d, ko_b, ko_h, ko_s, ko_d,
    cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_HEADS: tl.constexpr, K_BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, TAIL: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    MID: tl.constexpr, BACKWARD: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """All heads of q and of k at one (batch, position); BACKWARD turns the other way."""
    token = tl.program_id(0)
    b = (token // seq).to(tl.int64)
    s = (token % seq).to(tl.int64)
    low = tl.arange(0, BLOCK_HALF).to(tl.int64)
    high = low + HALF
    mask = low < HALF
    cos_row = cos + b * cos_b + s * cos_s
    sin_row = sin + b * sin_b + s * sin_s
    cos1 = tl.load(cos_row + low * cos_d, mask=mask, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_row + high * cos_d, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_row + low * sin_d, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_row + high * sin_d, mask=mask, other=0.0).to(tl.float32)[None, :]
    _rotate_heads(
        q + b * q_b + s * q_s, q_out + b * qo_b + s * qo_s, cos1, sin1, cos2, sin2, q_h, q_d, qo_h, qo_d,
        Q_HEADS, Q_BLOCK, HALF, BLOCK_HALF, TAIL, BLOCK_TAIL, MID, BACKWARD, SHARED,
    )  # fmt: skip
    if K_HEADS > 0:
        _rotate_heads(
            k + b * k_b + s * k_s, k_out + b * ko_b + s * ko_s, cos1, sin1, cos2, sin2, k_h, k_d, ko_h, ko_d,
            K_HEADS, K_BLOCK, HALF, BLOCK_HALF, TAIL, BLOCK_TAIL, MID, BACKWARD, SHARED,
        )  # fmt: skip


def _by_batch_head_seq(tensor: torch.Tensor, unsqueeze_dim: int) -> tuple[int, int, int, int]:
    b, x, y, d = tensor.stride()
    return (b, x, y, d) if unsqueeze_dim == 1 else (b, y, x, d)


def _launch(
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor | None,
    k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    mid: torch.dtype,
    backward: bool,
) -> None:
    heads_at, seq_at = (1, 2) if unsqueeze_dim == 1 else (2, 1)
    half = cos.shape[-1] // 2
    tail = q.shape[-1] - 2 * half
    seq = q.shape[seq_at]
    q_heads = q.shape[heads_at]
    if k is None or k_out is None:
        k, k_out, k_heads = q, q_out, 0
    else:
        k_heads = k.shape[heads_at]
    block_half = next_power_of_2(half)
    most = max(1, 4096 // block_half)
    q_block = min(next_power_of_2(q_heads), most)
    k_block = min(next_power_of_2(max(k_heads, 1)), most)
    warps = min(8, max(1, q_block * block_half // 512))
    shared = min(q_block, k_block) * block_half < 32 * warps
    kernel: Any = rope_fwd_kernel
    with on_device_of(q):
        kernel[(q.shape[0] * seq,)](
            q, q_out, k, k_out, cos, sin, seq,
            *_by_batch_head_seq(q, unsqueeze_dim), *_by_batch_head_seq(q_out, unsqueeze_dim),
            *_by_batch_head_seq(k, unsqueeze_dim), *_by_batch_head_seq(k_out, unsqueeze_dim),
            0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), cos.stride(2),
            0 if sin.shape[0] == 1 else sin.stride(0), sin.stride(1), sin.stride(2),
            Q_HEADS=q_heads, Q_BLOCK=q_block, K_HEADS=k_heads, K_BLOCK=k_block,
            HALF=half, BLOCK_HALF=block_half, TAIL=tail, BLOCK_TAIL=next_power_of_2(max(tail, 1)),
            MID=TL_DTYPE[mid], BACKWARD=backward, SHARED=shared, num_warps=warps,
            # A fused multiply-add would skip the rounding of the first product in fp32.
            enable_fp_fusion=False,
        )  # fmt: skip


def rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    keep_dtype: bool,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated q and k; same contract as `reference.rope_fwd`."""
    dtype = torch.promote_types(q.dtype, cos.dtype)
    out = q.dtype if keep_dtype else dtype
    q_out, k_out = (q, k) if in_place else (torch.empty_like(q, dtype=out), torch.empty_like(k, dtype=out))
    _launch(q, q_out, k, k_out, cos, sin, unsqueeze_dim, dtype, False)
    return q_out, k_out


def rope_bwd(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
) -> None:
    """Write the gradients of q and k into `dq` and `dk`; same contract as `reference.rope_bwd`."""
    if grad_q is None or dq is None:
        grad_q, grad_k, dq, dk = grad_k, None, dk, None
    if grad_q is not None and dq is not None:
        _launch(grad_q, dq, grad_k, dk, cos, sin, unsqueeze_dim, dq.dtype, True)
