"""How many labels count, asked before the model runs, so that nobody waits for the device when the loss is computed."""

import torch

from .rows import census

NEARLY_ALL = 31 / 32
"""Of the rows: leaving out the others would save less than waiting for their places costs."""


class LabelCount:
    """The census of `labels` (any shape, integers; -100 does not count), on its way to the host."""

    def __init__(self, labels: torch.Tensor) -> None:
        self._total = labels.numel()
        found = census(labels.detach().reshape(-1), -100)
        self._copied: torch.cuda.Event | None = None
        if found.is_cuda:
            self._numbers = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._numbers.copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._copied.record()
        else:
            self._numbers = found

    @classmethod
    def of(cls, labels: object) -> "LabelCount | None":
        """The count of what a model got as labels; None if that was nothing that can be counted now."""
        if not isinstance(labels, torch.Tensor) or labels.dtype is not torch.int64 or not labels.numel():
            return None
        if labels.device.type not in ("cpu", "cuda"):
            return None
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return cls(labels)

    def nearly_all_of(self, vocabulary: int) -> bool:
        """Whether all but a few labels count and every one of those is a token of the vocabulary.

        Waits for the device only until it has begun with what was queued after the labels.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count, low, high = self._numbers.tolist()
        return bool(count >= NEARLY_ALL * self._total and low >= 0 and high < vocabulary)
