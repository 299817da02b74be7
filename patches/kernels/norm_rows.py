"""What the launchers of the norms share: the tile of a row, and walking rows together with a number for each row."""

import functools

import torch

from .rows import merge_dims, next_power_of_2


@functools.cache
def row_tile(n: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_M, num_warps): short rows share a program, long rows get 16 elements a thread."""
    block_n = next_power_of_2(n)
    block_m = max(1, 2048 // block_n)
    return block_n, block_m, min(32, max(4, block_n * block_m // 512))


def rows_of(first: torch.Tensor, *others: torch.Tensor, statistic: torch.Tensor) -> tuple[int, list[int]] | None:
    """How to walk the rows of tensors [..., N] of one shape, with `statistic` [...] in second to last place.

    Returns what `merge_dims` returns; None if the rows are not expressible.
    """
    tensors = (first, *others)
    n = first.shape[-1]
    if all(t.is_contiguous() for t in tensors) and statistic.is_contiguous():
        strides = [0, 0, n] * len(tensors)
        strides[-3:-3] = [0, 0, 1]
        return 1, [1, 1, *strides]
    order = [t.stride()[:-1] for t in tensors]
    order.insert(-1, statistic.stride())
    return merge_dims(first.shape[:-1], order)


def empty_statistic(x: torch.Tensor) -> torch.Tensor:
    """An fp32 number for each row of x [..., N], not initialised."""
    if x.is_contiguous():
        return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    # In the order of x's memory, so that their dimensions merge.
    return torch.empty_like(x.select(-1, 0), dtype=torch.float32)
