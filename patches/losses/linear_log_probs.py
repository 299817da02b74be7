"""From hidden states to log-probabilities and cross entropy, a chunk of rows at a time, without holding all logits.

For a chunk of rows h [n, H]: y = h W^T is made in one buffer, the row kernels take what is wanted from it and overwrite
it by its gradient, and the next product uses that before the buffer is reused. With g = d log_prob / dy:

- a frozen head: D = g W is formed in the forward, and the backward of any function of the log-probabilities is
  D * its gradient by row. Two products in all, where recomputing needs three.
- a trained head and a loss that sums: dW = g^T h, in fp32 over chunks, is formed in the forward too. Three products.
- a trained head and anything else: y is made again in the backward. Four products.

The online softmax is that of Milakov and Gimelshein, 2018 (arXiv:1805.02867). Rows whose target is ignored are left out
of every product.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.once import differentiable_once
from ..kernels.ops.vocab_rows import LogitShape, RowStatistics
from .chunks import Gradients, Task, run, run_again
from .labels import LabelCount
from .row_gradients import scaled
from .rows import all_rows, select_rows

PLAIN = LogitShape()


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Tensors [N] in fp32 (fp64 for fp64 inputs), 0 in ignored rows; the meaning is that of `RowStatistics`.

    `log_probs` and `entropy` are differentiable.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    shape: LogitShape = PLAIN,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    outputs: tuple[str, ...] = (),
    compute_dtype: torch.dtype | None = None,
) -> TokenLogProbs:
    """Log-probabilities of `targets` [N] under logits of `hidden` [N, H], `weight` [V, H] and `bias` [V] or None.

    Differentiable in all three, whatever is done with the result. The products run in `compute_dtype` (default: that of
    `hidden`), sums of gradients in fp32. Raises IndexError for a target outside [0, V) that is not `ignore_index`, and
    ValueError for an unknown output.
    """
    task = _task(hidden, weight, targets, shape, ignore_index, smoothing, outputs, compute_dtype)
    if _wants_gradient(hidden, weight, bias):
        function = _Recomputed if _wants_gradient(weight, bias) else _FrozenHead
        found = function.apply(task, hidden, weight, bias)  # type: ignore[no-untyped-call]  # torch's
    else:
        found = _in_order(task, run(task, hidden, weight, bias)[0])
    names = ("log_probs", *outputs)
    return TokenLogProbs(**{name: task.rows.spread(value) for name, value in zip(names, found, strict=True)})


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    shape: LogitShape = PLAIN,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    reduction: str = "mean",
    compute_dtype: torch.dtype | None = None,
    labels: LabelCount | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` of the logits in fp32, and its errors; see `linear_log_probs`.

    `reduction` is "mean" (over rows that are not ignored; NaN where there is none), "sum" or "none". `labels`, of which
    the targets were made, tell whether nearly all rows count: then all are projected, the device is not waited for, and
    a target outside the vocabulary that was not among the labels gives NaN rather than an IndexError.
    """
    if reduction == "sum" or reduction == "mean":
        dense = labels is not None and labels.nearly_all_of(weight.shape[0])
        task = _task(hidden, weight, targets, shape, ignore_index, smoothing, (), compute_dtype, dense=dense)
        if _wants_gradient(weight, bias):
            total: torch.Tensor = _SummedLoss.apply(task, hidden, weight, bias)  # type: ignore[no-untyped-call]
        elif _wants_gradient(hidden):
            (log_probs,) = _FrozenHead.apply(task, hidden, weight, bias)  # type: ignore[no-untyped-call]
            total = -log_probs.sum()
        else:
            total = -run(task, hidden, weight, bias)[0].log_probs.sum()
        return total / task.rows.counted if reduction == "mean" else total
    if reduction != "none":
        raise ValueError(f"{reduction} is not a valid value for reduction")
    options: dict[str, Any] = {"shape": shape, "ignore_index": ignore_index, "smoothing": smoothing}
    return -linear_log_probs(hidden, weight, bias, targets, compute_dtype=compute_dtype, **options).log_probs


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _task(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shape: LogitShape,
    ignore_index: int,
    smoothing: float,
    outputs: tuple[str, ...],
    dtype: torch.dtype | None,
    *,
    dense: bool = False,
) -> Task:
    if hidden.shape[:-1] != targets.shape or hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, targets))
        raise ValueError(f"hidden [N, H], weight [V, H] and targets [N] do not fit each other: {shapes}")
    targets = targets.to(hidden.device)
    rows = all_rows(targets, ignore_index) if dense else select_rows(targets, weight.shape[0], ignore_index)
    return Task(rows, shape, smoothing, outputs, hidden.dtype if dtype is None else dtype)


def _keeps_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _finished(
    made: Gradients,
    factor: torch.Tensor | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    *,
    in_place: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients times `factor`, each in its dtype."""

    def finish(total: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
        if total is None or dtype is None:
            return None
        return total.to(dtype) if factor is None else scaled(total, factor, dtype, in_place=in_place)

    hidden, weight, bias = dtypes
    rows = None if made.hidden is None or hidden is None else made.hidden.times(factor, hidden, in_place=in_place)
    return rows, finish(made.weight, weight), finish(made.bias, bias)


class _Saved:
    """Gradients formed in the forward. Taken by the first backward, unless the graph is kept for another."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients: Gradients | None = gradients

    def take(self) -> tuple[Gradients, bool]:
        """The gradients, and whether they may be overwritten."""
        if self.gradients is None:
            raise RuntimeError(
                "backward through a fused loss a second time: its gradients were freed; "
                "specify retain_graph=True in the first backward"
            )
        gradients, keep = self.gradients, _keeps_graph()
        if not keep:
            self.gradients = None
        return gradients, not keep


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        found, gradients = run(task, hidden, weight, bias, (True, False, False))
        ctx.task, ctx.formed, ctx.dtype = task, _Saved(gradients), hidden.dtype
        if "entropy" in task.outputs:
            ctx.save_for_backward(hidden, weight, bias, found.log_sum_exp, found.entropy)
        return _results(ctx, task, found)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        task: Task = ctx.task
        grad, grad_entropy = _incoming(task, grads)
        if grad_entropy is not None:
            hidden, weight, bias, lse, entropy = ctx.saved_tensors
            wants = (True, False, False)
            again = run_again(task, hidden, weight, bias, (lse, entropy), (grad, grad_entropy), wants)
            return None, *_finished(again, None, (ctx.dtype, None, None), in_place=True)
        formed, in_place = ctx.formed.take()
        if grad is None:
            return None, None, None, None
        factor = task.rows.spread(grad).unsqueeze(-1) / task.unit
        return None, *_finished(formed, factor, (ctx.dtype, None, None), in_place=in_place)


class _SummedLoss(torch.autograd.Function):
    """Minus the sum of log-probabilities, for a head that is trained."""

    @staticmethod
    def forward(ctx: Any, task: Task, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        wants = ctx.needs_input_grad[1:]
        found, gradients = run(task, hidden, weight, bias, wants)
        ctx.unit, ctx.formed = task.unit, _Saved(gradients)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias))
        return -found.log_probs.sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        formed, in_place = ctx.formed.take()
        return None, *_finished(formed, grad / -ctx.unit, ctx.dtypes, in_place=in_place)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        found, _ = run(task, hidden, weight, bias)
        ctx.task = task
        ctx.save_for_backward(hidden, weight, bias, found.log_sum_exp, found.entropy)
        return _results(ctx, task, found)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        wants = ctx.needs_input_grad[1:]
        both = _incoming(ctx.task, grads)
        made = run_again(ctx.task, hidden, weight, bias, (lse, entropy), both, wants)
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return None, *_finished(made, None, dtypes, in_place=True)


def _in_order(task: Task, found: RowStatistics) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, then the outputs in their order."""
    return found.log_probs, *(getattr(found, name) for name in task.outputs)


def _results(ctx: Any, task: Task, found: RowStatistics) -> tuple[torch.Tensor, ...]:
    results = _in_order(task, found)
    ctx.mark_non_differentiable(
        *(result for name, result in zip(task.outputs, results[1:], strict=True) if name != "entropy")
    )
    return results


def _incoming(task: Task, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of log-probabilities and of entropy."""
    at = 1 + task.outputs.index("entropy") if "entropy" in task.outputs else None
    return grads[0], None if at is None else grads[at]
