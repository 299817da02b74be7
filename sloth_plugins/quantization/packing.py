"""What bitsandbytes makes of a weight, and how many bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in 4 bits, with the state that it is read by."""

    data: torch.Tensor
    state: Any

    @property
    def bytes(self) -> int:
        """What a checkpoint stores for it: 4-bit values, scales, scales of scales and code books."""
        parts: dict[str, torch.Tensor] = self.state.as_dict(packed=True)
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.data, *parts.values()))

    def dequantised(self, like: torch.Tensor) -> torch.Tensor:
        """The weight as training sees it, in the dtype of `like`."""
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(self.data, self.state)
        return found.reshape(like.shape).to(like.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How weights are quantised: NF4, in blocks of 64, their scales quantised too."""

    dtype: torch.dtype
    """What is stored in 16 bits, and what 4-bit weights are dequantised to."""
    double_quant: bool = True

    def pack(self, weight: torch.Tensor) -> Packed:
        """A weight [rows, columns], rounded to 16 bits first, on its own device."""
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(
            weight.to(self.dtype).contiguous(), blocksize=64, compress_statistics=self.double_quant, quant_type="nf4"
        )
        return Packed(data, state)

    def plain_bytes(self, weight: torch.Tensor) -> int:
        """What the weight takes where it stays in 16 bits."""
        return weight.numel() * self.dtype.itemsize
