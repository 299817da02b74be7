"""Weights that were made from four bits once and stay, where there is memory for them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from .projection import Projection

Sources = tuple[tuple[object, int], ...]
# By the module that owns the first packed weight: where all were, their versions, and what was made of them.
_held: WeakKeyDictionary[torch.nn.Module, tuple[Sources, torch.Tensor]] = WeakKeyDictionary()
# Modules whose weight was another at the next look, as sharding makes it: nothing of theirs may stay.
_moving: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
_ignored = 0


def _sources(projections: Sequence[Projection]) -> Sources:
    weights = (p.weight if isinstance(p.weight, torch.Tensor) else p.weight.packed for p in projections)
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def held(projections: Sequence[Projection], dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor | None:
    """What stays of the weights of these projections, in that dtype and shape; None if it has to be made.

    It may have been made with more room below them.
    """
    base = projections[0].base
    known = _held.get(base)
    if known is None or _ignored:
        return None
    sources, made = known
    if sources != _sources(projections):
        _moving[base] = True
    elif made.dtype is dtype and made.shape[0] >= shape[0] and made.shape[1] == shape[1]:
        return made[: shape[0]]
    del _held[base]
    return None


def hold(projections: Sequence[Projection], made: torch.Tensor) -> None:
    """Let stay what was made of the weights of these projections."""
    if may_stay(projections):
        _held[projections[0].base] = _sources(projections), made


def drop(projections: Iterable[Projection]) -> None:
    """Let nothing of these stay."""
    for projection in projections:
        _held.pop(projection.base, None)


def size(projections: Iterable[Projection]) -> int:
    """Bytes that stay of these."""
    if not _held:
        return 0
    found = (_held.get(p.base) for p in projections)
    return sum(entry[1].nbytes for entry in found if entry is not None)


def may_stay(projections: Sequence[Projection]) -> bool:
    """Whether what was made of their weights would be found again."""
    return projections[0].base not in _moving


@contextmanager
def ignored() -> Iterator[None]:
    """Within it, weights are made as if none stayed: a CUDA graph would go on reading what is dropped later."""
    global _ignored
    _ignored += 1
    try:
        yield
    finally:
        _ignored -= 1
