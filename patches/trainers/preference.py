"""ORPO, CPO and SimPO, TPO, online DPO: log-probabilities of completions, without the logits of the batch."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..losses.deferred import DeferredLogits
from ..losses.handlers import token_statistics
from .log_probs import selective_log_softmax, selective_log_softmax_and_entropy
from .scope import Method, deferred_logits, replaced, within

IGNORED = -100


@contextmanager
def _scope(self: Any, model: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(deferred_logits(model))
        for module in _modules(type(self)):
            stack.enter_context(replaced(module, _functions(module)))
        yield


def _modules(trainer: type) -> list[Any]:
    """The modules of TRL that define a trainer class and its bases."""
    names = dict.fromkeys(kind.__module__ for kind in trainer.__mro__ if kind.__module__.startswith("trl."))
    return [sys.modules[name] for name in names]


def _functions(module: Any) -> dict[str, Any]:
    makers = {
        "selective_log_softmax": selective_log_softmax,
        "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    }
    return {name: make(vars(module)[name]) for name, make in makers.items() if name in vars(module)}


def odds_ratio(trainer: type) -> dict[str, Any]:
    """ORPO and CPO, which share how they run a batch and sum its log-probabilities."""
    original: Callable[..., Any] = trainer.get_batch_logps  # type: ignore[attr-defined]  # the trainers' own

    signature = inspect.signature(original)

    def get_batch_logps(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        logits, labels = given["logits"], given["labels"]
        if not isinstance(logits, DeferredLogits) or given["is_encoder_decoder"] or logits.shape[:-1] != labels.shape:
            return original(*args, **kwargs)
        ignored = given.get("label_pad_token_id", IGNORED)
        targets = labels[:, 1:]
        shifted: Any = logits[:, :-1]
        found = token_statistics(shifted, targets, ignore_index=ignored)
        if found is None:
            return original(*args, **kwargs)
        total = found.log_probs.view(targets.shape).sum(-1)
        return total / (targets != ignored).sum(-1) if given["average_log_prob"] else total

    return {**within(trainer, _scope, "get_batch_loss_metrics"), "get_batch_logps": staticmethod(get_batch_logps)}


def triple(trainer: type) -> dict[str, Method]:
    """TPO: log-probabilities and entropy of three branches in one pass."""
    return within(trainer, _scope, "_compute_loss")


def online(trainer: type) -> dict[str, Method]:
    """Online DPO, Nash-MD and XPO: log-probabilities under the policy and the reference model."""
    return within(trainer, _scope, "_forward")
