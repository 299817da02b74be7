"""LayerNorm with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned
from .common import MAX_ROWS, kernels_for, needs_graph

# A row is one tile of the kernels: beyond, its values no longer fit into a program's registers.
LONGEST = 16384


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.kernels, ctx.bias_dtype = kernels, None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        _, need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        n = x.shape[-1]
        dx = None
        if need_x:
            reuse = dy.dtype is x.dtype and x.is_contiguous() and exclusively_owned(dy, "incoming")
            dx = dy if reuse else torch.empty_like(x)
        dw = torch.empty(n, dtype=weight.dtype, device=x.device) if need_weight else None
        db = torch.empty(n, dtype=ctx.bias_dtype, device=x.device) if need_bias else None
        ctx.kernels.layer_norm_bwd(dy, x, weight, mean, rstd, dx, dw, db)
        return None, dx, dw, db, None


_layer_norm: Any = _LayerNorm.apply


def _present(*parameters: torch.Tensor | None) -> list[torch.Tensor]:
    return [p for p in parameters if p is not None]


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias, in fp32, rounded once.

    x [..., N] in fp32, fp16 or bf16, N up to 16384, any strides; weight and bias [N] or None, in x's dtype or on the
    CPU in fp32, as torch has it. The result has x's dtype, whatever autocast says. Raises TypeError where
    `supports_layer_norm` is False because of the tensors' kind.
    """
    kernels = kernels_for("layer_norm", x, *_present(weight, bias))
    if needs_graph(x, *_present(weight, bias)):
        y: torch.Tensor = _layer_norm(kernels, x, weight, bias, eps)
        return y
    y, _, _ = kernels.layer_norm_fwd(x, weight, bias, eps)
    return y


def supports_layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Whether `layer_norm` takes these tensors here and now: those that torch's own takes, if rows are not too long."""
    parameters = _present(weight, bias)
    # The kind first: under torch.compile or a transform nothing else should be asked of the tensors.
    if backend_for(x, *parameters) is None or not x.dim():
        return False
    n = x.shape[-1]
    if n > LONGEST or x.numel() // n >= MAX_ROWS or any(p.shape != (n,) for p in parameters):
        return False
    dtypes = {p.dtype for p in parameters}
    # Parameters in fp32 beside half-precision inputs are known to torch on the CPU only.
    return dtypes <= {x.dtype} or (dtypes == {torch.float32} and x.device.type == "cpu")
