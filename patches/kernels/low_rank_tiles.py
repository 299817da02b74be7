"""Low-rank terms x b^T of the tiles that a Triton program works on: b is read once, x with each tile."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .rows import next_power_of_2

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank

# Measured on an H200: rows of a tile, warps, tiles below each other in a program, and how many of these are on their
# way at once. B is read once for all of them; and what is on its way lies in shared memory, from where it is read as
# the products' results lie in the registers.
TILES = (16, 4, 4, 3)
# Bytes of B that a program holds for each term; of a row of a tile at least, a line of the cache; and columns of a tile
# at most. A tile has at least as many numbers as there are threads, so none of it is read by one after another has
# written there.
FACTOR, LINE = 2**12, 2**7
COLUMNS = 128


@triton.jit
def factor_tile(b_ptr, cols, in_cols, b_n, b_r, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """b^T [BLOCK_R, BLOCK_N] for the tile's columns; zeros without a term."""
    if R > 0:
        rank = tl.arange(0, BLOCK_R)
        mask = (rank < R)[:, None] & in_cols[None, :]
        b = tl.load(b_ptr + rank[:, None] * b_r + cols[None, :] * b_n, mask=mask, other=0.0)
    else:
        b = tl.zeros((BLOCK_R, cols.shape[0]), b_ptr.dtype.element_ty)
    return b


@triton.jit
def plus_low_rank(y, x_ptr, b, rows, in_rows, x_row, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """y + x b^T for a tile, rounded to the dtype that x has; y [BLOCK_M, BLOCK_N] in fp32."""
    if R > 0:
        rank = tl.arange(0, BLOCK_R)
        x_mask = in_rows[:, None] & (rank < R)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + rank[None, :], mask=x_mask, other=0.0)
        y = tl.dot(x, b, acc=y, input_precision="ieee").to(x.dtype).to(tl.float32)
    return y


@triton.jit
def plus_sum_over_rows(
    total, x_ptr, y, rows, in_rows, x_row, R: tl.constexpr, BLOCK_R: tl.constexpr, WANTED: tl.constexpr
):
    """total + x^T y for a tile, `total` [BLOCK_R, BLOCK_N] in fp32.

    x is read in this order beside that of `plus_low_rank`: one tile for both products would not be copied ahead.
    """
    if WANTED:
        rank = tl.arange(0, BLOCK_R)
        x_mask = (rank < R)[:, None] & in_rows[None, :]
        x = tl.load(x_ptr + rank[:, None] + rows[None, :] * x_row, mask=x_mask, other=0.0)
        total = tl.dot(x, y, acc=total, input_precision="ieee")
    return total


def term_arguments(
    term: "LowRank | None", other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int, int, int, int]:
    """(x, b, strides of x's rows and of b's both dimensions, rank)."""
    if term is None:
        return other, other, 0, 0, 0, 0
    return term.x, term.b, term.x.stride(0), term.b.stride(0), term.b.stride(1), term.x.shape[1]


def columns_of(block_r: int, dtype: torch.dtype, factor: int = FACTOR) -> int:
    """Columns of a tile whose term has so many ranks, where a program holds `factor` bytes of B."""
    return min(COLUMNS, max(LINE // dtype.itemsize, factor // (block_r * dtype.itemsize)))


def rank_tile(*ranks: int) -> int:
    """Ranks that a program holds of each term."""
    return max(16, next_power_of_2(max(ranks)))
