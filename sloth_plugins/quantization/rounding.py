"""4-bit values chosen for what a layer computes from its inputs, not for each weight alone.

The format stays bitsandbytes' NF4, and so do the scales; only which of the 16 values a weight gets is another matter.
What one weight loses is made up for by those of its row that are not rounded yet, in the least squares of the layer's
output over the calibration inputs (GPTQ: Frantar et al. 2022, arXiv:2210.17323, with columns in the order of their
inputs' squares).
"""

from __future__ import annotations

import copy

import torch

from .packing import Packed, Packing

# Of the mean square of all inputs, added to that of each: inputs that were rarely seen do not decide.
DAMPING = 0.01
# Columns whose effect on all later ones is added up before it is applied.
BLOCK = 128


def rounded(weight: torch.Tensor, second: torch.Tensor, packing: Packing) -> Packed:
    """A weight [rows, columns] in 4 bits for inputs x with the second moments E[x x^T], fp32 [columns, columns].

    All on one device, and finite. Where the moments say nothing, as for inputs that are all zero, it is rounded weight
    by weight.
    """
    packed = packing.pack(weight)
    exact = weight.to(packing.dtype).float()
    chosen = _codes(exact, _scales(packed, weight), second.float(), _values(packed))
    return Packed(_joined(chosen).view_as(packed.data), packed.state)


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


def _codes(weight: torch.Tensor, scales: torch.Tensor, second: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which value each weight gets, uint8 [rows, columns]."""
    order = second.diagonal().argsort(descending=True)
    factor = _factor(second[order][:, order])
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


def _factor(second: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the moments, damped in place as far as they need it."""
    diagonal = second.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
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
