"""RMSNorm in Triton: one program for a few rows, statistics in fp32, weight gradient by deterministic partial sums."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from .dispatch import multiprocessors, on_device_of
from .norm_rows import empty_statistic, row_tile, rows_of
from .partial_sums import sum_parts
from .rows import cdiv, next_power_of_2, row_offsets, unit_stride

# Longest rows that one program keeps in registers; beyond, it walks the row in blocks and reads it twice.
FWD_TILE = 32768
BWD_TILE = 16384
# With the weight gradient a program also keeps an fp32 accumulator and the next row.
DW_TILE = 8192
LOOP_BLOCK = 8192


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, n_rows, size1, size2, x0, x1, x2, y0, y1, y2, r0, r1, r2, eps, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, NDIM: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows to a program."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    mask = in_rows[:, None] & (cols < N)[None, :]
    x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
    y_at = row_offsets(rows, size1, size2, y0, y1, y2, NDIM)
    r_at = row_offsets(rows, size1, size2, r0, r1, r2, NDIM)
    x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    tl.store(rstd_ptr + r_at, rstd, mask=in_rows)
    xhat = x * rstd[:, None]
    if CAST_FIRST:
        xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        w = offset + w
    y = xhat * w[None, :]
    tl.store(y_ptr + y_at[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_fwd_loop_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, n_rows, size1, size2, x0, x1, x2, y0, y1, y2, r0, r1, r2, eps, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, NDIM: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """One long row to a program, read twice: for the statistics, then for the result."""
    row = tl.program_id(0)
    x_at = row_offsets(row, size1, size2, x0, x1, x2, NDIM)
    y_at = row_offsets(row, size1, size2, y0, y1, y2, NDIM)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + x_at + cols, mask=cols < N, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    tl.store(rstd_ptr + row_offsets(row, size1, size2, r0, r1, r2, NDIM), rstd)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + x_at + cols, mask=cols < N, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        xhat = x * rstd
        if CAST_FIRST:
            xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        else:
            w = offset + w
        tl.store(y_ptr + y_at + cols, (xhat * w).to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, n_rows, size1, size2,
    x0, x1, x2, g0, g1, g2, r0, r1, r2, d0, d1, d2, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITERS: tl.constexpr, NDIM: tl.constexpr,
    CAST_FIRST: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows at a time, ITERS times; with NEED_DW each program leaves its partial sum in dw[pid]."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    in_cols = (cols < N)[None, :]
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if not CAST_FIRST:
        w = offset + w
    last = tl.minimum(n_rows, (pid + 1) * (BLOCK_M * ITERS))
    rows = pid * (BLOCK_M * ITERS) + tl.arange(0, BLOCK_M)
    mask = (rows < last)[:, None] & in_cols
    x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
    g_at = row_offsets(rows, size1, size2, g0, g1, g2, NDIM)
    raw_x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0)
    raw_dy = tl.load(dy_ptr + g_at[:, None] + cols[None, :], mask=mask, other=0.0)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(ITERS):
        if ITERS > 1:
            # The next rows are on their way while these are reduced: few programs run, so each must hide its latency.
            next_rows = rows + BLOCK_M
            next_mask = (next_rows < last)[:, None] & in_cols
            x_at = row_offsets(next_rows, size1, size2, x0, x1, x2, NDIM)
            g_at = row_offsets(next_rows, size1, size2, g0, g1, g2, NDIM)
            next_x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=next_mask, other=0.0)
            next_dy = tl.load(dy_ptr + g_at[:, None] + cols[None, :], mask=next_mask, other=0.0)
        in_rows = rows < last
        r_at = row_offsets(rows, size1, size2, r0, r1, r2, NDIM)
        rstd = tl.load(rstd_ptr + r_at, mask=in_rows, other=0.0)[:, None]
        dy = raw_dy.to(tl.float32)
        xhat = raw_x.to(tl.float32) * rstd
        if NEED_DX:
            g = dy * w[None, :]
            if CAST_FIRST:
                g = g.to(x_ptr.dtype.element_ty).to(tl.float32)
            slope = tl.sum(g * xhat, axis=1) / N
            dx = rstd * (g - xhat * slope[:, None])
            d_at = row_offsets(rows, size1, size2, d0, d1, d2, NDIM)
            at = d_at[:, None] + cols[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=in_rows[:, None] & in_cols)
        if NEED_DW:
            if CAST_FIRST:
                xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
            dw += dy * xhat
        if ITERS > 1:
            rows = next_rows
            raw_x = next_x
            raw_dy = next_dy
    if NEED_DW:
        tl.store(dw_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=cols < N)


@triton.jit
def _block_of_row(x_ptr, dy_ptr, w_ptr, cols, offset, N: tl.constexpr, CAST_FIRST: tl.constexpr):
    """x and g = dy * weight at some columns of one row, in fp32."""
    in_row = cols < N
    x = tl.load(x_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if CAST_FIRST:
        g = (g * w).to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        g = g * (offset + w)
    return x, g


@triton.jit
def rms_norm_bwd_loop_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, n_rows, size1, size2,
    x0, x1, x2, g0, g1, g2, r0, r1, r2, d0, d1, d2, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, NDIM: tl.constexpr, CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """The gradient of one long row, read twice: for mean(g * xhat), then for the result."""
    row = tl.program_id(0)
    x_at = row_offsets(row, size1, size2, x0, x1, x2, NDIM)
    g_at = row_offsets(row, size1, size2, g0, g1, g2, NDIM)
    d_at = row_offsets(row, size1, size2, d0, d1, d2, NDIM)
    rstd = tl.load(rstd_ptr + row_offsets(row, size1, size2, r0, r1, r2, NDIM))
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x, g = _block_of_row(x_ptr + x_at, dy_ptr + g_at, w_ptr, cols, offset, N, CAST_FIRST)
        products += g * (x * rstd)
    slope = tl.sum(products, axis=0) / N
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x, g = _block_of_row(x_ptr + x_at, dy_ptr + g_at, w_ptr, cols, offset, N, CAST_FIRST)
        dx = rstd * (g - x * rstd * slope)
        tl.store(dx_ptr + d_at + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def rms_norm_dw_kernel(
    dy_ptr, x_ptr, rstd_ptr, dw_ptr, n_rows, size1, size2, x0, x1, x2, g0, g1, g2, r0, r1, r2,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITERS: tl.constexpr, NDIM: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Partial weight gradients of long rows: BLOCK_N columns of ITERS * BLOCK_M rows to a program."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(ITERS):
        rows = (part * ITERS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & (cols < N)[None, :]
        x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
        g_at = row_offsets(rows, size1, size2, g0, g1, g2, NDIM)
        r_at = row_offsets(rows, size1, size2, r0, r1, r2, NDIM)
        rstd = tl.load(rstd_ptr + r_at, mask=in_rows, other=0.0)
        x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + g_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat = x * rstd[:, None]
        if CAST_FIRST:
            xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        dw += dy * xhat
    tl.store(dw_ptr + part * N + cols, tl.sum(dw, axis=0), mask=cols < N)


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, rstd); same contract as `reference.rms_norm_fwd`."""
    n = x.shape[-1]
    n_rows = x.numel() // n
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_before_weight else x.dtype
    x, weight = unit_stride(x), weight.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    rstd = empty_statistic(x)
    walk = rows_of(x, y, statistic=rstd)
    if walk is None:
        return rms_norm_fwd(x.contiguous(), weight, eps, offset, cast_before_weight)
    ndim, (size1, size2, x0, x1, x2, r0, r1, r2, y0, y1, y2) = walk
    kernel: Any
    if n <= FWD_TILE:
        kernel = rms_norm_fwd_kernel
        block_n, block_m, warps = row_tile(n)
    else:
        kernel = rms_norm_fwd_loop_kernel
        block_n, block_m, warps = LOOP_BLOCK, 1, 16
    with on_device_of(x):
        kernel[(cdiv(n_rows, block_m),)](
            x, weight, y, rstd, n_rows, size1, size2, x0, x1, x2, y0, y1, y2, r0, r1, r2, eps, offset,
            N=n, BLOCK_N=block_n, BLOCK_M=block_m, NDIM=ndim, CAST_FIRST=cast_before_weight, num_warps=warps,
        )  # fmt: skip
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    cast_before_weight: bool,
    dx: torch.Tensor | None,
    need_dw: bool,
) -> torch.Tensor | None:
    """Write the gradient of x into `dx` and return that of the weight; same contract as `reference.rms_norm_bwd`."""
    n = x.shape[-1]
    n_rows = x.numel() // n
    dy, x, weight = unit_stride(dy), unit_stride(x), weight.contiguous()
    # Without dx its slot in the walk is filled by dy and never used.
    walk = rows_of(x, dy, dy if dx is None else dx, statistic=rstd)
    if walk is None or (dx is not None and n > 1 and dx.stride(-1) != 1):
        flat = None if dx is None else torch.empty(x.shape, dtype=dx.dtype, device=dx.device)
        dy, x, rstd = dy.contiguous(), x.contiguous(), rstd.contiguous()
        dw = rms_norm_bwd(dy, x, weight, rstd, offset, cast_before_weight, flat, need_dw)
        if dx is not None and flat is not None:
            dx.copy_(flat)
        return dw
    ndim, numbers = walk
    sizes, x_by, g_by, r_by, d_by = numbers[:2], numbers[2:5], numbers[5:8], numbers[8:11], numbers[11:14]
    block_n, block_m, warps = row_tile(n)
    fused = need_dw and n <= DW_TILE
    dw = None
    with on_device_of(x):
        iters, parts = 1, n_rows
        if fused:
            # Half as many elements a thread as elsewhere, since each program walks rows alone and must hide latency.
            warps = min(32, 2 * warps)
            # Two programs for each multiprocessor; a power of two, so that few row counts compile anew.
            iters = next_power_of_2(cdiv(n_rows, block_m * 2 * multiprocessors(x)))
            parts = cdiv(n_rows, block_m * iters)
        elif need_dw:
            columns = cdiv(n, 128)
            wanted = max(1, 4 * multiprocessors(x) // columns)
            dw_iters = next_power_of_2(cdiv(n_rows, 16 * wanted))
            parts = cdiv(n_rows, 16 * dw_iters)
        partial = torch.empty((parts, n), dtype=torch.float32, device=x.device) if need_dw else x
        if need_dw and not fused:
            # Before dx is written, which may be dy's own buffer.
            rms_norm_dw_kernel[(columns, parts)](
                dy, x, rstd, partial, n_rows, *sizes, *x_by, *g_by, *r_by,
                N=n, BLOCK_N=128, BLOCK_M=16, ITERS=dw_iters, NDIM=ndim, CAST_FIRST=cast_before_weight, num_warps=4,
            )  # fmt: skip
        target = x if dx is None else dx
        if (dx is not None and n <= BWD_TILE) or fused:
            rms_norm_bwd_kernel[(cdiv(n_rows, block_m * iters),)](
                dy, x, weight, rstd, target, partial, n_rows, *sizes, *x_by, *g_by, *r_by, *d_by, offset,
                N=n, BLOCK_N=block_n, BLOCK_M=block_m, ITERS=iters, NDIM=ndim, CAST_FIRST=cast_before_weight,
                NEED_DX=dx is not None, NEED_DW=fused, num_warps=warps,
            )  # fmt: skip
        elif dx is not None:
            rms_norm_bwd_loop_kernel[(n_rows,)](
                dy, x, weight, rstd, dx, partial, n_rows, *sizes, *x_by, *g_by, *r_by, *d_by, offset,
                N=n, BLOCK_N=LOOP_BLOCK, NDIM=ndim, CAST_FIRST=cast_before_weight, num_warps=16,
            )  # fmt: skip
        if need_dw:
            dw = torch.empty_like(weight)
            sum_parts(partial[None], [dw])
    return dw
