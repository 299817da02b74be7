"""Low-rank terms and rotary embedding of the products for q, k and v in one Triton kernel."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .low_rank_tiles import TILES, factor_tile, plus_low_rank, rank_tile, term_arguments
from .rope import rotated
from .rows import TL_DTYPE, cdiv, next_power_of_2

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank


@triton.jit
def lora_rope_kernel(
    y_ptr, x_ptr, b_ptr, cos_ptr, sin_ptr, n_rows, seq, heads, q_heads, turned,
    y_row, x_row, b_n, b_r, cos_b, cos_s, sin_b, sin_s,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, SEPARATE: tl.constexpr,
    MID: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of TILES tiles of rows to a program; the first `turned` heads are turned."""
    pid = tl.program_id(0)
    head = pid % heads
    turned_rows = tl.where(head < turned, n_rows, 0)
    if SEPARATE:
        part = (head >= q_heads).to(tl.int64) + (head >= turned).to(tl.int64)
        x_ptr += part * R
        b_ptr += part * R * b_r
    half = tl.arange(0, BLOCK_HALF).to(tl.int64)
    inside = half < HALF
    low = head.to(tl.int64) * 2 * HALF + half
    low_b = factor_tile(b_ptr, low, inside, b_n, b_r, R, BLOCK_R)
    high_b = factor_tile(b_ptr, low + HALF, inside, b_n, b_r, R, BLOCK_R)
    element = y_ptr.dtype.element_ty
    for i in tl.range(0, TILES, num_stages=STAGES):
        rows = ((pid // heads) * TILES + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & inside[None, :]
        at = y_ptr + rows[:, None] * y_row + low[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        a = plus_low_rank(a, x_ptr, low_b, rows, in_rows, x_row, R, BLOCK_R)
        b = plus_low_rank(b, x_ptr, high_b, rows, in_rows, x_row, R, BLOCK_R)
        cos_at = cos_ptr + ((rows // seq) * cos_b + (rows % seq) * cos_s)[:, None] + half[None, :]
        sin_at = sin_ptr + ((rows // seq) * sin_b + (rows % seq) * sin_s)[:, None] + half[None, :]
        wanted = (rows < turned_rows)[:, None] & inside[None, :]
        low_cos = tl.load(cos_at, mask=wanted, other=0.0).to(tl.float32)
        low_sin = tl.load(sin_at, mask=wanted, other=0.0).to(tl.float32)
        high_cos = tl.load(cos_at + HALF, mask=wanted, other=0.0).to(tl.float32)
        high_sin = tl.load(sin_at + HALF, mask=wanted, other=0.0).to(tl.float32)
        turned_a, turned_b = rotated(a, b, low_cos, low_sin, high_cos, high_sin, MID)
        a = tl.where(wanted, turned_a, a)
        b = tl.where(wanted, turned_b, b)
        tl.store(at, a.to(element), mask=mask)
        tl.store(at + HALF, b.to(element), mask=mask)


def lora_rope(
    y: torch.Tensor,
    term: "LowRank | None",
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Sequence[int],
    separate: bool,
) -> None:
    """Write `y`; same contract as `reference_blocks.lora_rope`."""
    n_rows, seq, half = y.shape[0], cos.shape[1], cos.shape[2] // 2
    x, b, *strides, rank = term_arguments(term, y)
    rank //= 3 if separate else 1
    block_m, warps, tiles, stages = TILES
    q_heads, k_heads, _ = heads
    with on_device_of(y):
        lora_rope_kernel[(cdiv(n_rows, tiles * block_m) * sum(heads),)](
            y, x, b, cos, sin, n_rows, seq, sum(heads), q_heads, q_heads + k_heads, y.stride(0), *strides,
            0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), 0 if sin.shape[0] == 1 else sin.stride(0),
            sin.stride(1), HALF=half, BLOCK_HALF=next_power_of_2(half), R=rank, BLOCK_R=rank_tile(rank),
            SEPARATE=separate, MID=TL_DTYPE[torch.promote_types(y.dtype, cos.dtype)],
            BLOCK_M=block_m, TILES=tiles, STAGES=stages, num_warps=warps,
            # A fused multiply-add would skip the rounding of the first product in fp32.
            enable_fp_fusion=False,
        )  # fmt: skip
