"""The attention core of a block: q, k, v to the weighted values, and back.

Where upstream would call torch's scaled_dot_product_attention without a mask, or with one that only keeps documents
and windows apart, a kernel is called directly, so that its output and statistics can be kept without q, k and v.
Everything else (padding, softcaps, flash-attn, FlexAttention, eager) runs upstream's own attention function with a
graph of its own around it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.ownership import graph_is_kept
from . import sdpa
from .documents import Documents

Tensor = torch.Tensor
# What upstream's function for sdpa looks at; all other keywords are for other implementations.
_MEANT_FOR_SDPA = ("is_causal", "position_bias", "cache", "softcap", "dropout")


@dataclass(slots=True)
class State:
    """What a call of `attend` leaves for its backward.

    `out` is the output [B, H, S, D]. `statistics` belong to the kernel `backend` of `sdpa`; with a graph instead,
    `leaves` are the q, k and v that it begins with.
    """

    out: Tensor
    backend: int = sdpa.NONE
    statistics: tuple[Any, ...] = ()
    leaves: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One call of a layer's attention: upstream's `function` and what it is called with beside q, k and v.

    `documents` say what the mask does, where there is one that they can say it of.
    """

    module: Any
    function: Callable[..., Any]
    implementation: str
    mask: Any
    scaling: float
    keywords: Mapping[str, Any] = field(default_factory=dict)
    documents: Documents | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is causal attention by torch's sdpa and nothing else."""
        return self.mask is None and bool(getattr(self.module, "is_causal", True)) and self.is_sdpa

    @property
    def is_sdpa(self) -> bool:
        """Whether it is attention by torch's sdpa, without anything that is not in the mask."""
        return self.implementation == "sdpa" and all(self.keywords.get(name) is None for name in _MEANT_FOR_SDPA)


def attend(call: Attention, q: Tensor, k: Tensor, v: Tensor, *, differentiable: bool) -> State:
    """Attention of q [B, H, S, D] over k and v [B, Hk, S, D]; with `differentiable`, ready for `attend_backward`."""
    if call.is_plain or (call.documents is not None and call.is_sdpa):
        backend = sdpa.choose(q, k, v, call.scaling, call.documents)
        if backend != sdpa.NONE:
            out, statistics = sdpa.forward(backend, q, k, v, call.scaling, call.documents)
            return State(out, backend, statistics)
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
    return sdpa.backward(state.backend, q, k, v, state.out, state.statistics, grad, call.scaling, call.documents)


def _call(call: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Upstream's function, whose output is [B, S, H, D]."""
    out, _ = call.function(
        call.module, q, k, v, call.mask, **{"dropout": 0.0, "scaling": call.scaling, **call.keywords}
    )
    result: Tensor = out.transpose(1, 2)
    return result
