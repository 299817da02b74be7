"""Gated activations in Triton: act(gate) * up in one pass, its backward in another."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .activation import act, act_grad
from .dispatch import on_device_of
from .rows import cdiv, row_offsets, unit_stride, walk


@triton.jit
def glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, n, blocks, size1, size2, g0, g1, g2, u0, u1, u2, y0, y1, y2,
    BLOCK: tl.constexpr, NDIM: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One block of one row to a program."""
    pid = tl.program_id(0)
    row = pid // blocks
    cols = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    g_at = row_offsets(row, size1, size2, g0, g1, g2, NDIM)
    u_at = row_offsets(row, size1, size2, u0, u1, u2, NDIM)
    y_at = row_offsets(row, size1, size2, y0, y1, y2, NDIM)
    gate = tl.load(gate_ptr + g_at + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + u_at + cols, mask=mask, other=0.0).to(tl.float32)
    factor = act(gate, ACTIVATION).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + y_at + cols, (factor * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, blocks, size1, size2,
    g0, g1, g2, u0, u1, u2, y0, y1, y2, dg0, dg1, dg2, du0, du1, du2,
    BLOCK: tl.constexpr, NDIM: tl.constexpr, ACTIVATION: tl.constexpr,
    NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
):  # fmt: skip
    """One block of one row; each element is read before it is written, so outputs may be gate and up."""
    pid = tl.program_id(0)
    row = pid // blocks
    cols = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    g_at = row_offsets(row, size1, size2, g0, g1, g2, NDIM)
    y_at = row_offsets(row, size1, size2, y0, y1, y2, NDIM)
    gate = tl.load(gate_ptr + g_at + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + y_at + cols, mask=mask, other=0.0).to(tl.float32)
    element = gate_ptr.dtype.element_ty
    if NEED_GATE:
        u_at = row_offsets(row, size1, size2, u0, u1, u2, NDIM)
        up = tl.load(up_ptr + u_at + cols, mask=mask, other=0.0).to(tl.float32)
        dact = (dy * up).to(element).to(tl.float32)
        dgate = dact * act_grad(gate, ACTIVATION)
        dg_at = row_offsets(row, size1, size2, dg0, dg1, dg2, NDIM)
        tl.store(dgate_ptr + dg_at + cols, dgate.to(element), mask=mask)
    if NEED_UP:
        factor = act(gate, ACTIVATION).to(element).to(tl.float32)
        du_at = row_offsets(row, size1, size2, du0, du1, du2, NDIM)
        tl.store(dup_ptr + du_at + cols, (dy * factor).to(element), mask=mask)


def glu_fwd(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(gate) * up; same contract as `reference.glu_fwd`."""
    gate, up = unit_stride(gate), unit_stride(up)
    y = torch.empty_like(gate)
    path = walk(gate, up, y)
    if path is None:
        return glu_fwd(gate.contiguous(), up.contiguous(), activation)
    n, rows, ndim, numbers = path
    blocks = cdiv(n, 2048)
    with on_device_of(gate):
        glu_fwd_kernel[(rows * blocks,)](
            gate, up, y, n, blocks, *numbers, BLOCK=2048, NDIM=ndim, ACTIVATION=activation, num_warps=4
        )
    return y


def glu_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    activation: str,
) -> None:
    """Write the gradients into `dgate` and `dup`; same contract as `reference.glu_bwd`."""
    dy, gate, up = unit_stride(dy), unit_stride(gate), unit_stride(up)
    # A gradient nobody asked for is never written; gate and up stand in for its address.
    path = walk(gate, up, dy, gate if dgate is None else dgate, up if dup is None else dup)
    if path is None:
        flat = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (dgate, dup)]
        glu_bwd(dy.contiguous(), gate.contiguous(), up.contiguous(), flat[0], flat[1], activation)
        for target, value in zip((dgate, dup), flat, strict=True):
            if target is not None and value is not None:
                target.copy_(value)
        return
    n, rows, ndim, numbers = path
    blocks = cdiv(n, 1024)
    with on_device_of(gate):
        glu_bwd_kernel[(rows * blocks,)](
            dy, gate, up, gate if dgate is None else dgate, up if dup is None else dup, n, blocks, *numbers,
            BLOCK=1024, NDIM=ndim, ACTIVATION=activation,
            NEED_GATE=dgate is not None, NEED_UP=dup is not None, num_warps=4,
        )  # fmt: skip
