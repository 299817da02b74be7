"""A micro-batch that runs out of memory is run again with a tighter plan, as if nothing had been.

Gradients and random generators are then what they were before it. The attempts end where the tightest plan fails twice.
"""

import copy
import functools
import gc
from collections.abc import Sequence
from typing import Any

import torch

from ..checkpointing.backbone import stacks, stacks_of
from ..checkpointing.plan import gib
from ..checkpointing.stack import Stack
from ..kernels.notices import say_once
from .scope import Method

# Of what was allowed, after each attempt.
TIGHTER = 0.92
# Bytes of gradients up to which those of a micro-batch are added to the others only once it has come through.
ASIDE = 2**30


def retried(trainer: type) -> dict[str, Method]:
    """`training_step` that survives running out of memory."""
    original = getattr(trainer, "training_step", None)
    return {} if original is None else {"training_step": _training_step(original)}


class _Before:
    """Gradients and generators as they are before a micro-batch.

    Gradients that are few are set aside, so that the micro-batch makes its own. Where they are as large as the model,
    there is no room for both, and a failure can only be undone as long as no gradient was added to.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self._params, self._device = params, device
        self._grads = [p.grad for p in params]
        self._versions = [0 if grad is None else grad._version for grad in self._grads]
        self._aside = sum(grad.nbytes for grad in self._grads if grad is not None) <= ASIDE
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._set_aside()

    def _set_aside(self) -> None:
        if self._aside:
            for p in self._params:
                p.grad = None

    def can_begin_again(self) -> bool:
        """Whether nothing of a failed attempt would be counted twice."""
        return self._aside or all(
            p.grad is grad and (grad is None or grad._version == version)
            for p, grad, version in zip(self._params, self._grads, self._versions, strict=True)
        )

    def begin_again(self) -> None:
        """Drop what a failed attempt has left, and let what is drawn be what was drawn."""
        self._set_aside()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def add_up(self) -> None:
        """Add the gradients of the micro-batch to those from before, as autograd does."""
        if not self._aside:
            return
        both = [(p, before) for p, before in zip(self._params, self._grads, strict=True) if before is not None]
        added = [(p.grad, before) for p, before in both if p.grad is not None]
        if added:
            with torch.no_grad():
                torch._foreach_add_([before for _, before in added], [grad for grad, _ in added])
        for p, before in both:
            p.grad = before

    def restore(self) -> None:
        """As if there had been no micro-batch."""
        if self._aside:
            for p, before in zip(self._params, self._grads, strict=True):
                p.grad = before


def _keeps_its_gradients(trainer: Any) -> bool:
    """Whether gradients are here until the step, and no other process waits for what this one sends meanwhile."""
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    alone = int(trainer.args.world_size) == 1 and str(trainer.accelerator.distributed_type).endswith("NO")
    # These step in the backward, parameter by parameter.
    return alone and "layerwise" not in optim and "lomo" not in optim


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
        for stack in stacks():
            stack.came_through()
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
        if not before.can_begin_again():
            raise torch.OutOfMemoryError(said)
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
