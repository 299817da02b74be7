"""The ops as upstream's modelling code writes them; on float64 inputs they are the truth the kernels are held to."""

import torch


def rms_norm(x, weight, eps, offset=0.0, cast_before_weight=True):
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        return weight * h.to(x.dtype)
    return (h * (offset + weight.to(wide))).to(x.dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1, keep_dtype=False):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotated = cos.shape[-1]
    outputs = []
    for x in (q, k):
        part, rest = x[..., :rotated], x[..., rotated:]
        out = part * cos + rotate_half(part) * sin
        if rest.shape[-1]:
            out = torch.cat((out, rest), dim=-1)
        outputs.append(out.to(x.dtype) if keep_dtype else out)
    return tuple(outputs)


def qk_norm_rope(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_eps,
    k_eps,
    offset=0.0,
    cast_before_weight=True,
    unsqueeze_dim=1,
    keep_dtype=False,
):
    q = rms_norm(q, q_weight, q_eps, offset, cast_before_weight)
    k = rms_norm(k, k_weight, k_eps, offset, cast_before_weight)
    return apply_rotary(q, k, cos, sin, unsqueeze_dim, keep_dtype)


def activate(x, activation):
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def glu(gate, up, activation):
    return activate(gate, activation) * up


def glu_fused(gate_up, activation):
    return glu(*gate_up.chunk(2, dim=-1), activation)
