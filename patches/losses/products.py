"""Products of 16-bit matrices that keep the fp32 in which they are summed."""

import torch

BLOCK = 4096
"""How much of the inner dimension is widened at a time where no library does it."""


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N], both of one dtype: in fp32 for fp16 and bf16, else in their dtype."""
    if a.dtype.itemsize != 2:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _add_blocks(torch.zeros(a.shape[0], b.shape[1], device=a.device), a, b)


def add_wide_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; `total` has the dtype of `wide_product`."""
    if a.dtype.itemsize != 2:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        _add_blocks(total, a, b)


def _add_blocks(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    for start in range(0, a.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        total.addmm_(a[:, block].float(), b[block].float())
    return total
