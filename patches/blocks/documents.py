"""Rows of several documents: which tokens see each other, read from upstream's mask.

Where a row is packed, transformers makes a mask [B, 1, S, S] from position_ids that restart; where a layer has a window
shorter than the row, one from that. A kernel for documents of unequal length needs no mask, only where each begins.
"""

import functools
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
# Rows of the mask that are compared at once.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Documents:
    """Causal attention within each of the documents that B * S tokens consist of.

    `bounds` are where they begin and where the last ends, on the host and, in int32, on the device. With a `window`, a
    token sees so many tokens, itself among them.
    """

    bounds: tuple[int, ...]
    on_device: Tensor
    window: int | None

    @functools.cached_property
    def lengths(self) -> list[int]:
        """How many tokens each document has."""
        return [end - start for start, end in itertools.pairwise(self.bounds)]

    @functools.cached_property
    def longest(self) -> int:
        """How many tokens the longest has."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """What was found, and of what: both tensors, which may be gone or changed by now, and the rows."""

    refs: tuple[Any, ...]
    versions: tuple[int, ...]
    rows: int
    found: Documents | None

    def is_of(self, tensors: tuple[Tensor, ...], rows: int) -> bool:
        return (
            self.rows == rows
            and len(self.refs) == len(tensors)
            and all(ref() is tensor for ref, tensor in zip(self.refs, tensors, strict=True))
            and self.versions == tuple(tensor._version for tensor in tensors)
        )


# The last one for each window: all layers of a forward that have the same window get the same mask.
_last: dict[int | None, _Reading] = {}


def documents_of(mask: Any, position_ids: Any, rows: int, window: int | None) -> Documents | None:
    """The documents in `rows` rows that a mask [rows or 1, 1, S, S] lets see themselves; None if it says anything else.

    `position_ids` [rows or 1, S] restart where a document begins; None counts on through each row. `window` is what
    the layer's configuration gives. Looked at once for all layers, which waits for the device.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.dim() != 4:
        return None
    length = mask.shape[-1]
    if mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, length, length):
        return None
    if position_ids is not None and not (
        isinstance(position_ids, Tensor) and position_ids.shape in ((1, length), (rows, length))
    ):
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    tensors = (mask,) if position_ids is None else (mask, position_ids)
    # Those of inference mode have no version to be known again by.
    if any(tensor.is_inference() for tensor in tensors):
        return None
    known = _last.get(window)
    if known is None or not known.is_of(tensors, rows):
        refs = tuple(weakref.ref(tensor) for tensor in tensors)
        versions = tuple(tensor._version for tensor in tensors)
        known = _last[window] = _Reading(refs, versions, rows, _read(mask, position_ids, rows, window))
    return known.found


def _read(mask: Tensor, position_ids: Tensor | None, rows: int, window: int | None) -> Documents | None:
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    positions = at[None] if position_ids is None else position_ids
    # As transformers numbers them: a document goes on as long as positions count up by one.
    restarts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    number = restarts.cumsum(-1)
    matches = torch.ones(2, dtype=torch.bool, device=mask.device)
    for rows_at in torch.split(at, CHUNK):
        distance = rows_at[:, None] - at
        seen = (number[:, rows_at, None] == number[:, None, :]) & (distance >= 0)
        given = mask[:, 0, rows_at]
        near = seen if window is None else seen & (distance < window)
        matches &= torch.stack([(given == seen).all(), (given == near).all()])
    everything, windowed = matches.tolist()
    if not (everything or windowed):
        return None
    begins = restarts.expand(rows, length).clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0].tolist()
    bounds = (*starts, rows * length)
    on_device = torch.tensor(bounds, dtype=torch.int32, device=mask.device)
    return Documents(bounds, on_device, None if everything else window)
