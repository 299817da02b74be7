"""For tests of an architecture, ours or a plugin's: a tiny model of it, and what a model is made of."""

import gc
import sys
from typing import TYPE_CHECKING, Any

from sloth_plugins.registry import ArchitectureSpec

from .inspection import language_model_class

if TYPE_CHECKING:
    import torch


def tiny_config(spec: ArchitectureSpec, model_type: str, **changes: Any) -> Any:
    """The transformers config of `spec.tiny`, with `changes` to the part that the architecture covers."""
    from transformers import AutoConfig

    settings = dict(spec.tiny)
    whole = settings.pop("model_type", model_type)
    if whole == model_type:
        settings |= changes
    else:
        settings["text_config"] = {**settings["text_config"], **changes}
    return AutoConfig.for_model(whole, **settings)


def tiny_model(spec: ArchitectureSpec, model_type: str, *, seed: int = 0, **changes: Any) -> "torch.nn.Module":
    """A model of `spec.tiny` with random weights, in fp32 on the CPU."""
    import torch

    config = tiny_config(spec, model_type, **changes)
    torch.manual_seed(seed)
    auto: Any = language_model_class(config)
    model: torch.nn.Module = auto.from_config(config)
    return model


def anatomy(model: "torch.nn.Module") -> dict[Any, Any]:
    """Every object that a model is made of, by identity, with the functions that its modeling files hold.

    Two anatomies of one model are equal if nothing was replaced in between, or all of it was put back.
    """
    gc.collect()  # a patched model that is not collected yet still holds its modeling file's functions
    parts: dict[Any, Any] = {}
    for name, module in model.named_modules():
        home = sys.modules[type(module).__module__]
        parts[name] = (type(module), tuple(sorted(vars(module))))
        parts[name, "functions"] = {
            key: id(value) for key, value in vars(home).items() if callable(value) and not key.startswith("__")
        }
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules", "training"):
                parts[name, key] = id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts[name, "tensor"] = (id(tensor), tensor.data_ptr())
    return parts
