"""Keys and values of all layers: the token at position p of a row lies in slot p, wherever padding was."""

from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor


class Cache:
    """For each layer, keys and values [rows, key heads, capacity, head dim]."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def fill(self, layers: Sequence[Any], lengths: Tensor, source: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """Take over what a forward over prompts with padding on the left has left in transformers' cache.

        `lengths` [rows] are those of the prompts, and `source` [rows] which row of that cache a row begins with. A
        layer may have kept only its last tokens. Each is let go of once it is copied.
        """
        places: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for layer, dtype in zip(layers, dtypes, strict=True):
            for name, kept in (("keys", self.keys), ("values", self.values)):
                given: Tensor = getattr(layer, name)
                if given.shape[2] not in places:
                    places[given.shape[2]] = _places(given.shape[2], lengths, source)
                row, slot, from_row, from_slot = places[given.shape[2]]
                shape = (self.rows, given.shape[1], self.capacity, given.shape[3])
                # Not empty: a product takes slots that are masked, and 0 times NaN is NaN.
                ours = torch.zeros(shape, dtype=dtype, device=given.device)
                ours[row, :, slot] = given[from_row, :, from_slot].to(dtype)
                kept.append(ours)
                setattr(layer, name, None)

    def grow(self, slots: int) -> None:
        """Have so many slots more; a tensor at a time, each of which is let go of once it is copied."""
        before, self.capacity = self.capacity, self.capacity + slots
        for kept in (self.keys, self.values):
            for i, tensor in enumerate(kept):
                larger = tensor.new_zeros((self.rows, tensor.shape[1], self.capacity, tensor.shape[3]))
                larger[:, :, :before] = tensor
                kept[i] = larger

    def keep(self, rows: Tensor) -> None:
        """Leave out all but these rows [n], ascending; in the memory that there is."""
        self.rows = rows.shape[0]
        for kept in (self.keys, self.values):
            for i, tensor in enumerate(kept):
                left = tensor[: self.rows]
                left.copy_(tensor.index_select(0, rows))
                kept[i] = left


def _places(kept: int, lengths: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, slot) of ours and of theirs for all tokens that rows have among the last `kept` of the padded prompts."""
    back = torch.arange(kept, device=lengths.device) - kept
    slots = lengths[:, None] + back
    row, column = (slots >= 0).nonzero(as_tuple=True)
    return row, slots[row, column], source[row], column
