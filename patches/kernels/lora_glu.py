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
from .low_rank_tiles import TILES, columns_of, factor_tile, plus_low_rank, rank_tile, term_arguments
from .rows import cdiv

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank

# The backward's, measured on an H200 like `TILES`.
BACKWARD = (32, 4, 4, 3)
# Where a multiprocessor has less shared memory than this.
SMALL_SHARED = 2**17
SMALL_BACKWARD = (16, 4, 4, 1)


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


@triton.jit
def lora_glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dx_ptr, db_ptr, gx_ptr, gb_ptr, ux_ptr, ub_ptr, n_rows, n,
    dy_row, g_row, u_row, dg_row, du_row, dx_row, db_n, db_r, gx_row, gb_n, gb_r, ux_row, ub_n, ub_r,
    ACTIVATION: tl.constexpr, DOWN_R: tl.constexpr, GATE_R: tl.constexpr, UP_R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILES tiles to a program; each element is read before it is written, so outputs may be gate and up."""
    columns = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    cols = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    gate_b = factor_tile(gb_ptr, cols, in_cols, gb_n, gb_r, GATE_R, BLOCK_R)
    up_b = factor_tile(ub_ptr, cols, in_cols, ub_n, ub_r, UP_R, BLOCK_R)
    down_b = factor_tile(db_ptr, cols, in_cols, db_n, db_r, DOWN_R, BLOCK_R)
    element = gate_ptr.dtype.element_ty
    for i in tl.range(0, TILES, num_stages=STAGES):
        rows = ((pid // columns) * TILES + i).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
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
        dgate = (dy * up).to(element).to(tl.float32) * act_grad(gate, ACTIVATION)
        tl.store(dgate_ptr + rows[:, None] * dg_row + cols[None, :], dgate.to(element), mask=mask)
        tl.store(dup_ptr + rows[:, None] * du_row + cols[None, :], (dy * factor).to(element), mask=mask)
        tl.store(at_dy, (factor * up).to(element), mask=mask)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _backward_tiles(dy: torch.Tensor) -> tuple[int, int, int, int]:
    """`BACKWARD`, or what takes less shared memory."""
    is_small = not dy.is_cuda or _shared_memory(dy.get_device()) < SMALL_SHARED
    return SMALL_BACKWARD if is_small else BACKWARD


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
) -> None:
    """Write `dgate` and `dup`, and the output into `dy`; same contract as `reference_blocks.lora_glu_bwd`."""
    n_rows, n = gate.shape
    dx, db, *d_strides, d_rank = term_arguments(dy_term, gate)
    gx, gb, *g_strides, g_rank = term_arguments(gate_term, gate)
    ux, ub, *u_strides, u_rank = term_arguments(up_term, gate)
    block_r = rank_tile(d_rank, g_rank, u_rank)
    block_m, warps, tiles, stages = _backward_tiles(dy)
    block_n = columns_of(block_r, gate.dtype)
    with on_device_of(gate):
        lora_glu_bwd_kernel[(cdiv(n_rows, tiles * block_m) * cdiv(n, block_n),)](
            dy, gate, up, dgate, dup, dx, db, gx, gb, ux, ub, n_rows, n,
            dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            *d_strides, *g_strides, *u_strides, ACTIVATION=activation, DOWN_R=d_rank, GATE_R=g_rank, UP_R=u_rank,
            BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles, STAGES=stages, num_warps=warps,
        )  # fmt: skip
