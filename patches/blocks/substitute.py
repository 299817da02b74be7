"""Who runs the layers in place of the fused blocks for a while: a decoder, with one token of each row at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Substitute = Callable[[torch.nn.Module, Mapping[str, Any]], torch.Tensor]
"""Called with a layer and the arguments of its forward by name; returns the hidden states that the layer gives."""

_current: ContextVar[Substitute | None] = ContextVar("sloth_plugins.substitute", default=None)


def substitute() -> Substitute | None:
    """Who runs layers now; None is the layers themselves."""
    return _current.get()


@contextmanager
def substituting(run: Substitute) -> Iterator[None]:
    """Within it, `run` is called for all layers."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)
