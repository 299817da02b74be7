"""Forward and hand-written backward of every op in plain torch.

They run wherever Triton cannot and say in ten lines what each kernel computes: fp32 inside, rounded where the separate
elementwise ops of upstream's modelling code would round. The kernel modules have the same functions.
"""

import torch

Tensor = torch.Tensor


def rms_norm_fwd(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """y = x * rstd * w over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps).

    x [..., N], weight [N]. Returns y [..., N] and rstd [...] in fp32.
    """
    x32 = x.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    xhat = x32 * rstd
    if cast_before_weight:
        y = xhat.to(x.dtype) * weight
    else:
        y = (xhat * (offset + weight.float())).to(x.dtype)
    return y, rstd.squeeze(-1)


def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    cast_before_weight: bool,
    dx: Tensor | None,
    need_dw: bool,
) -> Tensor | None:
    """With xhat = x * rstd and g = dy * w: dx = rstd * (g - xhat * mean(g * xhat)), dw = sum over rows of dy * xhat.

    Writes `dx` (shape and dtype of x; may be dy itself) unless it is None; returns dw (dtype of weight) if asked for.
    """
    r = rstd.unsqueeze(-1)
    dy32, xhat = dy.float(), x.float() * r
    dw = None
    if need_dw:
        factor = xhat.to(x.dtype).float() if cast_before_weight else xhat
        dw = (dy32 * factor).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if dx is not None:
        if cast_before_weight:
            g = (dy32 * weight.float()).to(x.dtype).float()
        else:
            g = dy32 * (offset + weight.float())
        dx.copy_(r * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
    return dw


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, keep_dtype: bool
) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin on the first R of D features of q and k, rotate_half(a, b) = (-b, a).

    q, k [B, heads, S, D] (unsqueeze_dim 1) or [B, S, heads, D] (2); cos, sin [1 or B, S, R]. The outputs have the
    inputs' strides and the promoted dtype of q and cos, or q's with `keep_dtype`.
    """
    dtype = torch.promote_types(q.dtype, cos.dtype)
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    outputs = []
    for x in (q, k):
        out = torch.empty_like(x, dtype=x.dtype if keep_dtype else dtype)
        part = x[..., :rotated]
        out[..., :rotated] = part * cos + _rotate_half(part) * sin
        out[..., rotated:] = x[..., rotated:]
        outputs.append(out)
    return outputs[0], outputs[1]


def rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    dq: Tensor | None,
    dk: Tensor | None,
) -> None:
    """g * cos - rotate_half(g * sin), the transpose of the forward, written into `dq` and `dk` where both sides exist.

    `dq` may be `grad_q` itself, likewise for k.
    """
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(unsqueeze_dim).float(), sin.unsqueeze(unsqueeze_dim).float()
    for grad, target in ((grad_q, dq), (grad_k, dk)):
        if grad is None or target is None:
            continue
        g = grad[..., :rotated].float()
        by_cos, by_sin = (g * cos).to(target.dtype), (g * sin).to(target.dtype)
        target[..., :rotated] = by_cos - _rotate_half(by_sin)
        if target is not grad:
            target[..., rotated:] = grad[..., rotated:]


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(g) = g / (1 + exp(-g)) rounded to the dtype; any shape, one dtype."""
    return torch.nn.functional.silu(gate) * up


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None) -> None:
    """With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * silu(gate).

    Writes those of `dgate` and `dup` that are not None; they may be gate's and up's own buffers.
    """
    g = gate.float()
    sig = torch.sigmoid(g)
    # Both are formed before either is written: dgate may be gate, dup may be up.
    values = (
        None if dgate is None else (dy * up).float() * (sig * (1 + g * (1 - sig))),
        None if dup is None else dy * torch.nn.functional.silu(gate),
    )
    for target, value in zip((dgate, dup), values, strict=True):
        if target is not None and value is not None:
            target.copy_(value)
