"""The low-rank terms of projections in Triton, for the few rows of a decoding step: x a^T, and y + (x a^T) b^T.

With so few rows both are bound by reading a and b, and by the time that one program takes. So x a^T is split over k
among programs, and whoever adds b sums the parts where it reads them.
"""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .rows import cdiv, next_power_of_2

if TYPE_CHECKING:
    from .ops.decoding import AddedTerm

# Elements of k to a program, and programs that k is split among at most.
PER_SPLIT, MAX_SPLITS = 512, 16
# The least rows of a matrix product; below, a row has a program of its own.
DOT_ROWS = 16


@triton.jit
def low_rank_kernel(
    x_ptr, a_ptr, scales_ptr, out_ptr, n_rows, k, r, x_row, a_row, per_split,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_T, BLOCK_R] of one part of the sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, per_split, BLOCK_K):
        at = split * per_split + start + tl.arange(0, BLOCK_K)
        x_mask, a_mask = (rows < n_rows)[:, None] & (at < k)[None, :], (ranks < r)[:, None] & (at < k)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + at[None, :], mask=x_mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + ranks[:, None] * a_row + at[None, :], mask=a_mask, other=0.0).to(tl.float32)
        if BLOCK_T == 1:
            total += tl.sum(x * a, axis=1)[None, :]
        else:
            total += tl.dot(x, tl.trans(a), input_precision="ieee")
    scales = tl.load(scales_ptr + ranks, mask=ranks < r, other=0.0)
    to = out_ptr + (split * n_rows + rows)[:, None] * r + ranks[None, :]
    tl.store(to, total * scales[None, :], mask=(rows < n_rows)[:, None] & (ranks < r)[None, :])


@triton.jit
def _add(
    y_ptr, b_ptr, xa_ptr, residual_ptr, n_rows, n, y_row, b_n, b_r, xa_row, residual_row, first_col,
    R: tl.constexpr, SPLITS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < n_rows, cols < n
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        mask = in_rows[:, None] & (ranks < R)[None, :]
        xa = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for split in range(SPLITS):
            part = xa_ptr + (split * n_rows + rows)[:, None] * xa_row + first_col + ranks[None, :]
            xa += tl.load(part, mask=mask, other=0.0)
        at_b = b_ptr + cols[:, None] * b_n + ranks[None, :] * b_r
        b = tl.load(at_b, mask=in_cols[:, None] & (ranks < R)[None, :], other=0.0).to(tl.float32)
        if BLOCK_T == 1:
            total += tl.sum(xa * b, axis=1)[None, :]
        else:
            total += tl.dot(xa, tl.trans(b), input_precision="ieee")
    mask = in_rows[:, None] & in_cols[None, :]
    at_y = y_ptr + rows[:, None] * y_row + cols[None, :]
    y = tl.load(at_y, mask=mask, other=0.0)
    made = (y.to(tl.float32) + total).to(y.dtype)
    if RESIDUAL:
        beside = tl.load(residual_ptr + rows[:, None] * residual_row + cols[None, :], mask=mask, other=0.0)
        made = (made.to(tl.float32) + beside.to(tl.float32)).to(y.dtype)
    tl.store(at_y, made, mask=mask)


@triton.jit
def add_low_rank_kernel(
    xa_ptr, residual_ptr, n_rows, xa_row, residual_row,
    y0, b0, n0, y0_row, b0_n, b0_r, col0, y1, b1, n1, y1_row, b1_n, b1_r, col1, y2, b2, n2, y2_row, b2_n, b2_r, col2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, SPLITS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of one of the outputs; the third index of a program says of which."""
    which = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_N
    if which == 0:
        if first < n0:
            _add(y0, b0, xa_ptr, residual_ptr, n_rows, n0, y0_row, b0_n, b0_r, xa_row, residual_row, col0,
                 R0, SPLITS, RESIDUAL, BLOCK_T, BLOCK_N, BLOCK_R)  # fmt: skip
    elif which == 1:
        if first < n1:
            _add(y1, b1, xa_ptr, residual_ptr, n_rows, n1, y1_row, b1_n, b1_r, xa_row, residual_row, col1,
                 R1, SPLITS, RESIDUAL, BLOCK_T, BLOCK_N, BLOCK_R)  # fmt: skip
    elif first < n2:
        _add(y2, b2, xa_ptr, residual_ptr, n_rows, n2, y2_row, b2_n, b2_r, xa_row, residual_row, col2,
             R2, SPLITS, RESIDUAL, BLOCK_T, BLOCK_N, BLOCK_R)  # fmt: skip


def _block_t(n_rows: int) -> int:
    return 1 if n_rows < DOT_ROWS // 4 else DOT_ROWS


def low_rank(x: torch.Tensor, a: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The parts of the sum; same contract as `reference_decoding.low_rank`, but for how many parts there are."""
    (n_rows, k), r = x.shape, a.shape[0]
    block_t = _block_t(n_rows)
    block_k = 256 if block_t == 1 else 64
    splits = min(MAX_SPLITS, cdiv(k, PER_SPLIT))
    per_split = cdiv(cdiv(k, splits), block_k) * block_k
    splits = cdiv(k, per_split)
    out = torch.empty((splits, n_rows, r), dtype=torch.float32, device=x.device)
    kernel: Any = low_rank_kernel
    with on_device_of(x):
        kernel[(cdiv(n_rows, block_t), cdiv(r, 16), splits)](
            x, a, scales, out, n_rows, k, r, x.stride(0), a.stride(0), per_split,
            BLOCK_T=block_t, BLOCK_R=16, BLOCK_K=block_k, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def add_low_rank(xa: torch.Tensor, terms: "Sequence[AddedTerm]", residual: torch.Tensor | None) -> None:
    """Add the terms in place; same contract as `reference_decoding.add_low_rank`."""
    splits, n_rows, _ = xa.shape
    block_t = _block_t(n_rows)
    padded = [*terms, *[terms[0]] * (3 - len(terms))]
    ranks = [term.b.shape[1] for term in padded]
    arguments = [
        value
        for t in padded
        for value in (t.y, t.b, t.y.shape[1], t.y.stride(0), t.b.stride(0), t.b.stride(1), t.cols.start)
    ]
    beside = xa if residual is None else residual
    block_n, block_r = 64, min(32, max(16, next_power_of_2(max(ranks))))
    kernel: Any = add_low_rank_kernel
    with on_device_of(xa):
        kernel[(cdiv(max(t.y.shape[1] for t in terms), block_n), cdiv(n_rows, block_t), len(terms))](
            xa, beside, n_rows, xa.stride(1), beside.stride(0) if residual is not None else 0, *arguments,
            R0=ranks[0], R1=ranks[1], R2=ranks[2], SPLITS=splits, RESIDUAL=residual is not None,
            BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip
