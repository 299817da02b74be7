"""Residual, product and low-rank term of a block's end in one Triton kernel."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .low_rank_tiles import TILES, columns_of, factor_tile, plus_low_rank, rank_tile, term_arguments
from .rows import cdiv

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank


@triton.jit
def lora_residual_kernel(
    y_ptr, res_ptr, out_ptr, x_ptr, b_ptr, n_rows, n, y_row, res_row, out_row, x_row, b_n, b_r,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILES tiles to a program; each element is read before it is written, so `out` may be one of the others."""
    columns = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    cols = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    b = factor_tile(b_ptr, cols, in_cols, b_n, b_r, R, BLOCK_R)
    for i in tl.range(0, TILES, num_stages=STAGES):
        rows = ((pid // columns) * TILES + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        y = tl.load(y_ptr + rows[:, None] * y_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        res = tl.load(res_ptr + rows[:, None] * res_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y = plus_low_rank(y, x_ptr, b, rows, in_rows, x_row, R, BLOCK_R)
        total = (res + y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * out_row + cols[None, :], total, mask=mask)


def lora_residual(y: torch.Tensor, term: "LowRank", residual: torch.Tensor, out: torch.Tensor) -> None:
    """Write `out`; same contract as `reference_blocks.lora_residual`."""
    n_rows, n = y.shape
    x, b, *strides, rank = term_arguments(term, y)
    block_m, warps, tiles, stages = TILES
    block_r = rank_tile(rank)
    block_n = columns_of(block_r, y.dtype)
    with on_device_of(y):
        lora_residual_kernel[(cdiv(n_rows, tiles * block_m) * cdiv(n, block_n),)](
            y, residual, out, x, b, n_rows, n, y.stride(0), residual.stride(0), out.stride(0), *strides,
            R=rank, BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles, STAGES=stages, num_warps=warps,
        )  # fmt: skip
