"""Norms of a decoder block in Triton: forward with the residual added, backward that also gives the output back."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .norm_rows import row_tile
from .rows import cdiv

if TYPE_CHECKING:
    from .ops.block_norm import Norm


@triton.jit
def _normed(x, mean, rstd, w, b, element, CAST_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr):
    """xhat, and the norm's output in fp32, not yet rounded to its dtype; the same in both directions, to the bit."""
    xhat = (x - mean) * rstd
    factor = xhat
    if CAST_FIRST:
        factor = xhat.to(element).to(tl.float32)
    y = factor * w
    if HAS_BIAS:
        y += b
    return xhat, y


@triton.jit
def block_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, res_ptr, y_ptr, stats_ptr, n_rows, x_row, res_row, y_row, eps, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAST_FIRST: tl.constexpr, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows to a program."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    mask = in_rows[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + at * x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    w = (offset + tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32))[None, :]
    b = w
    if HAS_BIAS:
        b = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    mean = tl.zeros([BLOCK_M], tl.float32)
    if LAYER:
        mean = tl.sum(x, axis=1) / N
        tl.store(stats_ptr + n_rows + rows, mean, mask=in_rows)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    tl.store(stats_ptr + rows, rstd, mask=in_rows)
    _, y = _normed(x, mean[:, None], rstd[:, None], w, b, x_ptr.dtype.element_ty, CAST_FIRST, HAS_BIAS)
    if HAS_RES:
        # The norm's own output is rounded before it is added, as upstream's two steps have it.
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(res_ptr + at * res_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * y_row + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def block_norm_bwd_kernel(
    dn_ptr, x_ptr, w_ptr, b_ptr, stats_ptr, res_ptr, dx_ptr, n_rows, dn_row, x_row, res_row, dx_row, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAST_FIRST: tl.constexpr, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr,
    NEED_DX: tl.constexpr, RESTORE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows to a program; with RESTORE the gradient's memory gets the norm's output."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    mask = in_rows[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None]
    element = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at * x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    w = (offset + tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32))[None, :]
    b = w
    if HAS_BIAS:
        b = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    rstd = tl.load(stats_ptr + rows, mask=in_rows, other=0.0)[:, None]
    mean = tl.zeros([BLOCK_M, 1], tl.float32)
    if LAYER:
        mean = tl.load(stats_ptr + n_rows + rows, mask=in_rows, other=0.0)[:, None]
    xhat, y = _normed(x, mean, rstd, w, b, element, CAST_FIRST, HAS_BIAS)
    if NEED_DX:
        g = tl.load(dn_ptr + at * dn_row + cols[None, :], mask=mask, other=0.0).to(tl.float32) * w
        if CAST_FIRST:
            g = g.to(element).to(tl.float32)
        xhat = tl.where(mask, xhat, 0.0)
        slope = tl.sum(g * xhat, axis=1)[:, None] / N
        dx = g - xhat * slope
        if LAYER:
            dx -= tl.sum(g, axis=1)[:, None] / N
        dx *= rstd
        if HAS_RES:
            dx += tl.load(res_ptr + at * res_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            # dx may lie there, and short rows be held by more threads than they have numbers: all read before one
            # writes.
            tl.debug_barrier()
        tl.store(dx_ptr + at * dx_row + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if RESTORE:
        tl.debug_barrier()
        tl.store(dn_ptr + at * dn_row + cols[None, :], y.to(dn_ptr.dtype.element_ty), mask=mask)


def block_norm_fwd(
    x: torch.Tensor, norm: "Norm", residual: torch.Tensor | None, out: torch.Tensor, stats: torch.Tensor
) -> None:
    """Write `out` and `stats`; same contract as `reference_blocks.block_norm_fwd`."""
    n_rows, n = x.shape
    block_n, block_m, warps = row_tile(n)
    with on_device_of(x):
        block_norm_fwd_kernel[(cdiv(n_rows, block_m),)](
            x, norm.weight, norm.weight if norm.bias is None else norm.bias, x if residual is None else residual,
            out, stats, n_rows, x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
            norm.eps, norm.offset, N=n, BLOCK_N=block_n, BLOCK_M=block_m, CAST_FIRST=norm.cast_before_weight,
            LAYER=norm.is_layer, HAS_BIAS=norm.bias is not None, HAS_RES=residual is not None, num_warps=warps,
        )  # fmt: skip


def block_norm_bwd(
    dn: torch.Tensor,
    x: torch.Tensor,
    norm: "Norm",
    stats: torch.Tensor,
    residual_grad: torch.Tensor | None,
    dx: torch.Tensor | None,
    restore: bool,
) -> None:
    """Write `dx`, and with `restore` norm(x) into `dn`; same contract as `reference_blocks.block_norm_bwd`."""
    n_rows, n = x.shape
    block_n, block_m, warps = row_tile(n)
    res = x if residual_grad is None else residual_grad
    target = x if dx is None else dx
    with on_device_of(x):
        block_norm_bwd_kernel[(cdiv(n_rows, block_m),)](
            dn, x, norm.weight, norm.weight if norm.bias is None else norm.bias, stats, res, target, n_rows,
            dn.stride(0), x.stride(0), res.stride(0), target.stride(0), norm.offset,
            N=n, BLOCK_N=block_n, BLOCK_M=block_m, CAST_FIRST=norm.cast_before_weight, LAYER=norm.is_layer,
            HAS_BIAS=norm.bias is not None, HAS_RES=residual_grad is not None, NEED_DX=dx is not None,
            RESTORE=restore, num_warps=warps,
        )  # fmt: skip
