"""Which activation a module is, for the forwards that compute it in a kernel."""

import functools

import torch

from ..kernels.watched import is_watched

# By name: transformers' own classes are not imported here, and they differ between versions.
SILU = frozenset({"torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"})
TORCH_GELU = "torch.nn.modules.activation.GELU"
# GPT-2's, rounded after each of its eight steps. The kernel rounds once, so in half precision it is nearer the formula.
NEW_GELU = "transformers.activations.NewGELUActivation"
# These keep the function to call in `act`: torch's own, or a Python formula, which is left to upstream.
HOLDERS = frozenset({"transformers.activations.GELUActivation", "transformers.activations.GELUTanh"})


def activation_of(module: object) -> str | None:
    """Name of the activation, as the ops take it; None if it is another, or if anybody changed or watches the call."""
    name = _named(module)
    if name is None or not isinstance(module, torch.nn.Module) or "forward" in vars(module) or is_watched(module):
        return None
    kind = type(module)
    # Told by where it was compiled: whoever replaces a class's forward may have copied its names.
    return name if getattr(kind.forward, "__globals__", {}).get("__name__") == kind.__module__ else None


def _named(module: object) -> str | None:
    kind = type(module)
    full = f"{kind.__module__}.{kind.__qualname__}"
    if full in SILU:
        return "silu"
    if full == NEW_GELU:
        return "gelu_tanh"
    if full == TORCH_GELU:
        return _gelu(getattr(module, "approximate", None))
    if full in HOLDERS:
        act = getattr(module, "act", None)
        if act is torch.nn.functional.gelu:
            return "gelu"
        if isinstance(act, functools.partial) and act.func is torch.nn.functional.gelu and not act.args:
            return _gelu(act.keywords.get("approximate")) if act.keywords.keys() == {"approximate"} else None
    return None


def _gelu(approximate: object) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
