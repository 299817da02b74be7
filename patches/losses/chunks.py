"""One pass over chunks of hidden states: project, take what is wanted from the logits, put their gradient to use."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels.ops.vocab_rows import LogitShape, RowStatistics, rows_implementation
from .products import add_wide_product, wide_product
from .row_gradients import RowGradients
from .rows import Rows, tile_rows

Wants = tuple[bool, bool, bool]
"""Which gradients: of the hidden states, of the weight, of the bias."""
NOTHING = (False, False, False)


@dataclass(frozen=True, slots=True)
class Task:
    """All that is no tensor of the graph."""

    rows: Rows
    shape: LogitShape
    smoothing: float
    outputs: tuple[str, ...]
    dtype: torch.dtype

    @property
    def unit(self) -> float:
        """What gradients are multiplied by while they are in `dtype`.

        The target's, 1 - smoothing less its probability, is most of each row: it becomes 1, which rounds to itself. In
        fp16, probabilities of 1e-7 would vanish.
        """
        return (256.0 if self.dtype is torch.float16 else 1.0) / (1.0 - self.smoothing if self.smoothing < 1.0 else 1.0)


@dataclass(slots=True)
class Gradients:
    """What a pass over the chunks gathers: D [N, H], dW [V, H] and db [V], each None where it is not wanted.

    The last two are in fp32 at least.
    """

    hidden: RowGradients | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@torch.no_grad()
def run(
    task: Task,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wants: Wants = (False,) * 3,
) -> tuple[RowStatistics, Gradients]:
    """All chunks once. `wants` says which gradients of the sum of log-probabilities are formed, times `task.unit`."""
    wide = torch.float64 if task.dtype is torch.float64 else torch.float32
    found = RowStatistics.empty(task.rows.count, task.outputs, hidden, wide)
    gradients = _room(task, wants, hidden, weight, bias)
    for chunk, h, y, w in _projections(task, hidden, weight, bias, trained=wants[1]):
        rows_implementation(y).log_probs(
            y,
            task.rows.targets[chunk],
            found.rows(chunk),
            task.shape,
            task.smoothing,
            task.unit if any(wants) else None,
        )
        _gather(gradients, wants, chunk, h, y, w)
    return found, gradients


@torch.no_grad()
def run_again(
    task: Task,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    found: tuple[torch.Tensor, torch.Tensor | None],
    grads: tuple[torch.Tensor | None, torch.Tensor | None],
    wants: Wants,
) -> Gradients:
    """All chunks in the backward: `found` are log-sum-exp and entropy, `grads` those of log-probability and entropy."""
    gradients = _room(task, wants, hidden, weight, bias)
    lse, entropy = found
    grad, grad_entropy = (None if item is None else item.to(lse.dtype).contiguous() for item in grads)
    for chunk, h, y, w in _projections(task, hidden, weight, bias, trained=wants[1]):
        part = [None if item is None else item[chunk] for item in (entropy, grad, grad_entropy)]
        rows_implementation(y).log_probs_gradient(
            y, task.rows.targets[chunk], lse[chunk], *part, task.shape, task.smoothing, 1.0
        )
        _gather(gradients, wants, chunk, h, y, w)
    return gradients


def _projections(
    task: Task, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, trained: bool
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Chunk, its hidden states, its projections in a buffer that all chunks share, and the weight; in `task.dtype`."""
    vocabulary, count = weight.shape[0], task.rows.count
    size = min(count, tile_rows(count, vocabulary, task.dtype, hidden.device, trained=trained))
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.detach().to(task.dtype)
        b = None if bias is None else bias.detach().to(task.dtype)
        buffer = torch.empty(size, vocabulary, dtype=task.dtype, device=hidden.device)
        for start in range(0, count, max(size, 1)):
            chunk = slice(start, min(start + size, count))
            h = task.rows.take(hidden.detach(), chunk).to(task.dtype)
            y = buffer[: chunk.stop - start]
            if b is None:
                torch.mm(h, w.t(), out=y)
            else:
                torch.addmm(b, h, w.t(), out=y)
            yield chunk, h, y, w


def _room(task: Task, wants: Wants, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Gradients:
    """Gradients to gather into; zeros where there is nothing to gather."""
    made = Gradients(RowGradients(task.rows, hidden, task.dtype) if wants[0] else None)
    if not task.rows.count:
        made.weight = torch.zeros_like(weight) if wants[1] else None
        made.bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
    return made


def _gather(
    gradients: Gradients, wants: Wants, chunk: slice, h: torch.Tensor, y: torch.Tensor, w: torch.Tensor
) -> None:
    """Turn the gradient of a chunk's projections into those of its rows and of the head."""
    if gradients.hidden is not None:
        gradients.hidden.put(chunk, y, w)
    if wants[1]:
        if gradients.weight is None:
            gradients.weight = wide_product(y.t(), h)
        else:
            add_wide_product(gradients.weight, y.t(), h)
    if wants[2]:
        column = y.sum(0, dtype=torch.promote_types(y.dtype, torch.float32))
        gradients.bias = column if gradients.bias is None else gradients.bias.add_(column)
