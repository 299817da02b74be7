"""Attention masks of which the host knows that they hide nothing, so that it need not ask the device.

Upstream asks at every forward whether a mask hides something, and to answer, the host waits until the device has done
all that came before, which then has nothing to do while the host prepares the first layer. Whoever sends a batch to
the device can look at its mask before.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Tensor = torch.Tensor
# Masks by identity, with the version that was looked at.
_known: Any = WeakTensorKeyDictionary()
_ALL = {torch.all, Tensor.all}
_SUM = {torch.sum, Tensor.sum}


class _Full(torch.Tensor):
    """A mask [B, S] of ones, which says so without waiting; to all other questions it is a plain tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer on the host whether all are ones, and how many there are."""
        with torch._C.DisableTorchFunctionSubclass():
            if len(args) == 1 and not kwargs and type(args[0]) is cls:
                if func in _ALL:
                    return torch.tensor(True)
                if func in _SUM:
                    return torch.tensor(args[0].numel())
            result = func(*args, **(kwargs or {}))
            # What is converted consists of ones as well.
            return result.as_subclass(cls) if func is Tensor.to and type(args[0]) is cls else result


def note(mask: Tensor) -> None:
    """`mask`, which is on a device, consists of ones."""
    # Of a tensor of inference mode nobody knows whether it was written since.
    if not mask.is_inference():
        _known[mask] = mask._version


def answering(model: Any, mask: Any) -> Any:
    """The same mask, for a call of `model` that asks what it hides; as it is where that is not known."""
    version = _known.get(mask) if type(mask) is Tensor else None
    is_known = version is not None and version == mask._version
    # Other implementations look at it in ways of their own, compiled ones among them.
    by_sdpa = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
    return mask.as_subclass(_Full) if is_known and by_sdpa else mask


def looking(send: Callable[..., Any]) -> Callable[..., Any]:
    """A function that sends a batch to a device and notes that of its mask which is known before."""

    def look_and_send(batch: Any, *args: Any, **kwargs: Any) -> Any:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        sent = send(batch, *args, **kwargs)
        if isinstance(mask, Tensor) and mask.device.type == "cpu" and mask.dim() == 2:
            arrived = sent.get("attention_mask")
            # Memory of the device's is nobody else's: what lies on the host somebody may write without torch's knowing.
            if type(arrived) is Tensor and arrived is not mask and bool((mask == 1).all()):
                note(arrived)
        return sent

    return look_and_send
