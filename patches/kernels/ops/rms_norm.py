"""RMSNorm with a hand-written backward."""

from typing import Any

import torch

from ..dispatch import backend_for
from ..once import differentiable_once
from ..ownership import exclusively_owned
from .common import MAX_ROW, MAX_ROWS, kernels_for, needs_graph


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Any, weight: Any, eps: float, offset: float, cast_first: bool) -> Any:
        y, rstd = kernels.rms_norm_fwd(x, weight, eps, offset, cast_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels, ctx.offset, ctx.cast_first = kernels, offset, cast_first
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        _, need_x, need_weight = ctx.needs_input_grad[:3]
        dx = None
        if need_x:
            reuse = dy.dtype is x.dtype and x.is_contiguous() and exclusively_owned(dy, "incoming")
            dx = dy if reuse else torch.empty_like(x)
        dw = ctx.kernels.rms_norm_bwd(dy, x, weight, rstd, ctx.offset, ctx.cast_first, dx, need_weight)
        return None, dx, dw, None, None, None


_rms_norm: Any = _RMSNorm.apply


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, cast_before_weight: bool = True
) -> torch.Tensor:
    """RMSNorm over the last dimension, statistics in fp32: xhat = x / sqrt(mean(x^2) + eps).

    x [..., N] and weight [N], each fp32, fp16 or bf16, N up to 65536, any strides. With `cast_before_weight` (Llama)
    the result is xhat rounded to x's dtype, times weight, in the promoted dtype of both; without (Gemma, OLMo 2) it is
    xhat * (offset + weight), in x's dtype. Raises ValueError for an offset with `cast_before_weight`, and TypeError
    where `supports_rms_norm` is False because of the tensors' kind.
    """
    if offset and cast_before_weight:
        raise ValueError(f"offset {offset} needs cast_before_weight=False")
    kernels = kernels_for("rms_norm", x, weight)
    if needs_graph(x, weight):
        y: torch.Tensor = _rms_norm(kernels, x, weight, eps, offset, cast_before_weight)
        return y
    y, _ = kernels.rms_norm_fwd(x, weight, eps, offset, cast_before_weight)
    return y


def supports_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rms_norm` takes these tensors here and now."""
    # The kind first: under torch.compile or a transform nothing else should be asked of the tensors.
    if backend_for(x, weight) is None or not x.dim():
        return False
    n = x.shape[-1]
    return weight.shape == (n,) and n <= MAX_ROW and x.numel() // n < MAX_ROWS
