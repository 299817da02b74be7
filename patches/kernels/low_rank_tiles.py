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
def rows_tile(x_ptr, rows, in_rows, x_row, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """x [BLOCK_M, BLOCK_R] for the tile's rows; zeros without a term."""
    if R > 0:
        rank = tl.arange(0, BLOCK_R)
        mask = in_rows[:, None] & (rank < R)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + rank[None, :], mask=mask, other=0.0)
    else:
        x = tl.zeros((rows.shape[0], BLOCK_R), x_ptr.dtype.element_ty)
    return x


@triton.jit
def plus_product(y, x, b, R: tl.constexpr):
    """y + x b^T for tiles, rounded to the dtype that x has; y [BLOCK_M, BLOCK_N] in fp32."""
    if R > 0:
        y = tl.dot(x, b, acc=y, input_precision="ieee").to(x.dtype).to(tl.float32)
    return y


@triton.jit
def plus_low_rank(y, x_ptr, b, rows, in_rows, x_row, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """`plus_product` with the rows of x that belong to the tile."""
    return plus_product(y, rows_tile(x_ptr, rows, in_rows, x_row, R, BLOCK_R), b, R)


@triton.jit
def summed_over_rows(total, x, y, WANTED: tl.constexpr):
    """total + x^T y for a tile, `total` [BLOCK_R, BLOCK_N] in fp32."""
    if WANTED:
        total = tl.dot(tl.trans(x), y, acc=total, input_precision="ieee")
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
