"""What plans of memory need of a trainer: processes agree, running out is survived, the peak is told at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpointing.backbone import agree, stacks_of
from ..checkpointing.plan import gib
from ..kernels.notices import say_once
from .out_of_memory import retried
from .scope import Method, within


def planned(trainer: type) -> dict[str, Method]:
    """Methods of a trainer whose model's layers are planned."""
    return {**retried(trainer), **within(trainer, _training, "_inner_training_loop")}


@contextmanager
def _training(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    if int(trainer.args.world_size) > 1 and torch.distributed.is_initialized():
        agree(trainer.model, trainer.args.device)
    try:
        yield
        for stack in stacks_of(trainer.model):
            if stack.worst is not None:
                say_once(
                    f"memory: at most {gib(stack.memory.peak())} were allocated; the plan that computed most again, "
                    f"for {stack.worst.shape.tokens} tokens: {', '.join(stack.worst.groups())}"
                )
    finally:
        for stack in stacks_of(trainer.model):
            stack.at_rest()
