"""Rollouts: completions that a trainer samples from the model that it trains, through transformers' `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..generation.entry import faster
from .scope import Method, within


def decoded(trainer: type) -> dict[str, Method]:
    """GRPO and RLOO: within what samples the completions of a batch, `generate` is the decoder's."""
    return within(trainer, _generating, "_generate_single_turn")


def decoded_online(trainer: type) -> dict[str, Method]:
    """The same for online DPO, Nash-MD and XPO."""
    return within(trainer, _generating, "_generate")


@contextmanager
def _generating(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """The model that TRL unwraps has a `generate` of its own for a while; whoever has given it one keeps that."""
    model = self.accelerator.unwrap_model(self.model_wrapped)
    if "generate" in vars(model):
        yield
        return
    model.generate = faster(model, model.generate)
    try:
        yield
    finally:
        del model.generate
