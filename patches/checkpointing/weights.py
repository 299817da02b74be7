"""Memory that activations leave over, spent on weights that need not be made from four bits at every product."""

from collections.abc import Iterable

from ..blocks import graphs, resident
from ..blocks.group import base_weight, is_made
from ..blocks.projection import Projection
from ..blocks.run import Parts

# Of what is left over; the rest is for what nobody has planned.
SHARE = 0.5


def made_weights(parts: Parts) -> list[Projection]:
    """The projections of a layer whose weight is made for each product, and would be found if it stayed."""
    return [
        projection
        for group in parts.groups
        for projection in group.projections
        if is_made(projection, group.dtype) and resident.may_stay(projection)
    ]


def fit(layers: Iterable[Parts], tokens: int, spare: int) -> int:
    """Let as many layers' weights stay as fit into `spare` bytes, and none of the others; returns the bytes that stay.

    Layers that run as CUDA graphs make their own.
    """
    total = 0
    for parts in layers:
        projections = made_weights(parts)
        sizes = [p.shape[0] * p.shape[1] for p in projections]
        size = sum(sizes) * parts.qkv.dtype.itemsize
        if not projections or total + size > spare or tokens * sum(sizes) <= graphs.MAX_WORK:
            resident.drop(projections)
            continue
        total += size
        for projection in projections:
            if resident.held(projection, parts.qkv.dtype) is None:
                resident.hold(projection, base_weight(projection, parts.qkv.dtype))
    return total


def staying(layers: Iterable[Parts]) -> int:
    """Bytes of the weights that stay."""
    return resident.size(p for parts in layers for group in parts.groups for p in group.projections)


def drop(layers: Iterable[Parts]) -> None:
    """Let none stay."""
    resident.drop(p for parts in layers for group in parts.groups for p in group.projections)
