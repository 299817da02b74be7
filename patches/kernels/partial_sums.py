"""The second half of a deterministic sum over rows: add what each program left, in a fixed order."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rows import cdiv, next_power_of_2


@triton.jit
def sum_parts_kernel(
    parts_ptr, first_ptr, second_ptr, n_parts,
    N: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one sum, the first or the second, to a program."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in tl.static_range(0, PARTS, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        mask = (parts < n_parts)[:, None] & (cols < N)[None, :]
        at = (which * n_parts + parts)[:, None] * N + cols[None, :]
        total += tl.load(parts_ptr + at, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first_ptr + cols, result.to(first_ptr.dtype.element_ty), mask=cols < N)
    else:
        tl.store(second_ptr + cols, result.to(second_ptr.dtype.element_ty), mask=cols < N)


def sum_parts(parts: torch.Tensor, sums: Sequence[torch.Tensor]) -> None:
    """Write sums[i] = parts[i] summed over its rows, all in one launch.

    parts [1 or 2, P, N] in fp32, contiguous; each of `sums` [N], contiguous, of any dtype. At most a few hundred rows.
    """
    count, n_parts, n = parts.shape
    sum_parts_kernel[(cdiv(n, 16), count)](
        parts, sums[0], sums[-1], n_parts,
        N=n, PARTS=next_power_of_2(n_parts), BLOCK_P=256, BLOCK_N=16, num_warps=8,
    )  # fmt: skip
