"""Gated activations in Triton that add the low-rank terms of gate and up on the way."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .activation import act, act_grad
from .dispatch import on_device_of
from .rows import cdiv, next_power_of_2

if TYPE_CHECKING:
    from .ops.lora_glu import LowRank

# Measured on an H200: rows and columns of a tile, warps. Small tiles leave room for many programs at once, which hides
# that a product's result and what it is added to lie differently in the registers.
FORWARD = (32, 64, 2)
BACKWARD = (32, 32, 2)


@triton.jit
def _plus_low_rank(
    y, x_ptr, b_ptr, rows, cols, in_rows, in_cols, x_row, b_n, b_r, R: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """y + x b^T for a tile, rounded to the dtype that x has; y [BLOCK_M, BLOCK_N] in fp32."""
    if R > 0:
        rank = tl.arange(0, BLOCK_R)
        x_mask = in_rows[:, None] & (rank < R)[None, :]
        b_mask = (rank < R)[:, None] & in_cols[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + rank[None, :], mask=x_mask, other=0.0)
        b = tl.load(b_ptr + rank[:, None] * b_r + cols[None, :] * b_n, mask=b_mask, other=0.0)
        y = (y + tl.dot(x, b, input_precision="ieee")).to(x.dtype).to(tl.float32)
    return y


@triton.jit
def lora_glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gx_ptr, gb_ptr, ux_ptr, ub_ptr, n_rows, n, g_row, u_row, y_row,
    gx_row, gb_n, gb_r, ux_row, ub_n, ub_r,
    ACTIVATION: tl.constexpr, GATE_R: tl.constexpr, UP_R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile to a program."""
    tiles = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n_rows
    cols = (pid % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    mask = in_rows[:, None] & in_cols[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * g_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * u_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = _plus_low_rank(gate, gx_ptr, gb_ptr, rows, cols, in_rows, in_cols, gx_row, gb_n, gb_r, GATE_R, BLOCK_R)
    up = _plus_low_rank(up, ux_ptr, ub_ptr, rows, cols, in_rows, in_cols, ux_row, ub_n, ub_r, UP_R, BLOCK_R)
    element = gate_ptr.dtype.element_ty
    factor = act(gate, ACTIVATION).to(element).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * y_row + cols[None, :], (factor * up).to(element), mask=mask)


@triton.jit
def lora_glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dx_ptr, db_ptr, gx_ptr, gb_ptr, ux_ptr, ub_ptr, n_rows, n,
    dy_row, g_row, u_row, dg_row, du_row, dx_row, db_n, db_r, gx_row, gb_n, gb_r, ux_row, ub_n, ub_r,
    ACTIVATION: tl.constexpr, DOWN_R: tl.constexpr, GATE_R: tl.constexpr, UP_R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile to a program; each element is read before it is written, so outputs may be gate and up."""
    tiles = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n_rows
    cols = (pid % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n
    mask = in_rows[:, None] & in_cols[None, :]
    at_dy = dy_ptr + rows[:, None] * dy_row + cols[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * g_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * u_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(at_dy, mask=mask, other=0.0).to(tl.float32)
    gate = _plus_low_rank(gate, gx_ptr, gb_ptr, rows, cols, in_rows, in_cols, gx_row, gb_n, gb_r, GATE_R, BLOCK_R)
    up = _plus_low_rank(up, ux_ptr, ub_ptr, rows, cols, in_rows, in_cols, ux_row, ub_n, ub_r, UP_R, BLOCK_R)
    dy = _plus_low_rank(dy, dx_ptr, db_ptr, rows, cols, in_rows, in_cols, dx_row, db_n, db_r, DOWN_R, BLOCK_R)
    element = gate_ptr.dtype.element_ty
    factor = act(gate, ACTIVATION).to(element).to(tl.float32)
    dgate = (dy * up).to(element).to(tl.float32) * act_grad(gate, ACTIVATION)
    # Where a tile is held by more threads than it has numbers, all must have read before one writes.
    tl.debug_barrier()
    tl.store(dgate_ptr + rows[:, None] * dg_row + cols[None, :], dgate.to(element), mask=mask)
    tl.store(dup_ptr + rows[:, None] * du_row + cols[None, :], (dy * factor).to(element), mask=mask)
    tl.store(at_dy, (factor * up).to(element), mask=mask)


def _term(term: "LowRank | None", other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int, int, int]:
    """(x, b, strides of x's rows and of b's both dimensions, rank)."""
    if term is None:
        return other, other, 0, 0, 0, 0
    return term.x, term.b, term.x.stride(0), term.b.stride(0), term.b.stride(1), term.x.shape[1]


def _block_r(*ranks: int) -> int:
    return max(16, next_power_of_2(max(ranks)))


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
    block_m, block_n, warps = FORWARD
    gx, gb, *g_strides, g_rank = _term(gate_term, gate)
    ux, ub, *u_strides, u_rank = _term(up_term, gate)
    with on_device_of(gate):
        lora_glu_fwd_kernel[(cdiv(n_rows, block_m) * cdiv(n, block_n),)](
            gate, up, out, gx, gb, ux, ub, n_rows, n, gate.stride(0), up.stride(0), out.stride(0),
            *g_strides, *u_strides, ACTIVATION=activation, GATE_R=g_rank, UP_R=u_rank,
            BLOCK_R=_block_r(g_rank, u_rank), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
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
    block_m, block_n, warps = BACKWARD
    dx, db, *d_strides, d_rank = _term(dy_term, gate)
    gx, gb, *g_strides, g_rank = _term(gate_term, gate)
    ux, ub, *u_strides, u_rank = _term(up_term, gate)
    with on_device_of(gate):
        lora_glu_bwd_kernel[(cdiv(n_rows, block_m) * cdiv(n, block_n),)](
            dy, gate, up, dgate, dup, dx, db, gx, gb, ux, ub, n_rows, n,
            dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0),
            *d_strides, *g_strides, *u_strides, ACTIVATION=activation, DOWN_R=d_rank, GATE_R=g_rank, UP_R=u_rank,
            BLOCK_R=_block_r(d_rank, g_rank, u_rank), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip
