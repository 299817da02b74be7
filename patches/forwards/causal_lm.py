"""Causal language models whose logits are computed only if somebody reads them.

Upstream's forward runs unchanged; only its head is asked to return `DeferredLogits`. The loss that upstream, the
trainer or the script computes from them then takes the hidden states instead, chunk by chunk. So scales, softcaps,
shifted labels, `num_items_in_batch` and custom losses are upstream's own, in every version.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.notices import say_once
from ..losses.deferral import deferring, obstacle

Forward = Callable[..., Any]


def cross_entropy(original: Forward) -> Forward:
    """Any forward that ends in `self.lm_head` and whatever it does with its result."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # While a cache is filled the logits are those of a few tokens, and they are read at once.
        if torch.compiler.is_compiling() or kwargs.get("past_key_values") is not None:
            return original(self, *args, **kwargs)
        if isinstance(kwargs.get("logits_to_keep", 0), torch.Tensor) or kwargs.get("logits_to_keep", 0) != 0:
            return original(self, *args, **kwargs)
        head = self.get_output_embeddings()
        reason = obstacle(self, head)
        if reason is not None:
            say_once(f"cross_entropy: {type(self).__name__} computes its logits, because {reason}")
            return original(self, *args, **kwargs)
        with deferring(head, kwargs.get("labels")):
            return original(self, *args, **kwargs)

    forward.refuses = lambda model: obstacle(model, model.get_output_embeddings())  # type: ignore[attr-defined]  # `Binding` reads it
    return forward
