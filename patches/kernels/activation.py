"""Activations in Triton: silu and both forms of gelu, element by element, for this file's op and for `glu.py`.

`activation` is "silu", "gelu_tanh" or "gelu" throughout.
"""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .rows import cdiv, row_offsets, unit_stride, walk


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """The activation of x in fp32. An exp that overflows gives the limit 0, never NaN."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), and for negative u without the cancellation of the left side.
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit
def act_grad(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at x in fp32; finite wherever x is."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(z))
        inv = 1.0 / (1.0 + e)
        sig = tl.where(z < 0.0, e * inv, inv)
        # sig * (1 - sig) = e * inv^2 without cancellation: what multiplies it is large. From 16 on it is 0, and the
        # square may overflow, which would make NaN of it.
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = sig + tl.where(tl.abs(x) < 16.0, x * (e * inv * inv) * inner, 0.0)
    else:
        sig = 1.0 / (1.0 + tl.exp(-x))
        slope = sig * (1.0 + x * (1.0 - sig))
    return slope


@triton.jit
def activate_fwd_kernel(
    x_ptr, y_ptr, n, blocks, size1, size2, x0, x1, x2, y0, y1, y2,
    BLOCK: tl.constexpr, NDIM: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One block of one row to a program."""
    pid = tl.program_id(0)
    row = pid // blocks
    cols = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    x_at = row_offsets(row, size1, size2, x0, x1, x2, NDIM)
    y_at = row_offsets(row, size1, size2, y0, y1, y2, NDIM)
    x = tl.load(x_ptr + x_at + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at + cols, act(x, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, n, blocks, size1, size2, dy0, dy1, dy2, x0, x1, x2, dx0, dx1, dx2,
    BLOCK: tl.constexpr, NDIM: tl.constexpr, ACTIVATION: tl.constexpr, RESTORE: tl.constexpr,
):  # fmt: skip
    """One block of one row; each element is read before it is written, so dx may be x. RESTORE makes dy the output."""
    pid = tl.program_id(0)
    row = pid // blocks
    cols = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    dy_at = row_offsets(row, size1, size2, dy0, dy1, dy2, NDIM)
    x_at = row_offsets(row, size1, size2, x0, x1, x2, NDIM)
    dx_at = row_offsets(row, size1, size2, dx0, dx1, dx2, NDIM)
    dy = tl.load(dy_ptr + dy_at + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + x_at + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + dx_at + cols, (dy * act_grad(x, ACTIVATION)).to(dx_ptr.dtype.element_ty), mask=mask)
    if RESTORE:
        tl.store(dy_ptr + dy_at + cols, act(x, ACTIVATION).to(dy_ptr.dtype.element_ty), mask=mask)


def activate_fwd(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the activation of x; same contract as `reference.activate_fwd`."""
    x = unit_stride(x)
    y = torch.empty_like(x)
    path = walk(x, y)
    if path is None:
        return activate_fwd(x.contiguous(), activation)
    n, rows, ndim, numbers = path
    blocks = cdiv(n, 2048)
    with on_device_of(x):
        activate_fwd_kernel[(rows * blocks,)](
            x, y, n, blocks, *numbers, BLOCK=2048, NDIM=ndim, ACTIVATION=activation, num_warps=4
        )
    return y


def activate_bwd(dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, activation: str, restore: bool = False) -> None:
    """Write the gradient into `dx`; same contract as `reference.activate_bwd`."""
    if restore and dy.stride(-1) != 1:
        raise ValueError("the output is restored only into rows of unit stride")
    dy, x = unit_stride(dy), unit_stride(x)
    path = walk(dy, x, dx)
    if path is None:
        flat = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device)
        flat_dy = dy.contiguous()
        activate_bwd(flat_dy, x.contiguous(), flat, activation, restore)
        dx.copy_(flat)
        if restore and flat_dy is not dy:
            dy.copy_(flat_dy)
        return
    n, rows, ndim, numbers = path
    blocks = cdiv(n, 1024)
    with on_device_of(x):
        activate_bwd_kernel[(rows * blocks,)](
            dy, x, dx, n, blocks, *numbers,
            BLOCK=1024, NDIM=ndim, ACTIVATION=activation, RESTORE=restore, num_warps=4,
        )  # fmt: skip
