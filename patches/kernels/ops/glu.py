"""Gated activations (SwiGLU, GeGLU) with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned, saving_is_plain
from .activation import known
from .common import kernels_for, needs_graph


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.activation, ctx.plain = kernels, activation, saving_is_plain()
        return kernels.glu_fwd(gate, up, activation)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        _, need_gate, need_up, _ = ctx.needs_input_grad
        dgate = dup = None
        if need_gate:
            reuse = ctx.plain and exclusively_owned(gate, "saved")
            # An alias without the graph: the saved tensor itself still has its grad_fn.
            dgate = gate.detach() if reuse else torch.empty_like(gate)
        if need_up:
            reuse = ctx.plain and exclusively_owned(up, "saved")
            dup = up.detach() if reuse else torch.empty_like(up)
        ctx.kernels.glu_bwd(dy, gate, up, dgate, dup, ctx.activation)
        return None, dgate, dup, None


class _FusedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, gate_up: torch.Tensor, activation: str) -> Any:
        ctx.save_for_backward(gate_up)
        ctx.kernels, ctx.activation, ctx.plain = kernels, activation, saving_is_plain()
        return kernels.glu_fwd(*gate_up.chunk(2, -1), activation)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        # Asked before the halves are taken, which share the memory too.
        reuse = ctx.plain and exclusively_owned(gate_up, "saved")
        grad = gate_up.detach() if reuse else torch.empty_like(gate_up)
        ctx.kernels.glu_bwd(dy, *gate_up.chunk(2, -1), *grad.chunk(2, -1), ctx.activation)
        return None, grad, None


_glu: Any = _GLU.apply
_fused_glu: Any = _FusedGLU.apply


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of gate, computed in fp32 and rounded to the dtype, times up.

    gate and up have one shape and one dtype (fp32, fp16 or bf16) and any strides. `activation` is one of "silu",
    "gelu_tanh" and "gelu", else ValueError. Raises TypeError where `supports_glu` is False because of the tensors'
    kind.
    """
    known(activation)
    kernels = kernels_for("glu", gate, up)
    if needs_graph(gate, up):
        y: torch.Tensor = _glu(kernels, gate, up, activation)
    else:
        y = kernels.glu_fwd(gate, up, activation)
    return y


def supports_glu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `glu` takes these tensors here and now."""
    if backend_for(gate, up) is None:
        return False
    return gate.dim() > 0 and gate.shape == up.shape and gate.dtype is up.dtype


def glu_fused(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`glu` of the two halves of gate_up [..., 2N], gate first; returns [..., N].

    Both halves are read in place and their gradients are written into one tensor [..., 2N], which nobody has to join.
    Errors are those of `glu`.
    """
    known(activation)
    kernels = kernels_for("glu", gate_up)
    if needs_graph(gate_up):
        y: torch.Tensor = _fused_glu(kernels, gate_up, activation)
    else:
        y = kernels.glu_fwd(*gate_up.chunk(2, -1), activation)
    return y


def supports_glu_fused(gate_up: torch.Tensor) -> bool:
    """Whether `glu_fused` takes this tensor here and now; its last dimension must be even."""
    return backend_for(gate_up) is not None and gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0
