"""Copies of many matrices in one Triton launch, whose addresses are in a table."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .rows import TL_DTYPE


@triton.jit
def copy_rows_kernel(table_ptr, blocks_ptr, FROM: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
    """One part of one pair; see `ops.copies.Copies`."""
    pid = tl.program_id(0)
    pair = tl.load(blocks_ptr + pid * 2)
    at = table_ptr + pair * 6
    source = tl.load(at).to(tl.pointer_type(FROM))
    target = tl.load(at + 1).to(tl.pointer_type(TO))
    cols = tl.load(at + 4).to(tl.int32)
    elements = tl.load(blocks_ptr + pid * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < tl.load(at + 5)
    row, col = (elements // cols).to(tl.int64), elements % cols
    values = tl.load(source + row * tl.load(at + 2) + col, mask=mask)
    tl.store(target + row * tl.load(at + 3) + col, values.to(TO), mask=mask)


def copy_rows(table: torch.Tensor, blocks: torch.Tensor, source: torch.dtype, target: torch.dtype, block: int) -> None:
    """Copy all pairs; see `ops.copies.Copies`."""
    with on_device_of(table):
        copy_rows_kernel[(blocks.shape[0],)](
            table, blocks, FROM=TL_DTYPE[source], TO=TL_DTYPE[target], BLOCK=block, num_warps=4
        )
