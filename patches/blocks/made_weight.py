"""Weights that products cannot take as they are: packed in four bits, or of another dtype."""

from collections.abc import Sequence

import torch

from ..kernels.four_bit_weight import FourBit, FourBitRows
from ..kernels.ops.four_bit import dequantize_four_bit, dequantize_four_bit_rows
from .projection import Projection
from .resident import held


def is_made(projection: Projection, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` cannot take the weight as it is."""
    return isinstance(projection.weight, FourBit) or projection.weight.dtype is not dtype


def base_weight(projection: Projection, dtype: torch.dtype) -> torch.Tensor:
    """W [n, k] in `dtype`: the parameter itself where it has that dtype, what stays of it, else made anew."""
    weight = projection.weight
    if not is_made(projection, dtype):
        assert isinstance(weight, torch.Tensor), "four bits are no dtype of a product"
        return weight
    return joint_weight((projection,), dtype, 0)


def joint_shape(projections: Sequence[Projection], room: int) -> tuple[int, int]:
    """Rows and columns of what `joint_weight` gives."""
    return sum(p.shape[0] for p in projections) + room, projections[0].shape[1]


def joint_weight(
    projections: Sequence[Projection], dtype: torch.dtype, room: int, packed: FourBitRows | None = None
) -> torch.Tensor:
    """Weights below each other [n + room, k], in `dtype`: what stays of them, or made; the room's rows are undefined.

    `packed` are the weights, if they can be unpacked together.
    """
    shape = joint_shape(projections, room)
    resident = held(projections, dtype, shape)
    if resident is not None:
        return resident
    first = projections[0].weight
    if len(projections) == 1 and not room and not isinstance(first, FourBit):
        return first.to(dtype)
    device = first.packed.device if isinstance(first, FourBit) else first.device
    out = torch.empty(shape, dtype=dtype, device=device)
    if packed is not None:
        dequantize_four_bit_rows(packed, out[: shape[0] - room])
        return out
    start = 0
    for projection in projections:
        part = out[start : start + projection.shape[0]]
        if isinstance(projection.weight, FourBit):
            dequantize_four_bit(projection.weight, part)
        else:
            part.copy_(projection.weight)
        start += projection.shape[0]
    return out
