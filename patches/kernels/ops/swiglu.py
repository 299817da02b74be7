"""SwiGLU with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned, saving_is_plain
from .common import kernels_for, needs_graph


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.plain = kernels, saving_is_plain()
        return kernels.swiglu_fwd(gate, up)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        _, need_gate, need_up = ctx.needs_input_grad
        dgate = dup = None
        if need_gate:
            reuse = ctx.plain and exclusively_owned(gate, "saved")
            # An alias without the graph: the saved tensor itself still has its grad_fn.
            dgate = gate.detach() if reuse else torch.empty_like(gate)
        if need_up:
            reuse = ctx.plain and exclusively_owned(up, "saved")
            dup = up.detach() if reuse else torch.empty_like(up)
        ctx.kernels.swiglu_bwd(dy, gate, up, dgate, dup)
        return None, dgate, dup


_swiglu: Any = _SwiGLU.apply


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate), rounded to the dtype, times up; silu(g) = g / (1 + exp(-g)) in fp32.

    gate and up have one shape and one dtype (fp32, fp16 or bf16) and any strides; halves of one fused tensor are read
    in place. Raises TypeError where `supports_swiglu` is False because of the tensors' kind.
    """
    kernels = kernels_for("swiglu", gate, up)
    if needs_graph(gate, up):
        y: torch.Tensor = _swiglu(kernels, gate, up)
    else:
        y = kernels.swiglu_fwd(gate, up)
    return y


def supports_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `swiglu` takes these tensors here and now."""
    if backend_for(gate, up) is None:
        return False
    return gate.dim() > 0 and gate.shape == up.shape and gate.dtype is up.dtype
