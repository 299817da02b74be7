"""Dropout in Triton: the mask comes from a counter-based generator, so a seed and a position give it at any time."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .rows import cdiv


@triton.jit
def dropout_kernel(
    x_ptr, out_ptr, n, blocks, x_row, out_row, seed, p, scale, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """One block of one row to a program."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    x = tl.load(x_ptr + row * x_row + cols, mask=mask, other=0.0).to(tl.float32)
    keep = tl.rand(seed, row * n + cols) >= p
    y = tl.where(keep, x * scale, 0.0)
    at = out_ptr + row * out_row + cols
    if ADD:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32) + tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor, p: float, seed: int, out: torch.Tensor, add: bool) -> None:
    rows, n = x.shape
    blocks = cdiv(n, 1024)
    with on_device_of(x):
        dropout_kernel[(rows * blocks,)](
            x, out, n, blocks, x.stride(0), out.stride(0), seed, p, 0.0 if p >= 1.0 else 1.0 / (1.0 - p),
            BLOCK=1024, ADD=add, num_warps=4,
        )  # fmt: skip


def dropout_fwd(x: torch.Tensor, p: float, seed: int, out: torch.Tensor) -> None:
    """Write dropped x into `out`; same contract as `reference_blocks.dropout_fwd`, with another mask."""
    _launch(x, p, seed, out, False)


def dropout_add(x: torch.Tensor, p: float, seed: int, total: torch.Tensor) -> None:
    """Add dropped x to `total`; same contract as `reference_blocks.dropout_add`, with `dropout_fwd`'s mask."""
    _launch(x, p, seed, total, True)
