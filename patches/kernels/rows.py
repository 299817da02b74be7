"""Addressing the rows of strided tensors: merge the leading dimensions on the host, take the index apart on the GPU."""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MAX_DIMS = 3
TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Triton's own takes microseconds on the host, since it also serves kernels; so does the next one."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def row_offsets(row, size1, size2, stride0, stride1, stride2, NDIM: tl.constexpr):
    """Element offset of `row`, counted over (size0, size1, size2) with the last fastest; int64, so never wraps."""
    if NDIM == 1:
        offset = row.to(tl.int64) * stride2
    elif NDIM == 2:
        offset = (row // size2).to(tl.int64) * stride1 + (row % size2).to(tl.int64) * stride2
    else:
        outer = row // size2
        offset = (outer // size1).to(tl.int64) * stride0
        offset += (outer % size1).to(tl.int64) * stride1 + (row % size2).to(tl.int64) * stride2
    return offset


def merge_dims(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, list[int]] | None:
    """Merge dimensions that every tensor walks in one stride.

    `shape` is common to all tensors, `strides` holds one sequence for each of them. Dimensions are ordered by the first
    tensor's strides, so its memory is walked in order. Returns (NDIM, [size1, size2, *strides of each tensor, 3 each])
    as `row_offsets` takes them, or None if more than three dimensions remain.
    """
    dims = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[0][d])
    merged: list[tuple[int, list[int]]] = []
    for d in dims:
        inner = [s[d] for s in strides]
        if merged and all(outer == shape[d] * s for outer, s in zip(merged[-1][1], inner, strict=True)):
            merged[-1] = (merged[-1][0] * shape[d], inner)
        else:
            merged.append((shape[d], inner))
    if len(merged) > MAX_DIMS:
        return None
    ndim = max(len(merged), 1)
    padded = [(1, [0] * len(strides))] * (MAX_DIMS - len(merged)) + merged
    numbers = [padded[1][0], padded[2][0]]
    for t in range(len(strides)):
        numbers += [padded[d][1][t] for d in range(MAX_DIMS)]
    return ndim, numbers


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def walk(*tensors: torch.Tensor) -> tuple[int, int, int, list[int]] | None:
    """(row length, rows, NDIM, numbers) common to the tensors; dense tensors of one layout are a single row."""
    first = tensors[0]
    n = first.shape[-1]
    if all(t.is_contiguous() for t in tensors):
        return first.numel(), 1, 1, [1, 1] + [0] * (3 * len(tensors))
    if any(n > 1 and t.stride(-1) != 1 for t in tensors):
        return None
    merged = merge_dims(first.shape[:-1], [t.stride()[:-1] for t in tensors])
    return None if merged is None else (n, first.numel() // n, *merged)
