"""The attention core of a block: q, k, v to the weighted values, and back.

Where upstream would call torch's scaled_dot_product_attention without a mask, the kernel that torch chooses is called
directly, so that its output and statistics can be kept without q, k and v. Everything else (masks, windows, softcaps,
flash-attn, FlexAttention, eager) runs upstream's own attention function with a graph of its own around it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.ownership import graph_is_kept

Tensor = torch.Tensor
_aten = torch.ops.aten

# Values of torch.nn.attention.SDPBackend, which torch._fused_sdp_choice returns.
_FLASH, _CUDNN = 1, 3
# What upstream's function for sdpa looks at; all other keywords are for other implementations.
_MEANT_FOR_SDPA = ("is_causal", "position_bias", "cache", "softcap", "dropout")


@dataclass(slots=True)
class State:
    """What a call of `attend` leaves for its backward.

    `out` is the output [B, H, S, D]. `statistics` belong to the kernel `backend`; with a graph instead, `leaves` are
    the q, k and v that it begins with.
    """

    out: Tensor
    backend: int = -1
    statistics: tuple[Any, ...] = ()
    leaves: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One call of a layer's attention: upstream's `function` and what it is called with beside q, k and v."""

    module: Any
    function: Callable[..., Any]
    implementation: str
    mask: Any
    scaling: float
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is causal attention by torch's sdpa and nothing else."""
        return (
            self.implementation == "sdpa"
            and self.mask is None
            and bool(getattr(self.module, "is_causal", True))
            and all(self.keywords.get(name) is None for name in _MEANT_FOR_SDPA)
        )


def attend(call: Attention, q: Tensor, k: Tensor, v: Tensor, *, differentiable: bool) -> State:
    """Attention of q [B, H, S, D] over k and v [B, Hk, S, D]; with `differentiable`, ready for `attend_backward`."""
    backend = _direct_backend(call, q, k, v)
    if backend is not None:
        return _direct(backend, q, k, v, call.scaling)
    if not differentiable:
        with torch.no_grad():
            return State(_call(call, q, k, v))
    with torch.enable_grad():
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        return State(_call(call, *leaves), leaves=leaves)


def attend_backward(
    call: Attention, state: State, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the gradient [B, H, S, D] of the output; q, k and v as `attend` had them."""
    if state.leaves is not None:
        dq, dk, dv = torch.autograd.grad(state.out, state.leaves, grad, retain_graph=graph_is_kept())
        return dq, dk, dv
    return _direct_backward(state, q, k, v, grad, call.scaling)


def _call(call: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Upstream's function, whose output is [B, S, H, D]."""
    out, _ = call.function(
        call.module, q, k, v, call.mask, **{"dropout": 0.0, "scaling": call.scaling, **call.keywords}
    )
    result: Tensor = out.transpose(1, 2)
    return result


def _direct_backend(call: Attention, q: Tensor, k: Tensor, v: Tensor) -> int | None:
    if not call.is_plain or q.shape[2] < 2 or q.shape[-1] % 8 or q.shape[-1] != v.shape[-1]:
        return None
    grouped = q.shape[1] != k.shape[1]
    if not q.is_cuda:
        # Heads that share keys would need copies of them here.
        if grouped or torch._fused_sdp_choice(q, k, v, is_causal=True, scale=call.scaling) != _FLASH:
            return None
        return _FLASH
    choice: int = torch._fused_sdp_choice(q, k, v, is_causal=True, scale=call.scaling, enable_gqa=grouped)
    return choice if choice in (_FLASH, _CUDNN) else None


def _direct(backend: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> State:
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return State(out, backend, (lse,))
    if backend == _FLASH:
        out, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        out, *rest = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    # lse, both cumulated lengths, both longest lengths, seed and offset; the last is a mask for debugging.
    return State(out, backend, tuple(rest[:7]))


def _direct_backward(
    state: State, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = state.out
    if not q.is_cuda:
        (lse,) = state.statistics
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
    elif state.backend == _FLASH:
        lse, cum_q, cum_k, max_q, max_k, seed, offset = state.statistics
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
    else:
        lse, cum_q, cum_k, max_q, max_k, seed, offset = state.statistics
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True, scale=scale
        )
    dq, dk, dv = grads
    return dq, dk, dv
