"""What a model that was loaded here has beside transformers' own methods."""

from __future__ import annotations

from functools import partial
from typing import Any

from .generation import fast_generate


def attach(model: Any, tokenizer: Any = None, max_seq_length: int | None = None) -> Any:
    """Give a model object `fast_generate`, `save_pretrained_merged` and the other exports; returns it.

    No class is changed. What is not given is taken from the model that this one wraps.
    """
    from ..export import attach as attach_exports

    model.fast_generate = partial(fast_generate, model)
    model.fast_generate.__doc__ = fast_generate.__doc__
    model.sloth_tokenizer = tokenizer if tokenizer is not None else getattr(model, "sloth_tokenizer", None)
    model.max_seq_length = max_seq_length or getattr(model, "max_seq_length", None)
    return attach_exports(model)
