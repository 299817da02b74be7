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


def swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up
