"""Gated activations in Triton that add the low-rank terms of gate and up on the way."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .activation import act, act_grad
from .dispatch import on_device_of
from .low_rank_tiles import (
    TILES,
    columns_of,
    factor_tile,
    plus_low_rank,
    plus_sum_over_rows,
    rank_tile,
    term_arguments,
)
from .rows import cdiv

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank, Sums

# The backward's, measured on an H200 like `TILES`.
BACKWARD = (32, 4, 4, 3)
# Where a multiprocessor has less shared memory than this.
SMALL_SHARED = 2**17
SMALL_BACKWARD, SMALL_SUMMED = (16, 4, 4, 1), (16, 4, 1)
# With sums over rows: rows of a tile, warps, how many tiles are on their way, and bytes of B that a program holds.
SUMMED, SUMMED_FACTOR = (32, 4, 3), 2**11
# And in how many parts they are summed at most, with so many tiles to a program at least.
PARTS, SUMMED_TILES = 4, 8


@triton.jit
def lora_glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gx_ptr, gb_ptr, ux_ptr, ub_ptr, n_rows, n, g_row, u_row, y_row,
    gx_row, gb_n, gb_r, ux_row, ub_n, ub_r,
    ACTIVATION: tl.constexpr, GATE_R: tl.constexpr, UP_R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILES tiles below each other to a program."""
    columns = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    cols = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    gate_b = factor_tile(gb_ptr, cols, in_cols, gb_n, gb_r, GATE_R, BLOCK_R)
    up_b = factor_tile(ub_ptr, cols, in_cols, ub_n, ub_r, UP_R, BLOCK_R)
    element = gate_ptr.dtype.element_ty
    for i in tl.range(0, TILES, num_stages=STAGES):
        rows = ((pid // columns) * TILES + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        gate = tl.load(gate_ptr + rows[:, None] * g_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows[:, None] * u_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = plus_low_rank(gate, gx_ptr, gate_b, rows, in_rows, gx_row, GATE_R, BLOCK_R)
        up = plus_low_rank(up, ux_ptr, up_b, rows, in_rows, ux_row, UP_R, BLOCK_R)
        factor = act(gate, ACTIVATION).to(element).to(tl.float32)
        tl.store(y_ptr + rows[:, None] * y_row + cols[None, :], (factor * up).to(element), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def lora_glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, sums_ptr, dx_ptr, db_ptr, gx_ptr, gb_ptr, ux_ptr, ub_ptr, n_rows, n,
    tiles, dy_row, g_row, u_row, dg_row, du_row, dx_row, db_n, db_r, gx_row, gb_n, gb_r, ux_row, ub_n, ub_r,
    ACTIVATION: tl.constexpr, DOWN_R: tl.constexpr, GATE_R: tl.constexpr, UP_R: tl.constexpr, BLOCK_R: tl.constexpr,
    SUM_UP: tl.constexpr, SUM_DOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`tiles` below each other to a program; each element is read before it is written: outputs may be gate and up.

    With sums, program (s, c) leaves those of its rows in [s] of `sums_ptr`, one after the other: dgate^T x of gate
    [n, r], dup^T x of up [n, r], x^T y of down [r, n]. Without that of down, y is written.
    """
    columns = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    cols = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    gate_b = factor_tile(gb_ptr, cols, in_cols, gb_n, gb_r, GATE_R, BLOCK_R)
    up_b = factor_tile(ub_ptr, cols, in_cols, ub_n, ub_r, UP_R, BLOCK_R)
    down_b = factor_tile(db_ptr, cols, in_cols, db_n, db_r, DOWN_R, BLOCK_R)
    gate_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    up_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    down_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    element = gate_ptr.dtype.element_ty
    for i in tl.range(0, tiles, num_stages=STAGES):
        rows = ((pid // columns) * tiles + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        at_dy = dy_ptr + rows[:, None] * dy_row + cols[None, :]
        gate = tl.load(gate_ptr + rows[:, None] * g_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows[:, None] * u_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(at_dy, mask=mask, other=0.0).to(tl.float32)
        gate = plus_low_rank(gate, gx_ptr, gate_b, rows, in_rows, gx_row, GATE_R, BLOCK_R)
        up = plus_low_rank(up, ux_ptr, up_b, rows, in_rows, ux_row, UP_R, BLOCK_R)
        dy = plus_low_rank(dy, dx_ptr, down_b, rows, in_rows, dx_row, DOWN_R, BLOCK_R)
        factor = act(gate, ACTIVATION).to(element).to(tl.float32)
        dgate = ((dy * up).to(element).to(tl.float32) * act_grad(gate, ACTIVATION)).to(element)
        dup = (dy * factor).to(element)
        y = (factor * up).to(element)
        tl.store(dgate_ptr + rows[:, None] * dg_row + cols[None, :], dgate, mask=mask)
        tl.store(dup_ptr + rows[:, None] * du_row + cols[None, :], dup, mask=mask)
        if not SUM_DOWN:
            tl.store(at_dy, y, mask=mask)
        gate_sum = plus_sum_over_rows(
            gate_sum, gx_ptr, dgate, rows, in_rows, gx_row, GATE_R, BLOCK_R, SUM_UP and GATE_R > 0
        )
        up_sum = plus_sum_over_rows(up_sum, ux_ptr, dup, rows, in_rows, ux_row, UP_R, BLOCK_R, SUM_UP and UP_R > 0)
        down_sum = plus_sum_over_rows(down_sum, dx_ptr, y, rows, in_rows, dx_row, DOWN_R, BLOCK_R, SUM_DOWN)
    rank = tl.arange(0, BLOCK_R)
    # Ranks that are summed, one sum after the other.
    up_at = GATE_R if SUM_UP else 0
    down_at = GATE_R + UP_R if SUM_UP else 0
    all_ranks = down_at + DOWN_R if SUM_DOWN else down_at
    part = sums_ptr + (pid // columns).to(tl.int64) * n * all_ranks
    if SUM_UP and GATE_R > 0:
        at = cols[None, :] * GATE_R + rank[:, None]
        tl.store(part + at, gate_sum, mask=(rank < GATE_R)[:, None] & in_cols[None, :])
    if SUM_UP and UP_R > 0:
        at = n * up_at + cols[None, :] * UP_R + rank[:, None]
        tl.store(part + at, up_sum, mask=(rank < UP_R)[:, None] & in_cols[None, :])
    if SUM_DOWN:
        at = (down_at + rank[:, None]) * n.to(tl.int64) + cols[None, :]
        tl.store(part + at, down_sum, mask=(rank < DOWN_R)[:, None] & in_cols[None, :])


@functools.cache
def _shared_memory(index: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _is_small(dy: torch.Tensor) -> bool:
    """Whether a multiprocessor has little shared memory."""
    return not dy.is_cuda or _shared_memory(dy.get_device()) < SMALL_SHARED


def lora_glu_fwd(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_term: "LowRank | None",
    up_term: "LowRank | None",
    activation: str,
    out: torch.Tensor,
) -> None:
    """Write `out`; same contract as `reference_blocks.lora_glu_fwd`."""
    n_rows, n = gate.shape
    block_m, warps, tiles, stages = TILES
    gx, gb, *g_strides, g_rank = term_arguments(gate_term, gate)
    ux, ub, *u_strides, u_rank = term_arguments(up_term, gate)
    block_r = rank_tile(g_rank, u_rank)
    block_n = columns_of(block_r, gate.dtype)
    with on_device_of(gate):
        lora_glu_fwd_kernel[(cdiv(n_rows, tiles * block_m) * cdiv(n, block_n),)](
            gate, up, out, gx, gb, ux, ub, n_rows, n, gate.stride(0), up.stride(0), out.stride(0),
            *g_strides, *u_strides, ACTIVATION=activation, GATE_R=g_rank, UP_R=u_rank,
            BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles, STAGES=stages, num_warps=warps,
        )  # fmt: skip


def lora_glu_bwd(
    dy: torch.Tensor,
    dy_term: "LowRank | None",
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    activation: str,
    gate_term: "LowRank | None",
    up_term: "LowRank | None",
    sum_up: bool,
    sum_down: bool,
) -> "Sums":
    """Write `dgate` and `dup`, and the output into `dy`; same contract as `reference_blocks.lora_glu_bwd`."""
    n_rows, n = gate.shape
    dx, db, *d_strides, d_rank = term_arguments(dy_term, gate)
    gx, gb, *g_strides, g_rank = term_arguments(gate_term, gate)
    ux, ub, *u_strides, u_rank = term_arguments(up_term, gate)
    sum_up, sum_down = sum_up and g_rank + u_rank > 0, sum_down and d_rank > 0
    block_r = rank_tile(d_rank, g_rank, u_rank)
    block_m, warps, tiles, stages = SMALL_BACKWARD if _is_small(dy) else BACKWARD
    block_n = columns_of(block_r, gate.dtype)
    parts, sizes = 1, [n * g_rank if sum_up else 0, n * u_rank if sum_up else 0, n * d_rank if sum_down else 0]
    if sum_up or sum_down:
        block_m, warps, stages = SMALL_SUMMED if _is_small(dy) else SUMMED
        block_n = columns_of(block_r, gate.dtype, SUMMED_FACTOR)
        tiles = max(SUMMED_TILES, cdiv(cdiv(n_rows, PARTS), block_m))
        parts = cdiv(n_rows, tiles * block_m)
    sums = torch.empty((parts, sum(sizes)), dtype=torch.float32, device=gate.device)
    with on_device_of(gate):
        lora_glu_bwd_kernel[(cdiv(n_rows, tiles * block_m) * cdiv(n, block_n),)](
            dy, gate, up, dgate, dup, sums, dx, db, gx, gb, ux, ub, n_rows, n, tiles,
            dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            *d_strides, *g_strides, *u_strides, ACTIVATION=activation, DOWN_R=d_rank, GATE_R=g_rank, UP_R=u_rank,
            BLOCK_R=block_r, SUM_UP=sum_up, SUM_DOWN=sum_down,
            BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    of_gate, of_up, of_down = (sums[0] if parts == 1 else sums.sum(0)).split(sizes)
    return (
        of_gate.view(n, g_rank) if sizes[0] else None,
        of_up.view(n, u_rank) if sizes[1] else None,
        of_down.view(d_rank, n) if sizes[2] else None,
    )
