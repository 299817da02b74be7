"""TRL's per-token log-probabilities: from hidden states where it never had logits, from deferred logits elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..kernels.ops.vocab_rows import LogitShape
from ..losses.deferred import DeferredLogits
from ..losses.handlers import NO_INDEX, token_statistics
from ..losses.linear_log_probs import linear_log_probs
from .scope import Method, replaced, within

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class FusedLogProbs:
    """Stands in for TRL's autograd function of the same calls, which it falls back to for a sharded head."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        """Per-token fields [N] of hidden [N, H]: log-probabilities, then those in `outputs`, None for the others."""
        if type(hidden) not in _PLAIN or type(weight) not in _PLAIN or hasattr(weight, "ds_id"):
            result: tuple[torch.Tensor | None, ...] = self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return result
        kind = hidden.device.type
        found = linear_log_probs(
            hidden,
            weight,
            bias,
            targets,
            shape=LogitShape(pre=logit_scale, cap=final_logit_softcapping, post=1.0 / temperature),
            ignore_index=NO_INDEX,
            outputs=tuple(name for name in outputs if name != "log_probs"),
            compute_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype,
        )
        return found.log_probs, found.entropy, found.log_sum_sq_probs, found.mean_logits, found.is_top1


def chunked(trainer: type) -> dict[str, Method]:
    """A trainer whose models TRL has given a fused head: the head computes with our function."""

    def scope(self: Any, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        from trl.trainer import utils

        name = "_ChunkedLogProbFunction"
        current = getattr(utils, name)
        # Without Triton, TRL 1.15 has none and computes logits.
        if current is None or isinstance(current, FusedLogProbs):
            return nullcontext()
        return replaced(utils, {name: FusedLogProbs(current)})

    return within(trainer, scope, "training_step", "prediction_step", "compute_loss")


def selective_log_softmax(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's function of that name, for deferred logits too."""

    def function(logits: Any, index: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = _statistics(logits, index, args, kwargs)
        return original(logits, index, *args, **kwargs) if found is None else found.log_probs.view(index.shape)

    return function


def selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's function of that name, for deferred logits too."""

    def function(
        logits: Any, index: torch.Tensor, entropy_requires_grad: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        found = _statistics(logits, index, args, kwargs, outputs=("entropy",))
        if found is None:
            return original(logits, index, entropy_requires_grad, *args, **kwargs)
        entropy = found.entropy.view(index.shape)
        return found.log_probs.view(index.shape), entropy if entropy_requires_grad else entropy.detach()

    return function


def _statistics(logits: Any, index: torch.Tensor, args: Any, kwargs: Any, outputs: tuple[str, ...] = ()) -> Any:
    """What the fused function finds for TRL's optional arguments `temperature` and `row_mask`, or None."""
    if not isinstance(logits, DeferredLogits) or not logits.pending or index.shape != logits.shape[:-1]:
        return None
    options = {**dict(zip(("temperature", "row_mask"), args, strict=False)), **kwargs}
    temperature, row_mask = options.pop("temperature", 1.0), options.pop("row_mask", None)
    if options or temperature <= 0:
        return None
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, NO_INDEX)
    return token_statistics(logits / temperature if temperature != 1.0 else logits, targets, outputs)
