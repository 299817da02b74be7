"""A micro-batch that runs out of memory is run again with a tighter plan, as if nothing had been.

Gradients and random generators are then what they were before it. The attempts end where the tightest plan fails twice.
"""

import copy
import functools
import gc
from collections.abc import Sequence
from typing import Any

import torch

from ..checkpointing.backbone import stacks_of
from ..checkpointing.plan import gib
from ..checkpointing.stack import Stack
from ..kernels.notices import say_once
from .scope import Method

# Of what was allowed, after each attempt.
TIGHTER = 0.92


def retried(trainer: type) -> dict[str, Method]:
    """`training_step` that survives running out of memory."""
    original = getattr(trainer, "training_step", None)
    return {} if original is None else {"training_step": _training_step(original)}


class _Before:
    """Gradients and generators as they are before a micro-batch, which begins without gradients."""

    def __init__(self, params: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self._params, self._device = params, device
        self._grads = [p.grad for p in params]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for p in self._params:
            p.grad = None

    def begin_again(self) -> None:
        """Drop what a failed attempt has left, and let what is drawn be what was drawn."""
        self._drop_gradients()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def add_up(self) -> None:
        """Add the gradients of the micro-batch to those from before, as autograd does."""
        with torch.no_grad():
            for p, before in zip(self._params, self._grads, strict=True):
                if before is not None:
                    p.grad = before if p.grad is None else before.add_(p.grad)

    def restore(self) -> None:
        """As if there had been no micro-batch."""
        for p, before in zip(self._params, self._grads, strict=True):
            p.grad = before


def _keeps_its_gradients(trainer: Any) -> bool:
    """Whether gradients are here and nowhere else, and no other process waits for what this one sends meanwhile."""
    return int(trainer.args.world_size) == 1 and str(trainer.accelerator.distributed_type).endswith("NO")


def _training_step(original: Method) -> Method:
    @functools.wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, torch.nn.Module) or self.optimizer is None or not _keeps_its_gradients(self):
            return original(self, *args, **kwargs)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = _Before(params, self.args.device)
        try:
            loss = _attempts(original, self, args, kwargs, before, model)
        except BaseException:
            before.restore()
            raise
        before.add_up()
        return loss

    return training_step


def _attempts(original: Method, trainer: Any, args: Any, kwargs: Any, before: _Before, model: torch.nn.Module) -> Any:
    is_last = False
    while True:
        try:
            return original(trainer, *_copied(args), **kwargs)
        except torch.OutOfMemoryError as error:
            # Not the error itself, whose traceback holds the activations.
            said = str(error)
        before.begin_again()
        gc.collect()
        torch.cuda.empty_cache()
        stacks = stacks_of(model)
        tightened = [stack.tighten(TIGHTER) for stack in stacks]
        # Once more where nothing can be tighter: what was cached for other sizes is free now.
        if is_last and not any(tightened):
            raise torch.OutOfMemoryError(_last_words(stacks, said))
        is_last = not any(tightened)
        say_once(
            f"memory: out of memory at step {trainer.state.global_step}; plans take less from here on, and the "
            "micro-batch runs again",
            "out of memory",
        )


def _copied(args: Sequence[Any]) -> list[Any]:
    """The arguments, with a copy of the inputs, from which a trainer may take something out."""
    return [copy.copy(value) if isinstance(value, dict) else value for value in args]


def _last_words(stacks: Sequence[Stack], said: str) -> str:
    for stack in stacks:
        largest = stack.largest()
        if largest is not None:
            return (
                f"{said} sloth-plugins: the tightest plan for {stack.shape.tokens} tokens does not fit; in "
                f"{gib(stack.limit)} about {largest} would. Use shorter sequences or a smaller batch."
            )
    return said
