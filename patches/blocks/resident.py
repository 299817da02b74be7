"""Weights that were made from four bits once and stay, where there is memory for them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from .projection import Projection

# By the module that owns the packed weight: that weight, as it was then, and what was made of it.
_held: WeakKeyDictionary[torch.nn.Module, tuple[object, int, torch.Tensor]] = WeakKeyDictionary()
# Modules whose weight was another at the next look, as sharding makes it: nothing of theirs may stay.
_moving: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
_ignored = 0


def _source(projection: Projection) -> torch.Tensor:
    weight = projection.weight
    return weight if isinstance(weight, torch.Tensor) else weight.packed


def held(projection: Projection, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight [n, k] in `dtype` that stays for a projection; None if it has to be made."""
    known = _held.get(projection.base)
    if known is None or _ignored:
        return None
    packed, version, made = known
    source = _source(projection)
    if source.data_ptr() == packed and source._version == version and made.dtype is dtype:
        return made
    del _held[projection.base]
    _moving[projection.base] = True
    return None


def hold(projection: Projection, made: torch.Tensor) -> None:
    """Let a weight stay that was made for a projection."""
    if projection.base not in _moving:
        source = _source(projection)
        _held[projection.base] = source.data_ptr(), source._version, made


def drop(projections: Iterable[Projection]) -> None:
    """Let nothing of these stay."""
    for projection in projections:
        _held.pop(projection.base, None)


def size(projections: Iterable[Projection]) -> int:
    """Bytes that stay of these."""
    return sum(_held[p.base][2].nbytes for p in projections if p.base in _held)


def may_stay(projection: Projection) -> bool:
    """Whether a weight made for it would be found again."""
    return projection.base not in _moving


@contextmanager
def ignored() -> Iterator[None]:
    """Within it, weights are made as if none stayed: a CUDA graph would go on reading what is dropped later."""
    global _ignored
    _ignored += 1
    try:
        yield
    finally:
        _ignored -= 1
