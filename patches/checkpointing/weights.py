"""Memory that activations leave over, spent on weights that need not be made from four bits at every product."""

from collections.abc import Iterable, Iterator

from ..blocks import graphs, resident
from ..blocks.group import Group
from ..blocks.made_weight import joint_shape, joint_weight
from ..blocks.projection import Projection
from ..blocks.run import Parts
from .bytes import bytes_of

# Of what is left over; the rest is for what nobody has planned.
SHARE = 0.9


def made_weights(parts: Parts) -> list[tuple[Group, tuple[Projection, ...]]]:
    """What weights of a layer are made for each product, and would be found if they stayed: by what is made at once."""
    made = ((group, together) for group in parts.groups for together in group.made_together())
    return [(group, together) for group, together in made if resident.may_stay(together)]


def fit(layers: Iterable[Parts], tokens: int, spare: int) -> int:
    """Let as many weights stay as fit into `spare` bytes, and none of the others; returns the bytes that stay.

    Layers that run as CUDA graphs make their own.
    """
    total = 0
    chosen = []
    # The smaller ones first: a byte of theirs spares more, since each costs a launch, too.
    for size, is_in_graph, group, together in sorted(_sized(layers, tokens), key=lambda entry: entry[0]):
        if is_in_graph or total + size > spare:
            resident.drop(together)
            continue
        total += size
        chosen.append((group, together))
    for group, together in chosen:
        if resident.held(together, group.dtype, joint_shape(together, group.room)) is None:
            resident.hold(together, joint_weight(together, group.dtype, group.room))
    return total


def _sized(layers: Iterable[Parts], tokens: int) -> Iterator[tuple[int, bool, Group, tuple[Projection, ...]]]:
    """What may stay, with its bytes and whether its layer runs as a graph."""
    for parts in layers:
        made = made_weights(parts)
        numbers = sum(p.shape[0] * p.shape[1] for _, together in made for p in together)
        for group, together in made:
            yield bytes_of(group, together), tokens * numbers <= graphs.MAX_WORK, group, together


def staying(layers: Iterable[Parts]) -> int:
    """Bytes of the weights that stay."""
    return resident.size(p for parts in layers for group in parts.groups for p in group.projections)


def drop(layers: Iterable[Parts]) -> None:
    """Let none stay."""
    resident.drop(p for parts in layers for group in parts.groups for p in group.projections)
