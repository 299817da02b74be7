"""The kernels of decoder blocks in plain torch, with the functions of the Triton modules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .reference import glu_bwd, glu_fwd, rope_fwd

if TYPE_CHECKING:
    from .ops.block_norm import Norm
    from .ops.lora_glu import LowRank, Sums

Tensor = torch.Tensor


def _normed(x: Tensor, norm: "Norm", stats: Tensor) -> tuple[Tensor, Tensor]:
    """xhat and the norm's output, both in fp32."""
    x32 = x.float()
    xhat = (x32 - stats[1].unsqueeze(-1) if norm.is_layer else x32) * stats[0].unsqueeze(-1)
    y = (xhat.to(x.dtype).float() if norm.cast_before_weight else xhat) * (norm.offset + norm.weight.float())
    return xhat, y if norm.bias is None else y + norm.bias.float()


def block_norm_fwd(x: Tensor, norm: "Norm", residual: Tensor | None, out: Tensor, stats: Tensor) -> None:
    """out = xhat * (offset + weight) + bias + residual; stats[0] = rstd, and stats[1] = mean of a LayerNorm.

    x, residual, out [T, N]; stats [1 or 2, T] in fp32. xhat = (x - mean) * rstd, the mean being 0 in an RMSNorm. The
    norm's output is rounded to x's dtype before a residual is added.
    """
    centred = x.float()
    if norm.is_layer:
        stats[1] = centred.mean(-1)
        centred = centred - stats[1].unsqueeze(-1)
    stats[0] = torch.rsqrt(centred.square().mean(-1) + norm.eps)
    _, y = _normed(x, norm, stats)
    out.copy_(y if residual is None else y.to(x.dtype).float() + residual.float())


def block_norm_bwd(
    dn: Tensor,
    x: Tensor,
    norm: "Norm",
    stats: Tensor,
    residual_grad: Tensor | None,
    dx: Tensor | None,
    restore: bool,
) -> None:
    """With g = dn * (offset + weight): dx = rstd * (g - xhat * mean(g * xhat) [- mean(g)]) + residual_grad.

    dx [T, N], which may be `residual_grad`, or None; with `restore`, dn becomes the norm's output.
    """
    xhat, y = _normed(x, norm, stats)
    if dx is not None:
        g = dn.float() * (norm.offset + norm.weight.float())
        if norm.cast_before_weight:
            g = g.to(x.dtype).float()
        grad = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if norm.is_layer:
            grad = grad - g.mean(-1, keepdim=True)
        grad = grad * stats[0].unsqueeze(-1)
        dx.copy_(grad if residual_grad is None else grad + residual_grad.float())
    if restore:
        dn.copy_(y)


def _mask(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return torch.rand(x.shape, generator=generator, device=x.device) >= p


def dropout_fwd(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """out = mask * x / (1 - p), the mask drawn from a generator with that seed."""
    out.copy_(torch.where(_mask(x, p, seed), x.float() * (0.0 if p >= 1.0 else 1.0 / (1.0 - p)), 0.0))


def dropout_add(x: Tensor, p: float, seed: int, total: Tensor) -> None:
    """total += what `dropout_fwd` would write."""
    out = torch.empty_like(x)
    dropout_fwd(x, p, seed, out)
    total.add_(out)


def _plus(y: Tensor, term: "LowRank | None") -> Tensor:
    if term is None:
        return y
    return (y.float() + term.x.float() @ term.b.float().t()).to(y.dtype)


def lora_glu_fwd(
    gate: Tensor,
    up: Tensor,
    gate_term: "LowRank | None",
    up_term: "LowRank | None",
    activation: str,
    out: Tensor,
) -> None:
    """`glu_fwd` of gate + x b^T and up + x b^T, the sums in fp32 and rounded to the dtype."""
    out.copy_(glu_fwd(_plus(gate, gate_term), _plus(up, up_term), activation))


def lora_glu_bwd(
    dy: Tensor,
    dy_term: "LowRank | None",
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    activation: str,
    gate_term: "LowRank | None",
    up_term: "LowRank | None",
    sum_up: bool,
    sum_down: bool,
) -> "Sums":
    """`glu_bwd` of gate + x b^T and up + x b^T for dy + x b^T; dy becomes the output.

    The sums are dgate^T x and dup^T x with the terms of gate and up, and x^T y with the one of dy.
    """
    gate, up = _plus(gate, gate_term), _plus(up, up_term)
    # Before the gradients are written, which may be into gate and up.
    y = glu_fwd(gate, up, activation)
    glu_bwd(_plus(dy, dy_term), gate, up, dgate, dup, activation)
    dy.copy_(y)
    pairs = (dgate, gate_term if sum_up else None), (dup, up_term if sum_up else None)
    of_gate, of_up = (None if term is None else grad.float().t() @ term.x.float() for grad, term in pairs)
    of_down = dy_term.x.float().t() @ y.float() if sum_down and dy_term is not None else None
    return of_gate, of_up, of_down


def lora_residual(y: Tensor, term: "LowRank", residual: Tensor, out: Tensor) -> None:
    """out = residual + (y + x b^T), both sums in fp32, the inner one rounded to y's dtype."""
    out.copy_(residual.float() + _plus(y, term).float())


def lora_rope(
    y: Tensor, term: "LowRank | None", cos: Tensor, sin: Tensor, heads: Sequence[int], separate: bool
) -> None:
    """y + x b^T, the sum in fp32 and rounded to y's dtype; then `rope_fwd` of its heads of q and k, in place."""
    dim = cos.shape[-1]
    for i, part in enumerate(torch.split(y, [n * dim for n in heads], dim=-1)):
        if term is not None and part.shape[1]:
            first = dim * sum(heads[:i])
            own = slice(None)
            if separate:
                rank = term.x.shape[1] // 3
                own = slice(i * rank, (i + 1) * rank)
            b = term.b[first : first + part.shape[1], own]
            part.copy_(_plus(part, replace(term, x=term.x[:, own], b=b)))
        if i < 2 and part.shape[1]:
            turned = part.view(-1, cos.shape[1], heads[i], dim)
            rope_fwd(turned, turned[:, :, :0], cos, sin, 2, True, True)
