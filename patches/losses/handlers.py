"""Torch functions on deferred logits that need no logits, or only a chunk of them at a time."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .deferred import DeferredLogits, View, handlers
from .linear_log_probs import TokenLogProbs, linear_cross_entropy, linear_log_probs
from .recipe import Recipe, Step
from .rowwise import rowwise
from .shape import log_probs_of, logit_shape

Handler = Callable[..., Any]
_T = torch.Tensor
NO_INDEX = -(2**63)
"""Never a valid target, where no target is to be ignored."""


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions, each under every name that it has."""

    def register(handler: Handler) -> Handler:
        handlers.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _is_last(logits: DeferredLogits, dim: object) -> bool:
    return isinstance(dim, int) and dim in (-1, logits.dim() - 1)


def flat(logits: DeferredLogits) -> Recipe:
    """The recipe of all rows in one dimension: rows [N, H]."""
    return logits.recipe.of_rows(lambda rows: rows.reshape(-1, rows.shape[-1]))


def _viewed(logits: DeferredLogits, view: View) -> DeferredLogits:
    """A view of leading dimensions, which does the same to rows [..., H] as to logits [..., V]."""
    return logits.derive(logits.recipe.of_rows(view), view)


def _keeps_vocabulary(logits: DeferredLogits, items: tuple[Any, ...]) -> bool:
    """Whether an index leaves the last dimension as it is."""
    consumed = 0
    for position, item in enumerate(items):
        if isinstance(item, bool) or (isinstance(item, torch.Tensor) and item.dtype is torch.uint8):
            return False
        if item is None and (consumed == logits.dim() or any(other is Ellipsis for other in items[:position])):
            return False
        is_mask = isinstance(item, torch.Tensor) and item.dtype is torch.bool
        consumed += item.dim() if is_mask else item is not None and item is not Ellipsis
    has_ellipsis = any(item is Ellipsis for item in items)
    reaches_last = consumed == logits.dim() or (has_ellipsis and items[-1] is not Ellipsis)
    return not reaches_last or (isinstance(items[-1], slice) and items[-1] == slice(None))


@handles(_T.__getitem__)
def _getitem(logits: DeferredLogits, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if not _keeps_vocabulary(logits, items):
        return NotImplemented
    if any(isinstance(item, torch.Tensor | list) for item in items):
        return logits.derive(logits.recipe.of_rows(lambda rows: rows[index]))
    return _viewed(logits, lambda value: value[index])


@handles(_T.view, _T.reshape, torch.reshape)
def _reshape(logits: DeferredLogits, *sizes: Any, **named: Any) -> Any:
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if named or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    vocabulary, leading = logits.shape[-1], sizes[:-1]
    known = math.prod(size for size in leading if size != -1)
    rows = logits.numel() // vocabulary
    fits = rows % known == 0 if -1 in leading and known else known == rows
    if not fits or sizes[-1] not in (vocabulary, -1) or (sizes[-1] == -1 and -1 in leading):
        return NotImplemented
    return _viewed(logits, lambda value: value.reshape(*leading, value.shape[-1]))


@handles(_T.flatten, torch.flatten)
def _flatten(logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % logits.dim() == logits.dim() - 1:
        return NotImplemented
    return _viewed(logits, lambda value: value.flatten(start_dim, end_dim))


def _parts(logits: DeferredLogits, dim: int, split: Callable[[torch.Tensor], Any]) -> Any:
    if _is_last(logits, dim):
        return NotImplemented
    count = len(split(logits.recipe.rows))
    return tuple(_viewed(logits, lambda value, i=i: split(value)[i]) for i in range(count))  # type: ignore[misc]  # i is bound at once


@handles(_T.chunk, torch.chunk)
def _chunk(logits: DeferredLogits, chunks: int, dim: int = 0) -> Any:
    return _parts(logits, dim, lambda value: value.chunk(chunks, dim))


@handles(_T.split, torch.split)
def _split(logits: DeferredLogits, split_size: Any, dim: int = 0) -> Any:
    return _parts(logits, dim, lambda value: torch.split(value, split_size, dim))


@handles(_T.unbind, torch.unbind)
def _unbind(logits: DeferredLogits, dim: int = 0) -> Any:
    return _parts(logits, dim, lambda value: value.unbind(dim))


@handles(_T.__iter__)
def _iterate(logits: DeferredLogits) -> Any:
    return iter(logits.unbind(0)) if logits.dim() > 1 else NotImplemented


@handles(_T.detach)
def _detach(logits: DeferredLogits) -> DeferredLogits:
    return logits.derive(logits.recipe.detached(), lambda value: value.detach())


@handles(_T.contiguous)
def _contiguous(logits: DeferredLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return logits if memory_format is torch.contiguous_format else NotImplemented


@handles(_T.clone, torch.clone)
def _clone(logits: DeferredLogits, *, memory_format: Any = torch.preserve_format) -> Any:
    # DistributedDataParallel clones what a model returns.
    return logits.derive(logits.recipe) if memory_format is torch.preserve_format else NotImplemented


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits:
    return logits if dtype is logits.dtype else logits.derive(logits.recipe.then(Step("cast", dtype=dtype)))


@handles(_T.float)
def _float(logits: DeferredLogits) -> DeferredLogits:
    return _cast(logits, torch.float32)


@handles(_T.half)
def _half(logits: DeferredLogits) -> DeferredLogits:
    return _cast(logits, torch.float16)


@handles(_T.bfloat16)
def _bfloat16(logits: DeferredLogits) -> DeferredLogits:
    return _cast(logits, torch.bfloat16)


@handles(_T.double)
def _double(logits: DeferredLogits) -> DeferredLogits:
    return _cast(logits, torch.float64)


@handles(_T.to)
def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if "copy" in kwargs or "memory_format" in kwargs or len(args) > 2:
        return NotImplemented
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if (device is not None and _T.to(torch.empty(0), device).device != logits.device) or (
        dtype is not None and not dtype.is_floating_point
    ):
        return NotImplemented
    return logits if dtype is None else _cast(logits, dtype)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@handles(_T.__truediv__, _T.div, torch.div, _T.true_divide, torch.true_divide)
def _divide(logits: DeferredLogits, other: Any, **rounding: Any) -> Any:
    if rounding or not _is_number(other):
        return NotImplemented
    return logits.derive(logits.recipe.then(Step("scale", float(other), divides=True)))


@handles(_T.__mul__, _T.__rmul__, _T.mul, torch.mul, _T.multiply, torch.multiply)
def _multiply(logits: DeferredLogits, other: Any, **out: Any) -> Any:
    if out or not _is_number(other):
        return NotImplemented
    return logits.derive(logits.recipe.then(Step("scale", float(other))))


@handles(_T.neg, torch.neg, _T.__neg__, torch.negative, _T.negative)
def _negate(logits: DeferredLogits) -> Any:
    return logits.derive(logits.recipe.then(Step("scale", -1.0)))


@handles(_T.tanh, torch.tanh)
def _tanh(logits: DeferredLogits, **out: Any) -> Any:
    return NotImplemented if out else logits.derive(logits.recipe.then(Step("tanh")))


def _dtype_of(function: View, logits: DeferredLogits) -> torch.dtype:
    """What a function gives for logits of this dtype. Autocast decides by device and operation, so it is asked."""
    if not torch.is_autocast_enabled(logits.device.type):
        return logits.dtype
    return function(torch.zeros(1, 1, dtype=logits.dtype, device=logits.device)).dtype


@handles(_T.log_softmax, torch.log_softmax, F.log_softmax)
def _log_softmax(
    logits: DeferredLogits, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if not _is_last(logits, dim):
        return NotImplemented
    if dtype is None:
        dtype = _dtype_of(lambda row: torch.log_softmax(row, -1), logits)
    return logits.derive(logits.recipe.then(Step("log_softmax", dtype=dtype)))


def _are_classes(logits: DeferredLogits, target: Any) -> bool:
    """Whether targets are one class for each row of logits [N, V]."""
    return (
        isinstance(target, torch.Tensor)
        and target.dtype is torch.int64
        and logits.dim() == 2
        and target.shape == logits.shape[:1]
        and target.device == logits.device
    )


@handles(F.cross_entropy)
def _cross_entropy(
    logits: DeferredLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    shape = logit_shape(logits.recipe.steps)
    legacy = weight is not None or size_average is not None or reduce is not None
    if legacy or shape is None or not _are_classes(logits, target) or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented
    recipe = logits.recipe
    recipe.check()
    rows, head, bias = recipe.tensors()
    return linear_cross_entropy(
        rows,
        head,
        bias,
        target,
        shape=shape,
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        reduction=reduction,
        compute_dtype=recipe.projection.dtype,
        labels=recipe.labels,
    ).to(_dtype_of(lambda row: F.cross_entropy(row, row.argmax(-1)), logits))


@handles(F.nll_loss)
def _nll_loss(
    log_probs: DeferredLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    found = log_probs_of(log_probs.recipe.steps)
    if found is None or found[1] != 1.0:
        return NotImplemented
    before = log_probs.derive(log_probs.recipe.with_steps(found[2]))
    return _cross_entropy(before, target, weight, size_average, ignore_index, reduce, reduction)


def token_statistics(
    logits: DeferredLogits, targets: torch.Tensor, outputs: tuple[str, ...] = (), ignore_index: int = NO_INDEX
) -> TokenLogProbs | None:
    """`linear_log_probs` of logits [..., V] or log-probabilities, for targets [...]; None if their steps are others.

    Results are flat, [N].
    """
    steps = logits.recipe.steps
    found = log_probs_of(steps)
    shape = logit_shape(steps) if found is None else found[0]
    if shape is None or (found is not None and found[1] != 1.0):
        return None
    recipe = flat(logits)
    rows, head, bias = recipe.tensors()
    return linear_log_probs(
        rows,
        head,
        bias,
        targets.reshape(-1),
        shape=shape,
        ignore_index=ignore_index,
        outputs=outputs,
        compute_dtype=recipe.projection.dtype,
    )


def _selected(log_probs: DeferredLogits, targets: torch.Tensor) -> torch.Tensor | None:
    """One log-probability [...] of each row, times whatever they were multiplied by; None for plain logits."""
    found = log_probs_of(log_probs.recipe.steps)
    if found is None:
        return None
    _, sign, before = found
    statistics = token_statistics(log_probs.derive(log_probs.recipe.with_steps(before)), targets)
    if statistics is None:
        return None
    chosen = statistics.log_probs.view(targets.shape)
    return chosen if sign == 1.0 else chosen * sign


@handles(_T.gather, torch.gather)
def _gather(logits: DeferredLogits, dim: Any, index: Any, *, sparse_grad: bool = False, out: Any = None) -> Any:
    if out is not None or not isinstance(index, torch.Tensor) or not _is_last(logits, dim):
        return NotImplemented
    if index.dim() != logits.dim() or index.shape[:-1] != logits.shape[:-1]:
        return NotImplemented
    if index.shape[-1] == 1:
        chosen = _selected(logits, index[..., 0])
        if chosen is not None:
            return chosen.unsqueeze(-1).to(logits.dtype)
    picked = rowwise(lambda chunk, at: chunk.gather(-1, at), flat(logits), along=(index.reshape(-1, index.shape[-1]),))
    return picked.view(index.shape)


@handles(torch.take_along_dim, _T.take_along_dim)
def _take_along_dim(logits: DeferredLogits, indices: Any, dim: Any = None, *, out: Any = None) -> Any:
    return _gather(logits, dim, indices, out=out)


def _reduces(*functions: Any) -> None:
    """Register reductions over the vocabulary that give one tensor."""
    for function in functions:

        def handler(logits: DeferredLogits, *args: Any, _function: Any = function, **kwargs: Any) -> Any:
            dim, *rest = args if args else (kwargs.pop("dim", None),)
            if isinstance(dim, tuple | list) and len(dim) == 1:
                dim = dim[0]
            if not _is_last(logits, dim) or "out" in kwargs:
                return NotImplemented
            result = rowwise(lambda chunk: _function(chunk, -1, *rest, **kwargs), flat(logits))
            return result.view(*logits.shape[:-1], *result.shape[1:])

        handlers[function] = handler


_reduces(_T.argmax, torch.argmax, _T.argmin, torch.argmin, _T.logsumexp, torch.logsumexp)
_reduces(_T.sum, torch.sum, _T.amax, torch.amax, _T.amin, torch.amin)


@handles(_T.topk, torch.topk)
def _topk(logits: DeferredLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _is_last(logits, dim):
        return NotImplemented
    found = rowwise(lambda chunk: chunk.topk(k, -1, largest, sorted).indices, flat(logits))
    indices = found.view(*logits.shape[:-1], k)
    return torch.return_types.topk((_gather(logits, -1, indices), indices))


@handles(_T.max, torch.max)
def _max(logits: DeferredLogits, dim: Any = None, keepdim: bool = False, **out: Any) -> Any:
    if out or not _is_last(logits, dim):
        return NotImplemented
    values, indices = _topk(logits, 1)
    pair = (values, indices) if keepdim else (values.squeeze(-1), indices.squeeze(-1))
    return torch.return_types.max(pair)


@handles(_T.mean, torch.mean)
def _mean(logits: DeferredLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None) -> Any:
    """Over the vocabulary or over all. The mean of a linear function is the function of the mean."""
    recipe = logits.recipe
    if out is not None or dtype is not None or (dim is not None and not _is_last(logits, dim)):
        return NotImplemented
    if any(step.kind not in ("scale", "cast") for step in recipe.steps):
        return NotImplemented
    recipe.check()
    rows, weight, bias = recipe.tensors()
    wide = torch.promote_types(recipe.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.reshape(-1, rows.shape[-1]).mean(0, dtype=wide) if dim is None else rows.to(wide)
        mean = rows @ weight.mean(0, dtype=wide)
        mean = (mean if bias is None else mean + bias.mean(dtype=wide)) * math.prod(s.multiplier for s in recipe.steps)
    return (mean.unsqueeze(-1) if keepdim and dim is not None else mean).to(logits.dtype)
