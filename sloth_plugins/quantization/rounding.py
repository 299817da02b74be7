"""4-bit values chosen for what a layer computes from its inputs, not for each weight alone.

The format stays bitsandbytes' NF4, and so do the scales; only which of the 16 values a weight gets is another matter.
What one weight loses is made up for by those of its row that are not rounded yet, in the least squares of the layer's
output over the calibration inputs (GPTQ: Frantar et al. 2022, arXiv:2210.17323, with columns in the order of their
inputs' squares).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .packing import Packed, Packing

# Of the mean square of all inputs, added to that of each: inputs that were rarely seen do not decide.
DAMPING = 0.01
# Beyond that there is nothing left to be told from chance.
MOST_CHANCE = 0.999
# Columns whose effect on all later ones is added up before it is applied.
BLOCK = 128


@dataclass(slots=True)
class Inputs:
    """What a layer got: over `count` inputs x the sum of x x^T, fp32 [columns, columns], and of |x|^4, fp64."""

    second: torch.Tensor
    fourth: torch.Tensor
    count: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Inputs:
        """Of inputs [n, columns], fp32."""
        return cls(x.T @ x, _fourth(x), len(x))

    def add(self, x: torch.Tensor) -> None:
        """Take in more inputs [n, columns], fp32."""
        self.second.addmm_(x.T, x)
        self.fourth += _fourth(x)
        self.count += len(x)

    @property
    def damping(self) -> float:
        """What is added to the square of each input, summed as they are.

        So much that of few inputs, whose moments are mostly chance, no more is believed than they can tell (Ledoit and
        Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices": the share of the identity
        in the combination with it that is nearest to the true moments).
        """
        columns, mean = len(self.second), float(self.second.diagonal().mean())
        squares = float(self.second.norm()) ** 2
        spread = squares - columns * mean**2
        chance = max(0.0, float(self.fourth) - squares / max(1, self.count))
        share = min(chance / spread, MOST_CHANCE) if spread > 0 else MOST_CHANCE
        return max(DAMPING, share / (1 - share)) * mean


def _fourth(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(1).double().square().sum()


def rounded(weights: Sequence[torch.Tensor], inputs: Inputs, packing: Packing) -> list[Packed]:
    """Weights [rows, columns] that read the same inputs, in 4 bits.

    All on one device, and finite. Where the inputs say nothing, as those that are all zero, each weight is rounded
    alone.
    """
    packed = [packing.pack(weight) for weight in weights]
    # Rows are rounded side by side, whichever weight they are of.
    exact = torch.cat([weight.to(packing.dtype) for weight in weights]).float()
    scales = torch.cat([_scales(one, weight) for one, weight in zip(packed, weights, strict=True)])
    codes = torch.split(_codes(exact, scales, inputs, _values(packed[0])), [len(weight) for weight in weights])
    return [Packed(_joined(part).view_as(one.data), one.state) for part, one in zip(codes, packed, strict=True)]


def _values(packed: Packed) -> torch.Tensor:
    """The 16 values, ascending, as scales multiply them."""
    found: torch.Tensor = packed.state.code
    return found.float().to(packed.data.device)


def _scales(packed: Packed, weight: torch.Tensor) -> torch.Tensor:
    """The scale of each weight, fp32: what the value 1 is read as."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(packed.state)
    state.dtype = torch.float32
    found: torch.Tensor = dequantize_4bit(torch.full_like(packed.data, 0xFF), state)
    return found.reshape(weight.shape)


def _codes(weight: torch.Tensor, scales: torch.Tensor, inputs: Inputs, values: torch.Tensor) -> torch.Tensor:
    """Which value each weight gets, uint8 [rows, columns]."""
    order = inputs.second.diagonal().argsort(descending=True)
    factor = _factor(inputs.second[order][:, order], inputs.damping or 1.0)
    between = (values[1:] + values[:-1]) / 2
    # A column at a time is read and written: here they lie in memory one after the other.
    left, scales = weight.T[order].contiguous(), scales.T[order].contiguous()
    # A block of zeros has no scale, and any value is zero there.
    inverse = torch.where(scales > 0, 1 / scales, 0)
    chosen = torch.empty_like(left, dtype=torch.uint8)
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            code = torch.bucketize(left[i] * inverse[i], between)
            chosen[i] = code.to(torch.uint8)
            error = torch.div(left[i] - values[code] * scales[i], factor[i, i], out=errors[i - begin])
            left[i:end].addr_(factor[i, i:end], error, alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return chosen[order.argsort()].T.contiguous()


def _factor(second: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the moments, damped in place so far, or as far as they need it."""
    diagonal = second.diagonal()
    while True:
        diagonal.add_(damping)
        factor, failed = torch.linalg.cholesky_ex(second)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not failed:
            found: torch.Tensor = factor
            return found
        damping *= 10


def _joined(codes: torch.Tensor) -> torch.Tensor:
    """Two values to a byte, the first in its upper half, as bitsandbytes packs them."""
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return flat[::2] << 4 | flat[1::2]
