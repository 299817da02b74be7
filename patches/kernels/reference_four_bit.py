"""Dequantisation of four-bit weights in plain torch: what kernels/four_bit.py computes, bit for bit."""

import torch

from .four_bit_weight import FourBit


def dequantize(weight: FourBit, out: torch.Tensor) -> None:
    """Write the weight [rows, cols] into `out` [rows, cols]; fp32, rounded to weight.dtype, then to out's dtype.

    `out` may have any strides.
    """
    n, scale = weight.shape[0] * weight.shape[1], weight.absmax
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.offset is not None:
        nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: scale.numel()]
        scale = weight.nested_code[scale.int()] * nested + weight.offset
    # With an odd number of elements the last low nibble is padding.
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), -1).view(-1)[:n]
    values = weight.code[nibbles.int()] * scale.repeat_interleave(weight.blocksize)[:n]
    out.copy_(values.to(weight.dtype).view(weight.shape))
