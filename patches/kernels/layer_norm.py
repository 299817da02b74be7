"""LayerNorm in Triton: a few rows to a program, statistics in fp32, parameter gradients by deterministic partial sums.

A row is one tile in registers, so that its variance is taken of the centred values without a second read.
"""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import multiprocessors, on_device_of
from .norm_rows import empty_statistic, row_tile, rows_of
from .partial_sums import sum_parts
from .rows import cdiv, next_power_of_2, row_offsets, unit_stride

# With parameter gradients a program also keeps two fp32 accumulators and the next row; beyond, they are a second pass.
DW_TILE = 8192


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, n_rows, size1, size2, x0, x1, x2, s0, s1, s2, y0, y1, y2, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, NDIM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows to a program."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    in_cols = cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
    y_at = row_offsets(rows, size1, size2, y0, y1, y2, NDIM)
    s_at = row_offsets(rows, size1, size2, s0, s1, s2, NDIM)
    x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    tl.store(mean_ptr + s_at, mean, mask=in_rows)
    tl.store(rstd_ptr + s_at, rstd, mask=in_rows)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(w_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + y_at[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, parts_ptr, n_rows, size1, size2,
    x0, x1, x2, g0, g1, g2, s0, s1, s2, d0, d1, d2,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITERS: tl.constexpr, NDIM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows at a time, ITERS times; partial sums of the weight gradient and then of the bias's in `parts`."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    in_cols = (cols < N)[None, :]
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    last = tl.minimum(n_rows, (pid + 1) * (BLOCK_M * ITERS))
    rows = pid * (BLOCK_M * ITERS) + tl.arange(0, BLOCK_M)
    mask = (rows < last)[:, None] & in_cols
    x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
    g_at = row_offsets(rows, size1, size2, g0, g1, g2, NDIM)
    raw_x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0)
    raw_dy = tl.load(dy_ptr + g_at[:, None] + cols[None, :], mask=mask, other=0.0)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
        s_at = row_offsets(rows, size1, size2, s0, s1, s2, NDIM)
        mean = tl.load(mean_ptr + s_at, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + s_at, mask=in_rows, other=0.0)[:, None]
        dy = raw_dy.to(tl.float32)
        # Outside the row it is not 0, but is only ever multiplied by dy, which is.
        xhat = (raw_x.to(tl.float32) - mean) * rstd
        if NEED_DX:
            g = dy
            if HAS_WEIGHT:
                g = dy * w
            level = tl.sum(g, axis=1) / N
            slope = tl.sum(g * xhat, axis=1) / N
            dx = rstd * (g - level[:, None] - xhat * slope[:, None])
            d_at = row_offsets(rows, size1, size2, d0, d1, d2, NDIM)
            at = d_at[:, None] + cols[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=in_rows[:, None] & in_cols)
        if NEED_DW:
            dw += dy * xhat
        if NEED_DB:
            db += dy
        if ITERS > 1:
            rows = next_rows
            raw_x = next_x
            raw_dy = next_dy
    if NEED_DW:
        tl.store(parts_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=cols < N)
        parts_ptr += tl.num_programs(0) * N
    if NEED_DB:
        tl.store(parts_ptr + pid * N + cols, tl.sum(db, axis=0), mask=cols < N)


@triton.jit
def layer_norm_dw_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, parts_ptr, n_rows, size1, size2, x0, x1, x2, g0, g1, g2, s0, s1, s2,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITERS: tl.constexpr, NDIM: tl.constexpr,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
):  # fmt: skip
    """The same partial sums of long rows: BLOCK_N columns of ITERS * BLOCK_M rows to a program."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(ITERS):
        rows = (part * ITERS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & (cols < N)[None, :]
        g_at = row_offsets(rows, size1, size2, g0, g1, g2, NDIM)
        dy = tl.load(dy_ptr + g_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_DW:
            x_at = row_offsets(rows, size1, size2, x0, x1, x2, NDIM)
            s_at = row_offsets(rows, size1, size2, s0, s1, s2, NDIM)
            mean = tl.load(mean_ptr + s_at, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + s_at, mask=in_rows, other=0.0)
            x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dw += dy * ((x - mean[:, None]) * rstd[:, None])
        if NEED_DB:
            db += dy
    if NEED_DW:
        tl.store(parts_ptr + part * N + cols, tl.sum(dw, axis=0), mask=cols < N)
        parts_ptr += tl.num_programs(1) * N
    if NEED_DB:
        tl.store(parts_ptr + part * N + cols, tl.sum(db, axis=0), mask=cols < N)


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, mean, rstd); same contract as `reference.layer_norm_fwd`."""
    n = x.shape[-1]
    n_rows = x.numel() // n
    x = unit_stride(x)
    y = torch.empty_like(x)
    mean = empty_statistic(x)
    rstd = torch.empty_like(mean)
    walk = rows_of(x, y, statistic=mean)
    if walk is None:
        return layer_norm_fwd(x.contiguous(), weight, bias, eps)
    ndim, numbers = walk
    block_n, block_m, warps = row_tile(n)
    with on_device_of(x):
        layer_norm_fwd_kernel[(cdiv(n_rows, block_m),)](
            x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
            y, mean, rstd, n_rows, *numbers, eps,
            N=n, BLOCK_N=block_n, BLOCK_M=block_m, NDIM=ndim,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
) -> None:
    """Write the gradients that are wanted; same contract as `reference.layer_norm_bwd`."""
    n = x.shape[-1]
    n_rows = x.numel() // n
    dy, x = unit_stride(dy), unit_stride(x)
    if mean.stride() != rstd.stride():
        # They are walked as one, but may come back from a saved-tensor hook in strides of their own.
        mean, rstd = torch.stack((mean, rstd))
    # Without dx its slot in the walk is filled by dy and never used.
    walk = rows_of(x, dy, dy if dx is None else dx, statistic=mean)
    if walk is None or (dx is not None and n > 1 and dx.stride(-1) != 1):
        flat = None if dx is None else torch.empty(x.shape, dtype=dx.dtype, device=dx.device)
        dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
        layer_norm_bwd(dy, x, weight, mean, rstd, flat, dw, db)
        if dx is not None and flat is not None:
            dx.copy_(flat)
        return
    ndim, numbers = walk
    sums = [t for t in (dw, db) if t is not None]
    fused = bool(sums) and n <= DW_TILE
    block_n, block_m, warps = row_tile(n)
    parts = x
    with on_device_of(x):
        iters = 1
        if fused:
            # Two programs for each multiprocessor; a power of two, so that few row counts compile anew. Not twice the
            # warps, as in RMSNorm: with a second accumulator, registers would suffice for one program of 4096 columns.
            iters = next_power_of_2(cdiv(n_rows, block_m * 2 * multiprocessors(x)))
            parts = x.new_empty((len(sums), cdiv(n_rows, block_m * iters), n), dtype=torch.float32)
        elif sums:
            columns = cdiv(n, 128)
            wanted = max(1, 4 * multiprocessors(x) // columns)
            dw_iters = next_power_of_2(cdiv(n_rows, 16 * wanted))
            parts = x.new_empty((len(sums), cdiv(n_rows, 16 * dw_iters), n), dtype=torch.float32)
            # Before dx is written, which may be dy's own buffer.
            layer_norm_dw_kernel[(columns, parts.shape[1])](
                dy, x, mean, rstd, parts, n_rows, *numbers[:11],
                N=n, BLOCK_N=128, BLOCK_M=16, ITERS=dw_iters, NDIM=ndim,
                NEED_DW=dw is not None, NEED_DB=db is not None, num_warps=4,
            )  # fmt: skip
        if dx is not None or fused:
            layer_norm_bwd_kernel[(cdiv(n_rows, block_m * iters),)](
                dy, x, x if weight is None else weight.contiguous(), mean, rstd, x if dx is None else dx, parts,
                n_rows, *numbers,
                N=n, BLOCK_N=block_n, BLOCK_M=block_m, ITERS=iters, NDIM=ndim, HAS_WEIGHT=weight is not None,
                NEED_DX=dx is not None, NEED_DW=fused and dw is not None, NEED_DB=fused and db is not None,
                num_warps=warps,
            )  # fmt: skip
        if sums:
            sum_parts(parts, sums)
