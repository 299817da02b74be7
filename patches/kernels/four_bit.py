"""Dequantisation of bitsandbytes' four-bit weights in Triton: one launch, from packed bytes to rows of any stride."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .four_bit_weight import FourBit, FourBitRows
from .rows import TL_DTYPE, cdiv, next_power_of_2

_TILE = 4096


@triton.jit
def _unpack(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, to_ptr, first, n,
    TILE: tl.constexpr, UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write up to TILE elements of a row, n at most, of which `first` is the place among all of the weight.

    In units of 8 elements (a 32-bit word) that lie in one row and one block, or of 1. What is added to `first` in a
    tile stays in 32 bits.
    """
    at = tl.arange(0, TILE // UNIT) * UNIT
    inside = at < n
    within = tl.arange(0, UNIT)
    if UNIT == 8:
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + first // 8 + at // 8, mask=inside, other=0)
        # A word's lowest byte comes first, and in each byte the high nibble.
        nibbles = (words[:, None] >> ((within ^ 1) * 4)[None, :]) & 15
    else:
        odd = (first % 2).to(tl.int32) + at
        bytes_ = tl.load(packed_ptr + first // 2 + odd // 2, mask=inside, other=0).to(tl.int32)
        nibbles = ((bytes_ >> ((odd & 1) ^ 1) * 4) & 15)[:, None]
    block0 = first // BLOCKSIZE
    block = ((first % BLOCKSIZE).to(tl.int32) + at) // BLOCKSIZE
    scale = tl.load(absmax_ptr + block0 + block, mask=inside, other=0)
    if NESTED:
        nested = ((block0 % NESTED).to(tl.int32) + block) // NESTED
        outer = tl.load(nested_absmax_ptr + block0 // NESTED + nested, mask=inside, other=0.0)
        # Two roundings: the launcher forbids to fuse them.
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    values = (tl.load(code_ptr + nibbles) * scale[:, None]).to(DTYPE).to(to_ptr.dtype.element_ty)
    tl.store(to_ptr + (at[:, None] + within[None, :]), values, mask=inside[:, None])


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, cols, stride, tiles,
    TILE: tl.constexpr, UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of one row."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    start = (pid % tiles) * TILE
    _unpack(
        packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        out_ptr + row * stride + start, row * cols + start, cols - start, TILE, UNIT, BLOCKSIZE, NESTED, DTYPE,
    )  # fmt: skip


@triton.jit
def dequantize_rows_kernel(
    table_ptr, out_ptr, cols, tiles,
    WEIGHTS: tl.constexpr, TILE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of one row of several weights; `table_ptr` is that of `FourBitRows`."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    start = (pid % tiles) * TILE
    which = 0
    first_row = row * 0
    for i in tl.static_range(WEIGHTS - 1):
        end = tl.load(table_ptr + i * 7 + 6)
        which = tl.where(row >= end, i + 1, which)
        first_row = tl.where(row >= end, end, first_row)
    at = table_ptr + which * 7
    absmax = tl.load(at + 1)
    if NESTED:
        absmax_ptr = absmax.to(tl.pointer_type(tl.uint8))
    else:
        absmax_ptr = absmax.to(tl.pointer_type(tl.float32))
    _unpack(
        tl.multiple_of(tl.load(at).to(tl.pointer_type(tl.uint8)), 16), absmax_ptr,
        tl.load(at + 2).to(tl.pointer_type(tl.float32)), tl.load(at + 3).to(tl.pointer_type(tl.float32)),
        tl.load(at + 4).to(tl.pointer_type(tl.float32)), tl.load(at + 5).to(tl.pointer_type(tl.float32)),
        out_ptr + row * cols + start, (row - first_row) * cols + start, cols - start, TILE, 8, BLOCKSIZE, NESTED, DTYPE,
    )  # fmt: skip


def dequantize(weight: FourBit, out: torch.Tensor) -> None:
    """Write the weight into `out`; same contract as `reference_four_bit.dequantize`, but out's inner stride is 1."""
    (rows, cols), stride = weight.shape, out.stride(0)
    if (stride == cols or rows == 1) and rows * cols < 2**31 - _TILE:
        # One long row: tiles need not end where rows do.
        rows, cols = 1, rows * cols
    unit = 8 if cols % 8 == 0 and weight.packed.data_ptr() % 4 == 0 else 1
    tile = min(_TILE, max(8, next_power_of_2(cols)))
    tiles = cdiv(cols, tile)
    nested = weight.nested_absmax is not None
    with on_device_of(out):
        dequantize_kernel[(rows * tiles,)](
            weight.packed, weight.absmax, weight.code, weight.nested_absmax if nested else weight.code,
            weight.nested_code if nested else weight.code, weight.offset if nested else weight.code, out,
            cols, stride, tiles, TILE=tile, UNIT=unit, BLOCKSIZE=weight.blocksize, NESTED=weight.nested_blocksize,
            DTYPE=TL_DTYPE[weight.dtype], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def dequantize_rows(weights: FourBitRows, out: torch.Tensor) -> None:
    """Write all weights into `out`, contiguous; same contract as `ops.four_bit.dequantize_four_bit_rows`."""
    first, cols = weights.weights[0], out.shape[1]
    tile = min(_TILE, next_power_of_2(cols))
    tiles = cdiv(cols, tile)
    with on_device_of(out):
        dequantize_rows_kernel[(weights.rows * tiles,)](
            weights.table, out, cols, tiles, WEIGHTS=len(weights.weights), TILE=tile, BLOCKSIZE=first.blocksize,
            NESTED=first.nested_blocksize, DTYPE=TL_DTYPE[first.dtype], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
