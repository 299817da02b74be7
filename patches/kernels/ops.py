"""The fused ops that patched models call: RMSNorm, rotary embedding and SwiGLU, each with a hand-written backward.

An op runs the Triton kernels or the torch reference, as `dispatch.backend_for` decides. Callers ask the matching
`supports_*` first and run upstream's own code where it says no. A double backward raises.
"""

import functools
import importlib
from typing import Any

import torch

from .dispatch import backend_for
from .once import differentiable_once
from .ownership import exclusively_owned, saving_is_plain

MAX_ROW = 65536
# Row and program numbers are 32-bit in the kernels; offsets are 64-bit.
_MAX_ROWS = 2**31 - 2**16


@functools.cache
def _implementation(op: str, backend: str) -> Any:
    # Late, because the kernel modules exist only where triton does.
    return importlib.import_module(f".{op if backend == 'triton' else 'reference'}", __package__)


def _kernels(op: str, *tensors: torch.Tensor) -> Any:
    backend = backend_for(*tensors)
    if backend is None:
        given = ", ".join(f"{type(t).__name__}({t.dtype}, {t.device}, {tuple(t.shape)})" for t in tensors)
        raise TypeError(f"{op} cannot run on {given} here; ask its supports_ function first")
    return _implementation(op, backend)


def _needs_graph(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


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
    kernels = _kernels("rms_norm", x, weight)
    if _needs_graph(x, weight):
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
    return weight.shape == (n,) and n <= MAX_ROW and x.numel() // n < _MAX_ROWS


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, q: Any, k: Any, cos: Any, sin: Any, dim: int, keep_dtype: bool) -> Any:
        q_out, k_out = kernels.rope_fwd(q, k, cos, sin, dim, keep_dtype)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[1:3]
        ctx.mark_non_differentiable(*(o for o, need in zip((q_out, k_out), wanted, strict=True) if not need))
        ctx.kernels, ctx.dim, ctx.dtype = kernels, dim, q.dtype
        ctx.strides = q_out.stride(), k_out.stride()
        return q_out, k_out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_q: torch.Tensor | None, grad_k: torch.Tensor | None) -> Any:
        cos, sin = ctx.saved_tensors
        _, need_q, need_k = ctx.needs_input_grad[:3]
        dq = dk = None
        # In the layout of q and k, so that undoing the projection's transpose and view costs no copy.
        if need_q and grad_q is not None:
            reuse = _in_place(grad_q, ctx.strides[0], ctx.dtype) and exclusively_owned(grad_q, "incoming")
            dq = grad_q if reuse else _empty(grad_q, ctx.strides[0], ctx.dtype)
        if need_k and grad_k is not None:
            reuse = _in_place(grad_k, ctx.strides[1], ctx.dtype) and exclusively_owned(grad_k, "incoming")
            dk = grad_k if reuse else _empty(grad_k, ctx.strides[1], ctx.dtype)
        ctx.kernels.rope_bwd(grad_q, grad_k, cos, sin, ctx.dim, dq, dk)
        return None, dq, dk, None, None, None, None


_rotary: Any = _Rotary.apply


def _in_place(grad: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    return grad.dtype is dtype and grad.stride() == strides


def _empty(grad: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(grad.shape, strides, dtype=dtype, device=grad.device)


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k: x * cos + rotate_half(x) * sin on the first R features, rotate_half((a, b)) = (-b, a).

    q [B, H, S, D] and k [B, Hk, S, D] for `unsqueeze_dim` 1, [B, S, H, D] and [B, S, Hk, D] for 2; cos and sin
    [1 or B, S, R] with even R <= D; any strides. Both products and their sum are rounded to the promoted dtype of q and
    cos, which the results have too, or q's dtype with `keep_dtype`. cos and sin get no gradient. Raises TypeError where
    `supports_rotary` is False because of the tensors' kind.
    """
    kernels = _kernels("rope", q, k, cos, sin)
    if _needs_graph(q, k):
        rotated: tuple[torch.Tensor, torch.Tensor] = _rotary(kernels, q, k, cos, sin, unsqueeze_dim, keep_dtype)
    else:
        rotated = kernels.rope_fwd(q, k, cos, sin, unsqueeze_dim, keep_dtype)
    return rotated


def supports_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> bool:
    """Whether `apply_rotary` takes these tensors here and now; False if cos or sin wants a gradient."""
    if backend_for(q, k, cos, sin) is None or unsqueeze_dim not in (1, 2):
        return False
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    if q.dtype is not k.dtype or cos.dtype is not sin.dtype or cos.requires_grad or sin.requires_grad:
        return False
    batch, seq, rotated = cos.shape
    q_shape, k_shape = q.shape, k.shape
    seq_at = 3 - unsqueeze_dim
    return (
        q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and q_shape[seq_at] == k_shape[seq_at] == seq
        and batch in (1, q_shape[0])
        and rotated % 2 == 0
        and rotated <= q_shape[3]
        and q_shape[0] * seq < _MAX_ROWS
    )


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
    kernels = _kernels("swiglu", gate, up)
    if _needs_graph(gate, up):
        y: torch.Tensor = _swiglu(kernels, gate, up)
    else:
        y = kernels.swiglu_fwd(gate, up)
    return y


def supports_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `swiglu` takes these tensors here and now."""
    if backend_for(gate, up) is None:
        return False
    return gate.dim() > 0 and gate.shape == up.shape and gate.dtype is up.dtype
