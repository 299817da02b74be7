"""What both blocks begin and end with: a norm before the first products, the sum with the residual after the last."""

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.ops.block_norm import Norm, norm_rows, norm_rows_backward
from ..kernels.ops.lora_residual import lora_residual
from .group import Group

Tensor = torch.Tensor


def enter(
    group: Group,
    norm: Norm,
    x: Tensor,
    seeds: Sequence[int],
    kept: dict[str, Any],
    *,
    with_adapters: bool = True,
    out: Tensor | None = None,
) -> tuple[dict[str, Any], list[Tensor]]:
    """(the norm's statistics "stats" and the low-rank product "xa", the group's outputs) for x [T, h].

    "xa" is that of `kept`, if an earlier forward has left anything. `out` is a joint group's.
    """
    normed = torch.empty(x.shape, dtype=group.dtype, device=x.device)
    stats = norm_rows(x, norm, normed)
    xa = kept["xa"] if kept else group.low_rank(normed, seeds)
    return {"stats": stats, "xa": xa}, group.forward(normed, xa, with_adapters=with_adapters, out=out)


def leave(
    group: Group, x: Tensor, xa: Tensor | None, norm: Norm | None, residual: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """(what `leave_backward` needs, residual [T, h] plus the group's one output, after `norm` where there is one).

    Without a residual, which no layer with such a norm leaves out, that output alone.
    """
    if residual is None:
        assert norm is None, "a norm is taken with the residual"
        (out,) = group.forward(x, xa)
        return {}, out
    if norm is None and xa is not None and group.is_narrow:
        (out,) = group.forward(x, xa, with_adapters=False)
        (term,) = group.terms(xa)
        assert term is not None, "what gave xa has an adapter"
        total = out if residual.dtype is out.dtype else torch.empty_like(residual)
        lora_residual(out, term, residual, total)
        return {}, total
    joined = residual if residual.dtype is group.dtype and norm is None and xa is None else None
    (out,) = group.forward(x, xa, joined)
    if norm is not None:
        total = torch.empty_like(residual)
        return {"projected": out, "projected_stats": norm_rows(out, norm, total, residual)}, total
    return {}, out if joined is not None else residual + out


def leave_backward(group: Group, norm: Norm | None, made: dict[str, Any], grad: Tensor) -> Tensor:
    """The gradient [T, h] of the group's output, in its dtype, for that of the sum."""
    if norm is None:
        return grad if grad.dtype is group.dtype else grad.to(group.dtype)
    dout = torch.empty_like(made["projected"])
    norm_rows_backward(grad, made["projected"], norm, made["projected_stats"], dx=dout)
    return dout
