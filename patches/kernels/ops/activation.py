"""Activations with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned, saving_is_plain
from .common import kernels_for, needs_graph

# gelu_tanh(x) = x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))) / 2, gelu(x) = x * (1 + erf(x / sqrt(2))) / 2.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: torch.Tensor, activation: str) -> Any:
        ctx.save_for_backward(x)
        ctx.kernels, ctx.activation, ctx.plain = kernels, activation, saving_is_plain()
        return kernels.activate_fwd(x, activation)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        reuse = ctx.plain and exclusively_owned(x, "saved")
        # An alias without the graph: the saved tensor itself still has its grad_fn.
        dx = x.detach() if reuse else torch.empty_like(x)
        ctx.kernels.activate_bwd(dy, x, dx, ctx.activation)
        return None, dx, None


_activate: Any = _Activate.apply


def known(activation: str) -> str:
    """The name itself. Raises ValueError if it is not one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    return activation


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of x [..., N], computed in fp32 and rounded once to x's dtype (fp32, fp16 or bf16).

    `activation` is one of "silu", "gelu_tanh" and "gelu", else ValueError; x has any strides. Raises TypeError where
    `supports_activate` is False because of the tensor's kind.
    """
    known(activation)
    kernels = kernels_for("activation", x)
    if needs_graph(x):
        y: torch.Tensor = _activate(kernels, x, activation)
    else:
        y = kernels.activate_fwd(x, activation)
    return y


def supports_activate(x: torch.Tensor) -> bool:
    """Whether `activate` takes this tensor here and now."""
    return backend_for(x) is not None and x.dim() > 0
