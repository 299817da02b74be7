"""Matrices copied into others of their shapes, and to another dtype on the way, again and again in one launch."""

from collections.abc import Sequence

import torch

from ..dispatch import backend_for
from .common import implementation

# Elements of one program.
BLOCK = 4096


class Copies:
    """Sources [rows, cols], fp32, fp16 or bf16, and targets of the same shapes, of unit stride in a row.

    `table` [pairs, 6] holds the addresses of source and target, the row strides of both, cols and how many elements;
    `blocks` [programs, 2] which pair a program copies a part of, and which part; both on the matrices' device. They
    are made for matrices of one GPU and one dtype whose targets share one, too; torch copies others one by one.
    """

    __slots__ = ("blocks", "sources", "table", "targets")

    def __init__(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        self.sources, self.targets = tuple(sources), tuple(targets)
        self.table = self.blocks = None
        if not _is_one_launch(self.sources) or not _is_one_launch(self.targets):
            return
        rows, blocks = [], []
        for i, (source, target) in enumerate(zip(self.sources, self.targets, strict=True)):
            strides = source.stride(0), target.stride(0)
            rows.append([source.data_ptr(), target.data_ptr(), *strides, source.shape[1], source.numel()])
            blocks += [[i, part] for part in range(-(-source.numel() // BLOCK))]
        device = self.sources[0].device
        self.table = torch.tensor(rows, dtype=torch.int64).to(device)
        self.blocks = torch.tensor(blocks, dtype=torch.int32).to(device)

    def run(self) -> None:
        """Copy what the sources hold now."""
        if self.table is not None and self.blocks is not None:
            implementation("copies").copy_rows(
                self.table, self.blocks, self.sources[0].dtype, self.targets[0].dtype, BLOCK
            )
        elif self.sources:
            torch._foreach_copy_(self.targets, self.sources)


def _is_one_launch(matrices: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel takes all of these."""
    if not matrices or backend_for(*matrices) != "triton":
        return False
    plain = (m.dim() == 2 and m.stride(1) == 1 and m.dtype is matrices[0].dtype for m in matrices)
    return all(plain) and max(m.numel() for m in matrices) < 2**31 - BLOCK
