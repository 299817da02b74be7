"""Dequantisation of bitsandbytes' four-bit weights into memory that the caller has."""

import torch

from ..dispatch import Backend, backend_for
from ..four_bit_weight import FourBit, FourBitRows
from .common import implementation


def dequantize_four_bit(weight: FourBit, out: torch.Tensor) -> None:
    """Write the weight [rows, cols] into `out` [rows, cols], fp32, fp16 or bf16: the values that bitsandbytes gives.

    They are rounded to `weight.dtype` first, then to out's dtype, and equal to the last bit, but that fp4's negative
    zero is a positive one. out's inner stride is 1 and its row stride at least cols; what lies between its rows is not
    touched. Not differentiable. Raises TypeError where `supports_four_bit` is False.
    """
    backend = _backend(weight, out)
    if backend is None:
        raise TypeError(
            f"four_bit cannot write a weight {weight.shape} on {weight.packed.device} into {type(out).__name__}"
            f"({out.dtype}, {out.device}, {tuple(out.shape)}) here; ask supports_four_bit first"
        )
    implementation("four_bit" if backend == "triton" else "reference_four_bit").dequantize(weight, out)


def dequantize_four_bit_rows(weights: FourBitRows, out: torch.Tensor) -> None:
    """Write all weights, below each other, into `out` [rows, cols], contiguous; as `dequantize_four_bit` would."""
    if backend_for(out) == "triton" and out.is_contiguous():
        implementation("four_bit").dequantize_rows(weights, out)
        return
    parts = torch.split(out, [weight.shape[0] for weight in weights.weights])
    for weight, part in zip(weights.weights, parts, strict=True):
        dequantize_four_bit(weight, part)


def supports_four_bit(weight: FourBit, out: torch.Tensor) -> bool:
    """Whether `dequantize_four_bit` writes this weight into `out` here and now."""
    return _backend(weight, out) is not None


def _backend(weight: FourBit, out: torch.Tensor) -> Backend | None:
    rows, cols = weight.shape
    if out.shape != weight.shape or out.requires_grad or out.device != weight.packed.device:
        return None
    if (cols > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < cols):
        return None
    return backend_for(out)
