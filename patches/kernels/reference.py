"""Forward and hand-written backward of every op in plain torch.

They run wherever Triton cannot and say in ten lines what each kernel computes: fp32 inside, rounded where the separate
elementwise ops of upstream's modelling code would round. The kernel modules have the same functions.
"""

import math

import torch

from .ops.vocab_rows import LogitShape, RowStatistics

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
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, keep_dtype: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin on the first R of D features of q and k, rotate_half(a, b) = (-b, a).

    q, k [B, heads, S, D] (unsqueeze_dim 1) or [B, S, heads, D] (2); cos, sin [1 or B, S, R]. The outputs have the
    inputs' strides and the promoted dtype of q and cos, or q's with `keep_dtype`; with `in_place`, which keeps the
    dtype, they are q and k themselves.
    """
    dtype = torch.promote_types(q.dtype, cos.dtype)
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    outputs = []
    for x in (q, k):
        out = torch.empty_like(x, dtype=x.dtype if keep_dtype or in_place else dtype)
        part = x[..., :rotated]
        out[..., :rotated] = part * cos + _rotate_half(part) * sin
        out[..., rotated:] = x[..., rotated:]
        outputs.append(x.copy_(out) if in_place else out)
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


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_eps: float,
    k_eps: float,
    offset: float,
    cast_before_weight: bool,
    unsqueeze_dim: int,
    keep_dtype: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_fwd` of q and of k over the head's features, then `rope_fwd`.

    q, k as for `rope_fwd` with R = D, weights [D]. Returns both results, and rstd of q and of k in fp32, without D.
    """
    q_normed, q_rstd = rms_norm_fwd(q, q_weight, q_eps, offset, cast_before_weight)
    k_normed, k_rstd = rms_norm_fwd(k, k_weight, k_eps, offset, cast_before_weight)
    q_out, k_out = rope_fwd(q_normed, k_normed, cos, sin, unsqueeze_dim, keep_dtype)
    return q_out, k_out, q_rstd, k_rstd


def qk_norm_rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    offset: float,
    cast_before_weight: bool,
    unsqueeze_dim: int,
    dq: Tensor | None,
    dk: Tensor | None,
    need_dq_weight: bool,
    need_dk_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`rope_bwd` to the dtype that the norm's result had, then `rms_norm_bwd`, for each of q and k.

    Writes `dq` (shape and dtype of q; may be grad_q itself) unless it is None, and returns the weight's gradient if
    asked for; likewise for k. Where a gradient is None nothing is written, and None is returned.
    """
    dws: list[Tensor | None] = []
    for grad, x, weight, rstd, dx, need_dw in (
        (grad_q, q, q_weight, q_rstd, dq, need_dq_weight),
        (grad_k, k, k_weight, k_rstd, dk, need_dk_weight),
    ):
        if grad is None or not (need_dw or dx is not None):
            dws.append(None)
            continue
        dtype = torch.promote_types(x.dtype, weight.dtype) if cast_before_weight else x.dtype
        dy = torch.empty_like(x, dtype=dtype)
        rope_bwd(grad, None, cos, sin, unsqueeze_dim, dy, None)
        dws.append(rms_norm_bwd(dy, x, weight, rstd, offset, cast_before_weight, dx, need_dw))
    return dws[0], dws[1]


def activate_fwd(x: Tensor, activation: str) -> Tensor:
    """x * s(x), rounded once: for silu s = sigmoid, for gelu the normal distribution, for gelu_tanh its approximation.

    The approximation is s(x) = sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 * x^3), which is (1 + tanh(u)) / 2.
    """
    if activation == "silu":
        y: Tensor = torch.nn.functional.silu(x)
    else:
        y = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y


def _activation_grad(x: Tensor, activation: str) -> Tensor:
    """s(x) + x * s'(x) in fp32, finite wherever x is; x [...] in fp32."""
    if activation == "gelu":
        cdf: Tensor = torch.special.ndtr(x)
        return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "silu":
        sig = torch.sigmoid(x)
        return sig * (1 + x * (1 - sig))
    scale = math.sqrt(8 / math.pi)
    # From 16 on the slope is 0 or 1 to fp32; the square of x could overflow, and 0 * inf is NaN.
    x = x.clamp(-16, 16)
    z = scale * (x + 0.044715 * x.pow(3))
    # sigmoid(-z) is 1 - sigmoid(z) without cancellation: what multiplies it is large.
    return torch.sigmoid(z) * (1 + x * torch.sigmoid(-z) * scale * (1 + 3 * 0.044715 * x.square()))


def activate_bwd(dy: Tensor, x: Tensor, dx: Tensor, activation: str, restore: bool = False) -> None:
    """dx = dy * (the activation's derivative at x), rounded once into `dx`, which may be x itself.

    With `restore`, dy then becomes the activation of x.
    """
    y = activate_fwd(x, activation) if restore else None
    dx.copy_(dy.float() * _activation_grad(x.float(), activation))
    if y is not None:
        dy.copy_(y)


def glu_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activate(gate) rounded to the dtype, times up; any shape, one dtype."""
    return activate_fwd(gate, activation) * up


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None, activation: str) -> None:
    """dgate = (dy * up rounded to the dtype) * (the activation's derivative at gate), dup = dy * activate(gate).

    Writes those of `dgate` and `dup` that are not None; they may be gate's and up's own buffers.
    """
    # Both are formed before either is written: dgate may be gate, dup may be up.
    values = (
        None if dgate is None else (dy * up).float() * _activation_grad(gate.float(), activation),
        None if dup is None else dy * activate_fwd(gate, activation),
    )
    for target, value in zip((dgate, dup), values, strict=True):
        if target is not None and value is not None:
            target.copy_(value)


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = xhat * w + b over the last dimension, xhat = (x - mean) * rstd, rstd = 1 / sqrt(mean((x - mean)^2) + eps).

    x [..., N], weight and bias [N] or None. Returns y [..., N] in x's dtype, mean [...] and rstd [...] in fp32.
    """
    x32 = x.float()
    mean = x32.mean(-1, keepdim=True)
    centred = x32 - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """With g = dy * w: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dw = sum of dy * xhat, db = sum of dy.

    Writes those of `dx` (shape and dtype of x; may be dy itself), `dw` and `db` [N] that are not None.
    """
    n = x.shape[-1]
    r = rstd.unsqueeze(-1)
    dy32, xhat = dy.float(), (x.float() - mean.unsqueeze(-1)) * r
    if dw is not None:
        dw.copy_((dy32 * xhat).reshape(-1, n).sum(0))
    if db is not None:
        db.copy_(dy32.reshape(-1, n).sum(0))
    if dx is not None:
        g = dy32 if weight is None else dy32 * weight.float()
        dx.copy_(r * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)))


def _logits(y: Tensor, shape: LogitShape) -> tuple[Tensor, Tensor | None]:
    """Logits z of projections y in fp32 (fp64 stays), and the tanh of their softcap."""
    z = (y if y.dtype is torch.float64 else y.float()) * shape.pre
    if shape.cap is None:
        return z * shape.post, None
    t = torch.tanh(z / shape.cap)
    return t * (shape.cap * shape.post), t


def log_probs(
    y: Tensor, targets: Tensor, out: RowStatistics, shape: LogitShape, smoothing: float, weight: float | None
) -> None:
    """Fill `out` from projections y [n, V] and targets [n]; with a weight, y becomes weight * d log_probs / dy.

    A target of -1 makes a row's log-probability and gradient 0.
    """
    ignored, targets = targets < 0, targets.clamp_min(0)
    z, t = _logits(y, shape)
    top = z.amax(-1, keepdim=True)
    # As log_softmax has it, a row with +inf or of -inf alone is NaN; torch.logsumexp has it otherwise.
    lse = (z - top).exp_().sum(-1).log_().add_(top.squeeze(-1))
    chosen = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    out.log_sum_exp.copy_(lse)
    log_probs = (chosen - lse) * (1.0 - smoothing)
    if smoothing > 0.0:
        log_probs = log_probs + smoothing * (z.mean(-1) - lse)
    out.log_probs.copy_(log_probs.masked_fill_(ignored, 0.0))
    if out.mean_logits is not None:
        out.mean_logits.copy_(z.mean(-1))
    if out.is_top1 is not None:
        out.is_top1.copy_(z.argmax(-1) == targets)
    log_p = z.sub_(lse.unsqueeze(-1))
    if out.log_sum_sq_probs is not None:
        out.log_sum_sq_probs.copy_(torch.logsumexp(2.0 * log_p, -1))
    if out.entropy is not None:
        p = log_p.exp()
        out.entropy.copy_(-torch.where(p == 0.0, 0.0, p * log_p).sum(-1))
    if weight is not None:
        ones = torch.full_like(lse, weight)
        _write_gradient(y, targets, log_p, t, ones, None, None, shape, smoothing)
        y.masked_fill_(ignored.unsqueeze(-1), 0.0)


def log_probs_gradient(
    y: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor | None,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    shape: LogitShape,
    smoothing: float,
    weight: float,
) -> None:
    """Overwrite projections y [n, V] with weight * the gradient of sum(grad * log_probs + grad_entropy * entropy)."""
    z, t = _logits(y, shape)
    log_p = z.sub_(log_sum_exp.unsqueeze(-1))
    grad = None if grad is None else grad * weight
    grad_entropy = None if grad_entropy is None else grad_entropy * weight
    _write_gradient(y, targets, log_p, t, grad, entropy, grad_entropy, shape, smoothing)


def _write_gradient(
    y: Tensor,
    targets: Tensor,
    log_p: Tensor,
    t: Tensor | None,
    grad: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    shape: LogitShape,
    smoothing: float,
) -> None:
    """d log_probs / dz = (1 - e) [j = target] + e / V - p; d entropy / dz = -p (log p + entropy)."""
    p = log_p.exp()
    slope = torch.zeros_like(p)
    if grad_entropy is not None and entropy is not None:
        slope -= grad_entropy.unsqueeze(-1) * torch.where(p == 0.0, 0.0, p * (log_p + entropy.unsqueeze(-1)))
    if grad is not None:
        toward = p.neg_().add_(smoothing / p.shape[-1])
        toward.scatter_add_(-1, targets.unsqueeze(-1), torch.full_like(toward[:, :1], 1.0 - smoothing))
        slope += grad.unsqueeze(-1) * toward
    slope *= shape.pre * shape.post
    if t is not None:
        slope *= 1.0 - t * t
    y.copy_(slope)
