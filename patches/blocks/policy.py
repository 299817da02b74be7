"""What a decoder layer keeps for its backward, and who decides it."""

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .run import Run


class Policy(enum.Enum):
    """What a layer keeps for its backward; what is not kept is computed again, and gradients are the same to the bit.

    KEEP: the input of each block and the outputs of its products, but for the one of `down`; outputs of norms and of
    the activation are always computed again. ATTENTION: the layer's input, the attention's output and its statistics.
    INPUT: the layer's input. Low-rank products, rows' statistics, and what a norm after `down` needs are always kept.
    """

    KEEP = "keep"
    ATTENTION = "attention"
    INPUT = "input"


Chooser = Callable[[torch.nn.Module, torch.Tensor, "Run"], Policy]
"""Called with a layer, its input [B, S, h], and the run of it that is about to begin, whose `meter` it may set."""


def by_checkpointing(layer: torch.nn.Module, x: torch.Tensor, run: "Run") -> Policy:
    """Gradient checkpointing on: the layer's input only; off: all outputs of products."""
    del x, run
    return Policy.INPUT if is_checkpointed(layer) else Policy.KEEP


def is_checkpointed(layer: torch.nn.Module) -> bool:
    """Whether upstream would checkpoint this layer now."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


_chooser: ContextVar[Chooser] = ContextVar("sloth_plugins.policy", default=by_checkpointing)


def choose(layer: torch.nn.Module, x: torch.Tensor, run: "Run") -> Policy:
    """The policy of a layer for an input x [B, S, h]; asked at each forward."""
    return _chooser.get()(layer, x, run)


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Within it, `chooser` decides for all layers."""
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)
