"""The exports as methods of one model object, for scripts that call them so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def attach(model: Any) -> Any:
    """Give a model object `save_pretrained_merged`, `save_pretrained_gguf`, and `push_to_hub_` of both; returns it.

    No class is changed. A copy of the model has methods of its own; a pickle of it needs this package to load.
    """
    from .gguf import save_pretrained_gguf
    from .hub import push_to_hub_gguf, push_to_hub_merged
    from .merging import save_pretrained_merged

    functions: tuple[Callable[..., Any], ...] = (
        save_pretrained_merged,
        save_pretrained_gguf,
        push_to_hub_merged,
        push_to_hub_gguf,
    )
    for function in functions:
        method = partial(function, model)
        method.__doc__ = function.__doc__
        setattr(model, function.__name__, method)
    return model
