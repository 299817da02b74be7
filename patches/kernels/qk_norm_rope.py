"""Per-head RMSNorm of q and k with the rotary embedding after it, in one launch each way."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from .dispatch import multiprocessors, on_device_of
from .partial_sums import sum_parts
from .rope import rotated
from .rows import TL_DTYPE, cdiv, next_power_of_2

# Elements of one half of the heads that a program holds at a time; fewer where it also sums weight gradients, for which
# DW_PROGRAMS run on each multiprocessor. Measured on an H200.
BLOCK = 1024
DW_BLOCK = 512
DW_PROGRAMS = 4


@triton.jit
def _halves(row, low, stride, HALF: tl.constexpr):
    """Both halves of a vector of 2 * HALF numbers, in fp32, each [1, BLOCK_HALF]."""
    mask = low < HALF
    first = tl.load(row + low * stride, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(row + (low + HALF) * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weight(w, low, offset, HALF: tl.constexpr, CAST_FIRST: tl.constexpr):
    w1, w2 = _halves(w, low, 1, HALF)
    if not CAST_FIRST:
        w1 = offset + w1
        w2 = offset + w2
    return w1, w2


@triton.jit
def _norm_and_rotate(
    x, y, w, rstd_ptr, low, cos1, cos2, sin1, sin2, eps, offset, x_h, x_d, y_h, y_d, r_h,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr, MID: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    w1, w2 = _weight(w, low, offset, HALF, CAST_FIRST)
    element = y.dtype.element_ty
    for first in tl.static_range(0, HEADS, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        mask = (heads < HEADS) & (low < HALF)
        a = tl.load(x + heads * x_h + low * x_d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + heads * x_h + (low + HALF) * x_d, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1)[:, None] / (2 * HALF) + eps)
        tl.store(rstd_ptr + heads * r_h, rstd, mask=heads < HEADS)
        a *= rstd
        b *= rstd
        if CAST_FIRST:
            a = a.to(x.dtype.element_ty).to(tl.float32)
            b = b.to(x.dtype.element_ty).to(tl.float32)
        a = (a * w1).to(NORMED).to(tl.float32)
        b = (b * w2).to(NORMED).to(tl.float32)
        out1, out2 = rotated(a, b, cos1, sin1, cos2, sin2, MID)
        tl.store(y + heads * y_h + low * y_d, out1.to(element), mask=mask)
        tl.store(y + heads * y_h + (low + HALF) * y_d, out2.to(element), mask=mask)


@triton.jit
def qk_norm_rope_fwd_kernel(
    q, q_out, q_w, q_rstd, k, k_out, k_w, k_rstd, cos, sin, seq, q_eps, k_eps, offset,
    q_b, q_h, q_s, q_d, qo_b, qo_h, qo_s, qo_d, qr_b, qr_h, qr_s,
    k_b, k_h, k_s, k_d, ko_b, ko_h, ko_s, ko_d, kr_b, kr_h, kr_s,
    cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_HEADS: tl.constexpr, K_BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    NORMED: tl.constexpr, MID: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """All heads of q and of k at one (batch, position)."""
    token = tl.program_id(0)
    b = (token // seq).to(tl.int64)
    s = (token % seq).to(tl.int64)
    low = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, :]
    cos1, cos2 = _halves(cos + b * cos_b + s * cos_s, low, cos_d, HALF)
    sin1, sin2 = _halves(sin + b * sin_b + s * sin_s, low, sin_d, HALF)
    _norm_and_rotate(
        q + b * q_b + s * q_s, q_out + b * qo_b + s * qo_s, q_w, q_rstd + b * qr_b + s * qr_s,
        low, cos1, cos2, sin1, sin2, q_eps, offset, q_h, q_d, qo_h, qo_d, qr_h,
        Q_HEADS, Q_BLOCK, HALF, NORMED, MID, CAST_FIRST,
    )  # fmt: skip
    _norm_and_rotate(
        k + b * k_b + s * k_s, k_out + b * ko_b + s * ko_s, k_w, k_rstd + b * kr_b + s * kr_s,
        low, cos1, cos2, sin1, sin2, k_eps, offset, k_h, k_d, ko_h, ko_d, kr_h,
        K_HEADS, K_BLOCK, HALF, NORMED, MID, CAST_FIRST,
    )  # fmt: skip


@triton.jit
def _heads_backward(
    g_ptr, x, dx_ptr, rstd_ptr, low, w1, w2, cos1, cos2, sin1, sin2, dw1, dw2, present,
    g_h, g_d, x_h, x_d, d_h, d_d, r_h,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr, CAST_FIRST: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """The gradient of one token's heads, of which the first `present` exist; returns dw1 and dw2 with theirs added."""
    for first in tl.static_range(0, HEADS, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        in_heads = heads < present
        mask = in_heads & (low < HALF)
        a = tl.load(g_ptr + heads * g_h + low * g_d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(g_ptr + heads * g_h + (low + HALF) * g_d, mask=mask, other=0.0).to(tl.float32)
        dy1 = (a * cos1).to(NORMED).to(tl.float32) + (b * sin2).to(NORMED).to(tl.float32)
        dy2 = (b * cos2).to(NORMED).to(tl.float32) - (a * sin1).to(NORMED).to(tl.float32)
        dy1 = dy1.to(NORMED).to(tl.float32)
        dy2 = dy2.to(NORMED).to(tl.float32)
        element = x.dtype.element_ty
        rstd = tl.load(rstd_ptr + heads * r_h, mask=in_heads, other=0.0)
        xhat1 = tl.load(x + heads * x_h + low * x_d, mask=mask, other=0.0).to(tl.float32) * rstd
        xhat2 = tl.load(x + heads * x_h + (low + HALF) * x_d, mask=mask, other=0.0).to(tl.float32) * rstd
        if NEED_DX:
            g1 = dy1 * w1
            g2 = dy2 * w2
            if CAST_FIRST:
                g1 = g1.to(element).to(tl.float32)
                g2 = g2.to(element).to(tl.float32)
            slope = tl.sum(g1 * xhat1 + g2 * xhat2, axis=1)[:, None] / (2 * HALF)
            dx1 = rstd * (g1 - xhat1 * slope)
            dx2 = rstd * (g2 - xhat2 * slope)
            # dx may be the gradient's own buffer. Where there are more threads than numbers, several read each of them,
            # and all must have done so before one of them writes, since dw is summed over all.
            tl.debug_barrier()
            tl.store(dx_ptr + heads * d_h + low * d_d, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_ptr + heads * d_h + (low + HALF) * d_d, dx2.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            if CAST_FIRST:
                xhat1 = xhat1.to(element).to(tl.float32)
                xhat2 = xhat2.to(element).to(tl.float32)
            dw1 += dy1 * xhat1
            dw2 += dy2 * xhat2
    return dw1, dw2


@triton.jit
def qk_norm_rope_bwd_kernel(
    gq, q, dq, q_w, q_rstd, dq_w, gk, k, dk, k_w, k_rstd, dk_w, cos, sin, n_tokens, seq, offset,
    gq_b, gq_h, gq_s, gq_d, q_b, q_h, q_s, q_d, dq_b, dq_h, dq_s, dq_d, qr_b, qr_h, qr_s,
    gk_b, gk_h, gk_s, gk_d, k_b, k_h, k_s, k_d, dk_b, dk_h, dk_s, dk_d, kr_b, kr_h, kr_s,
    cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, Q_DX: tl.constexpr, Q_DW: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCK: tl.constexpr, K_DX: tl.constexpr, K_DW: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, ITERS: tl.constexpr,
    NORMED: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """ITERS tokens, one by one; with Q_DW or K_DW each program leaves its partial sum in dq_w[pid] or dk_w[pid]."""
    pid = tl.program_id(0)
    low = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, :]
    qw1, qw2 = _weight(q_w, low, offset, HALF, CAST_FIRST)
    kw1, kw2 = _weight(k_w, low, offset, HALF, CAST_FIRST)
    dqw1 = tl.zeros([Q_BLOCK, BLOCK_HALF], tl.float32)
    dqw2 = tl.zeros([Q_BLOCK, BLOCK_HALF], tl.float32)
    dkw1 = tl.zeros([K_BLOCK, BLOCK_HALF], tl.float32)
    dkw2 = tl.zeros([K_BLOCK, BLOCK_HALF], tl.float32)
    for i in range(ITERS):
        token = pid * ITERS + i
        # Past the end no heads are left, and the last token's tables stand in for those that are not there.
        q_present = tl.where(token < n_tokens, Q_HEADS, 0)
        k_present = tl.where(token < n_tokens, K_HEADS, 0)
        token = tl.minimum(token, n_tokens - 1)
        b = (token // seq).to(tl.int64)
        s = (token % seq).to(tl.int64)
        cos1, cos2 = _halves(cos + b * cos_b + s * cos_s, low, cos_d, HALF)
        sin1, sin2 = _halves(sin + b * sin_b + s * sin_s, low, sin_d, HALF)
        dqw1, dqw2 = _heads_backward(
            gq + b * gq_b + s * gq_s, q + b * q_b + s * q_s, dq + b * dq_b + s * dq_s, q_rstd + b * qr_b + s * qr_s,
            low, qw1, qw2, cos1, cos2, sin1, sin2, dqw1, dqw2, q_present, gq_h, gq_d, q_h, q_d, dq_h, dq_d, qr_h,
            Q_HEADS, Q_BLOCK, HALF, NORMED, CAST_FIRST, Q_DX, Q_DW,
        )  # fmt: skip
        dkw1, dkw2 = _heads_backward(
            gk + b * gk_b + s * gk_s, k + b * k_b + s * k_s, dk + b * dk_b + s * dk_s, k_rstd + b * kr_b + s * kr_s,
            low, kw1, kw2, cos1, cos2, sin1, sin2, dkw1, dkw2, k_present, gk_h, gk_d, k_h, k_d, dk_h, dk_d, kr_h,
            K_HEADS, K_BLOCK, HALF, NORMED, CAST_FIRST, K_DX, K_DW,
        )  # fmt: skip
    at = pid.to(tl.int64) * (2 * HALF) + low
    if Q_DW:
        tl.store(dq_w + at, tl.sum(dqw1, axis=0)[None, :], mask=low < HALF)
        tl.store(dq_w + at + HALF, tl.sum(dqw2, axis=0)[None, :], mask=low < HALF)
    if K_DW:
        tl.store(dk_w + at, tl.sum(dkw1, axis=0)[None, :], mask=low < HALF)
        tl.store(dk_w + at + HALF, tl.sum(dkw2, axis=0)[None, :], mask=low < HALF)


def _heads_first(tensor: torch.Tensor, unsqueeze_dim: int) -> torch.Tensor:
    """The tensor as [B, heads, S, ...]."""
    return tensor if unsqueeze_dim == 1 else tensor.transpose(1, 2)


def _table_strides(table: torch.Tensor) -> tuple[int, int, int]:
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(2)


def _normed_dtype(x: torch.Tensor, weight: torch.Tensor, cast_before_weight: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if cast_before_weight else x.dtype


def _blocks(half: int, q_heads: int, k_heads: int, block: int) -> dict[str, int]:
    block_half = next_power_of_2(half)
    most = max(1, block // block_half)
    q_block, k_block = (min(next_power_of_2(max(heads, 1)), most) for heads in (q_heads, k_heads))
    return {
        "HALF": half,
        "BLOCK_HALF": block_half,
        "Q_HEADS": q_heads,
        "Q_BLOCK": q_block,
        "K_HEADS": k_heads,
        "K_BLOCK": k_block,
        "num_warps": min(8, max(1, max(q_block, k_block) * block_half // 256)),
    }


def qk_norm_rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_eps: float,
    k_eps: float,
    offset: float,
    cast_before_weight: bool,
    unsqueeze_dim: int,
    keep_dtype: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (q_out, k_out, q_rstd, k_rstd); same contract as `reference.qk_norm_rope_fwd`."""
    normed = _normed_dtype(q, q_weight, cast_before_weight)
    mid = torch.promote_types(normed, cos.dtype)
    outputs = [torch.empty_like(x, dtype=normed if keep_dtype else mid) for x in (q, k)]
    # In the order of the inputs' memory, so that a program writes its heads side by side.
    rstds = [torch.empty_like(x.select(-1, 0), dtype=torch.float32) for x in (q, k)]
    (qv, kv), (qo, ko), (qr, kr) = ([_heads_first(t, unsqueeze_dim) for t in pair] for pair in ((q, k), outputs, rstds))
    batch, q_heads, seq, dim = qv.shape
    kernel: Any = qk_norm_rope_fwd_kernel
    with on_device_of(q):
        kernel[(batch * seq,)](
            qv, qo, q_weight.contiguous(), qr, kv, ko, k_weight.contiguous(), kr, cos, sin, seq, q_eps, k_eps, offset,
            *qv.stride(), *qo.stride(), *qr.stride(), *kv.stride(), *ko.stride(), *kr.stride(),
            *_table_strides(cos), *_table_strides(sin),
            NORMED=TL_DTYPE[normed], MID=TL_DTYPE[mid], CAST_FIRST=cast_before_weight,
            **_blocks(dim // 2, q_heads, kv.shape[1], BLOCK),
            # A fused multiply-add would skip the rounding of the first product in fp32.
            enable_fp_fusion=False,
        )  # fmt: skip
    return outputs[0], outputs[1], rstds[0], rstds[1]


def qk_norm_rope_bwd(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    cast_before_weight: bool,
    unsqueeze_dim: int,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    need_dq_weight: bool,
    need_dk_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write the gradients of q and k, return those of the weights; same contract as `reference.qk_norm_rope_bwd`."""
    sides: list[list[torch.Tensor]] = []
    heads = [0, 0]
    dws: list[torch.Tensor | None] = [None, None]
    for i, (grad, x, weight, rstd, dx, need_dw) in enumerate(
        ((grad_q, q, q_weight, q_rstd, dq, need_dq_weight), (grad_k, k, k_weight, k_rstd, dk, need_dk_weight))
    ):
        # What is not wanted is not touched, but the kernel needs some tensor in its place.
        views = [_heads_first(x if t is None else t, unsqueeze_dim) for t in (grad, x, dx)]
        sides.append([*views, weight.contiguous(), _heads_first(rstd, unsqueeze_dim)])
        if grad is not None and (need_dw or dx is not None):
            heads[i] = views[1].shape[1]
            dws[i] = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_dw else None
    if not any(heads):
        return None, None
    sums = [dw for dw in dws if dw is not None]
    batch, _, seq, dim = sides[0][1].shape
    n_tokens, iters = batch * seq, 1
    if sums:
        # A power of two, so that few token counts compile anew.
        iters = next_power_of_2(cdiv(n_tokens, DW_PROGRAMS * multiprocessors(q)))
    programs = cdiv(n_tokens, iters)
    parts = torch.empty((len(sums), programs, dim), dtype=torch.float32, device=q.device) if sums else q
    kernel: Any = qk_norm_rope_bwd_kernel
    with on_device_of(q):
        kernel[(programs,)](
            *sides[0], parts[0], *sides[1], parts[-1], cos, sin, n_tokens, seq, offset,
            *(number for grad, x, dx, _, rstd in sides for t in (grad, x, dx, rstd) for number in t.stride()),
            *_table_strides(cos), *_table_strides(sin),
            Q_DX=dq is not None, Q_DW=dws[0] is not None, K_DX=dk is not None, K_DW=dws[1] is not None, ITERS=iters,
            NORMED=TL_DTYPE[_normed_dtype(q, q_weight, cast_before_weight)], CAST_FIRST=cast_before_weight,
            **_blocks(dim // 2, heads[0], heads[1], DW_BLOCK if sums else BLOCK),
            enable_fp_fusion=False,
        )  # fmt: skip
        if sums:
            sum_parts(parts, sums)
    return dws[0], dws[1]
