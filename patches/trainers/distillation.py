"""GKD, GOLD and SDFT: divergences between two models over the whole vocabulary, a chunk of tokens at a time."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..losses.deferred import DeferredLogits
from ..losses.handlers import flat
from ..losses.rowwise import rowwise
from .log_probs import selective_log_softmax
from .scope import Method, deferred_logits, replaced, within

IGNORED = -100


def _are_deferred(*logits: Any) -> bool:
    same = {getattr(item, "shape", None) for item in logits}
    return len(same) == 1 and all(isinstance(item, DeferredLogits) and item.pending for item in logits)


def generalized_jsd(trainer: type) -> dict[str, Any]:
    """GKD and GOLD. TRL's own divergence runs on a chunk of labelled tokens; only its sum is ours."""
    divergence: Callable[..., torch.Tensor] = trainer.generalized_jsd_loss  # type: ignore[attr-defined]  # the trainers' own

    signature = inspect.signature(divergence)

    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        student, teacher, labels = (given[name] for name in ("student_logits", "teacher_logits", "labels"))
        reduction, items = given["reduction"], given.get("num_items_in_batch")
        if not _are_deferred(student, teacher) or given.get("logits_are_probs") or reduction not in _SIZES:
            return divergence(*args, **kwargs)
        size = student.shape[0] if student.dim() > 1 else 1
        if labels is not None:
            kept = labels != IGNORED
            student, teacher = student[kept], teacher[kept]
        options = {"beta": given["beta"], "temperature": given["temperature"]}
        total = rowwise(
            lambda student, teacher: divergence(student, teacher, reduction="none", **options).sum(-1),
            flat(student),
            flat(teacher),
        ).sum()
        if items is not None:
            return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
        rows = student.numel() // student.shape[-1]
        return total / _SIZES[reduction](rows, rows if labels is not None else size, student.shape[-1])

    @contextmanager
    def scope(self: Any, model: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with deferred_logits(model, getattr(self, "teacher_model", None)):
            yield

    return {**within(trainer, scope, "compute_loss"), "generalized_jsd_loss": staticmethod(generalized_jsd_loss)}


# What a sum is divided by, from the number of tokens, TRL's batch size and the vocabulary.
_SIZES: dict[str, Callable[[int, int, int], int]] = {
    "batchmean": lambda rows, batch, vocabulary: max(batch, 1),
    "sum": lambda rows, batch, vocabulary: 1,
    "mean": lambda rows, batch, vocabulary: rows * vocabulary,
}


def _each_row(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of student and teacher logits [B, T, V] that treats each token by itself, for deferred logits too."""

    def function(student_logits: Any, teacher_logits: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _are_deferred(student_logits, teacher_logits):
            return original(student_logits, teacher_logits, *args, **kwargs)
        per_token = rowwise(
            lambda student, teacher: original(student[None], teacher[None], *args, **kwargs)[0],
            flat(student_logits),
            flat(teacher_logits),
        )
        return per_token.view(student_logits.shape[:-1])

    return function


def self_distillation(trainer: type) -> dict[str, Method]:
    """SDFT in its three modes."""

    @contextmanager
    def scope(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        own = sys.modules[next(kind.__module__ for kind in trainer.__mro__ if kind.__name__ == "SDFTTrainer")]
        losses = sys.modules[vars(own)["compute_full_logit_self_distillation_loss"].__module__]
        selective = {"selective_log_softmax": selective_log_softmax(vars(losses)["selective_log_softmax"])}
        full, topk = "compute_full_logit_self_distillation_loss", "compute_topk_self_distillation_loss"
        rows = {name: _each_row(vars(own)[name]) for name in (full, topk) if name in vars(own)}
        models = (args[0] if args else self.model, getattr(self, "teacher_model", None))
        with deferred_logits(*models), replaced(losses, selective), replaced(own, {**selective, **rows}):
            yield

    return within(trainer, scope, "compute_loss")
