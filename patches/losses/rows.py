"""Which rows of hidden states count, and how many of them are projected at a time."""

from dataclasses import dataclass

import torch

MIB = 2**20
TILE_BYTES = 256 * MIB
"""Of a chunk's projections on a GPU, unless that were fewer than `TILE_ROWS` rows."""
TILE_ROWS = 1024
MOST_BYTES = 544 * MIB
CPU_TILE_BYTES = 16 * MIB


def tile_rows(count: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, trained: bool) -> int:
    """How many rows make a chunk of `count` rows.

    Few rows keep the products from filling the GPU; among very many rows a larger chunk is no larger share of memory.
    Where the head is trained, each chunk also reads and writes the sum of its gradients, 4 bytes an element, so chunks
    are four times as large.
    """
    row = max(1, vocabulary * dtype.itemsize)
    if device.type == "cpu":
        return max(1, CPU_TILE_BYTES // row)
    rows = min(max(TILE_ROWS, TILE_BYTES // row, count // 32), max(1, MOST_BYTES // row))
    rows *= 4 if trained else 1
    return rows // 128 * 128 if rows > 128 else rows


@dataclass(frozen=True, slots=True)
class Rows:
    """The `count` of `total` rows that are projected: `targets` [count], their places `index` [count], None for all.

    `counted` is how many targets are no -1; a -1 makes a row's log-probability and gradient 0.
    """

    total: int
    count: int
    targets: torch.Tensor
    index: torch.Tensor | None
    counted: int | torch.Tensor

    def take(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The hidden states [n, H] of a chunk."""
        return hidden[chunk] if self.index is None else hidden.index_select(0, self.index[chunk])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values [count] in their places among [total], 0 elsewhere; differentiable."""
        if self.index is None:
            return values
        return values.new_zeros(self.total).index_put((self.index,), values)


def census(targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Of targets [N]: how many are not `ignore_index`, the least and the greatest of those (0 if none). int64 [3]."""
    kept = targets != ignore_index
    return torch.stack((kept.sum(), *torch.where(kept, targets, 0).aminmax()))


def all_rows(targets: torch.Tensor, ignore_index: int) -> Rows:
    """Every row, for targets known to lie in the vocabulary or to be `ignore_index`. Nobody waits for the device."""
    kept = targets != ignore_index
    return Rows(targets.shape[0], targets.shape[0], torch.where(kept, targets, -1), None, kept.sum())


def select_rows(targets: torch.Tensor, vocabulary: int, ignore_index: int) -> Rows:
    """Rows whose target is not `ignore_index`. Raises IndexError for a target outside the vocabulary.

    The host waits for the device once, for three numbers.
    """
    targets, total = targets.contiguous(), targets.shape[0]
    if not total:
        return Rows(0, 0, targets, None, 0)
    count, low, high = census(targets, ignore_index).tolist()
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"target {low if low < 0 else high} is out of bounds: the vocabulary has {vocabulary} tokens, "
            f"and only {ignore_index} is ignored"
        )
    if count == total:
        return Rows(total, count, targets, None, count)
    index = (targets == ignore_index).to(torch.uint8).argsort(stable=True)[:count]
    return Rows(total, count, targets[index], index, count)
