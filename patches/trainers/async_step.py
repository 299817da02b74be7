"""Steps that the device works through while the host prepares the next: nobody waits to look at the loss of each.

Trainer asks after every micro-batch whether the loss is finite, and adds the mean of those before where it is not. To
answer, the host waits for the device, which then has nothing to do while the host clips, steps and zeroes. The same
choice is made here on the device. The copy of a pinned batch to the device is not waited for either, and what its mask
hides is looked at before.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpointing import full_masks
from .scope import Method, replaced, within

_ADD = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__}
_IS_NOT_FINITE = {torch.isnan, torch.isinf}
# Whose functions make a new tensor of every batch; somebody else's might write the next one where this one lies.
_COLLATING = ("transformers", "trl", "torch")


def async_step(trainer: type) -> dict[str, Method]:
    """Training without a wait for the device in each step."""
    return within(trainer, _without_waiting, "_inner_training_loop")


class _Step(torch.Tensor):
    """The loss of a micro-batch on its way from `training_step` to Trainer's sum, which takes only finite ones.

    Trainer's question whether it is finite is not answered but taken into the sum. To all others it is a plain tensor.
    """

    trainer: Any

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer for Trainer's loop."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _IS_NOT_FINITE:
                return False
            if func in _ADD and len(args) == 2 and not kwargs and type(args[1]) is cls:
                total, step = args
                return func(total, step.if_finite(total))
            return func(*args, **(kwargs or {}))

    def if_finite(self, total: torch.Tensor) -> torch.Tensor:
        """This loss, or the mean of those that make up `total` [] if this is none; on the device."""
        count = 1 + self.trainer.state.global_step - self.trainer._globalstep_last_logged
        loss = self.as_subclass(torch.Tensor)
        return torch.where(torch.isfinite(loss), loss, total / count)


@contextmanager
def _without_waiting(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """While a trainer trains: its loop gets losses that it need not wait for, and batches while they are copied."""
    from accelerate import data_loader

    own = vars(trainer).get("training_step")
    original = trainer.training_step

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        if type(loss) is not torch.Tensor or loss.requires_grad or not trainer.args.logging_nan_inf_filter:
            return loss
        step = loss.as_subclass(_Step)
        step.trainer = trainer
        return step

    # On the instance, where only the loop finds it: who overrides the method and calls super's gets plain tensors.
    trainer.training_step = training_step
    try:
        send = full_masks.looking(data_loader.send_to_device)
        with _copies(trainer), replaced(data_loader, {"send_to_device": send}):
            yield
    finally:
        if own is None:
            del trainer.training_step
        else:
            trainer.training_step = own


@contextmanager
def _copies(trainer: Any) -> Iterator[None]:
    """Within it, data loaders copy pinned batches without a wait, where the memory of these is not used again."""
    config = trainer.accelerator.dataloader_config
    home = (getattr(trainer.data_collator, "__module__", None) or "").partition(".")[0]
    if config.non_blocking or not trainer.args.dataloader_pin_memory or home not in _COLLATING:
        yield
        return
    config.non_blocking = True
    try:
        yield
    finally:
        config.non_blocking = False
