"""Gradients of hidden states that are formed before it is known what they will be multiplied by."""

import torch

from .products import wide_product
from .rows import Rows

HALF_RANGE = 15
"""fp16 holds any number below 2^15, with all its bits down to 2^-14."""


class RowGradients:
    """Rows of a gradient [N, H], written chunk by chunk; zero where a row does not count.

    bf16 and fp16 gradients wait in fp16, each row times a power of two that puts its largest element below 2^15. That
    rounds to 11 bits, so what shows is the one rounding to bf16, after the factor, as if that had been known.
    """

    def __init__(self, rows: Rows, hidden: torch.Tensor, dtype: torch.dtype) -> None:
        narrow = dtype.itemsize == 2
        make = torch.empty if rows.index is None else torch.zeros
        self.rows = rows
        self.values = make(hidden.shape, dtype=torch.float16 if narrow else dtype, device=hidden.device)
        self.units = torch.ones(hidden.shape[0], 1, device=hidden.device) if narrow else None

    def put(self, chunk: slice, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Write y [n, V] @ weight [V, H] into the rows of a chunk."""
        if self.units is None and self.rows.index is None:
            torch.mm(y, weight, out=self.values[chunk])
            return
        product = wide_product(y, weight)
        if self.units is None:
            self._write(self.values, chunk, product)
            return
        _, exponent = torch.linalg.vector_norm(product, float("inf"), -1, keepdim=True).frexp()
        # Of a row of zeros, or one that is not finite, the exponent is no matter; fp32 must hold both powers.
        unit = torch.exp2((exponent - HALF_RANGE).clamp(-100, 100).float())
        self._write(self.units, chunk, unit)
        if self.rows.index is None:
            torch.div(product, unit, out=self.values[chunk])
        else:
            self._write(self.values, chunk, product.div_(unit))

    def times(self, factor: torch.Tensor | None, dtype: torch.dtype, *, in_place: bool) -> torch.Tensor:
        """The gradient times `factor` (fp32 or wider; one number, or [N, 1] by row), in `dtype`.

        `in_place` gives the memory of the rows to the result where it fits.
        """
        if self.units is not None:
            factor = self.units if factor is None else self.units * factor
        return self.values.to(dtype) if factor is None else scaled(self.values, factor, dtype, in_place=in_place)

    def _write(self, out: torch.Tensor, chunk: slice, values: torch.Tensor) -> None:
        if self.rows.index is None:
            out[chunk].copy_(values)
        else:
            out.index_copy_(0, self.rows.index[chunk], values.to(out.dtype))


def scaled(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, *, in_place: bool) -> torch.Tensor:
    """total * factor, the factor in fp32 or wider, in `dtype`; `in_place` where nobody needs `total` again."""
    # A factor without dimensions would be rounded to total's dtype first: 1 / count is no number of bf16, 0 in fp16.
    factor = factor if factor.dim() else factor.unsqueeze(0)
    fits = in_place and dtype.itemsize == total.dtype.itemsize
    return torch.mul(total, factor, out=total.view(dtype) if fits else torch.empty_like(total, dtype=dtype))
