"""Torch's attention kernels, called directly: causal attention over rows, or over the documents in them.

q is [B, H, S, D], k and v are [B, Hk, S, D], and so are their gradients; all may be views.
"""

from typing import Any

import torch

from .documents import Documents

Tensor = torch.Tensor
Statistics = tuple[Any, ...]
_aten = torch.ops.aten

# Values of torch.nn.attention.SDPBackend, which torch._fused_sdp_choice returns; and of our own.
NONE, _FLASH, _CUDNN, _DOCUMENTS = -1, 1, 3, 100


def choose(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> int:
    """The kernel to call for these tensors: what torch would choose, or one for documents; NONE if there is none."""
    dim = q.shape[-1]
    if q.shape[2] < 2 or dim % 8 or dim != v.shape[-1]:
        return NONE
    # On a CPU, heads that share keys would need copies of them.
    grouped = q.shape[1] != k.shape[1]
    if documents is not None:
        if not q.is_cuda:
            return NONE if grouped or documents.window is not None else _DOCUMENTS
        fits = q.dtype in (torch.float16, torch.bfloat16) and dim <= 256 and torch._C._get_flash_sdp_enabled()
        return _DOCUMENTS if fits and torch.cuda.get_device_capability(q.device) >= (8, 0) else NONE
    if not q.is_cuda:
        if grouped or torch._fused_sdp_choice(q, k, v, is_causal=True, scale=scale) != _FLASH:
            return NONE
        return _FLASH
    choice: int = torch._fused_sdp_choice(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return choice if choice in (_FLASH, _CUDNN) else NONE


def forward(
    backend: int, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None
) -> tuple[Tensor, Statistics]:
    """(the output [B, H, S, D], what the kernel's backward needs beside it)."""
    if backend == _DOCUMENTS and documents is not None:
        return _documents_forward(q, k, v, scale, documents)
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, (lse,)
    if backend == _FLASH:
        out, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        out, *rest = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    # lse, both cumulated lengths, both longest lengths, seed and offset; the last is a mask for debugging.
    return out, tuple(rest[:7])


def backward(
    backend: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Statistics,
    grad: Tensor,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for that of the output."""
    if backend == _DOCUMENTS and documents is not None:
        return _documents_backward(q, k, v, out, statistics, grad, scale, documents)
    if not q.is_cuda:
        (lse,) = statistics
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
        return dq, dk, dv
    lse, cum_q, cum_k, max_q, max_k, seed, offset = statistics
    if backend == _FLASH:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
    else:
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True, scale=scale
        )
    return dq, dk, dv


def _flat(t: Tensor) -> Tensor:
    """[B, H, S, D] as [B * S, H, D]."""
    return t.transpose(1, 2).flatten(0, 1)


def _heads(flat: Tensor, like: Tensor) -> Tensor:
    """[B * S, H, D] as [B, H, S, D], B and S those of `like`."""
    return flat.view(like.shape[0], like.shape[2], *flat.shape[1:]).transpose(1, 2)


def _window(documents: Documents) -> int | None:
    """How many tokens before itself a token sees."""
    return None if documents.window is None else documents.window - 1


def _documents_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents
) -> tuple[Tensor, Statistics]:
    starts, longest = documents.on_device, documents.longest
    if q.is_cuda:
        out, lse, seed, offset, _ = _aten._flash_attention_forward(
            _flat(q), _flat(k), _flat(v), starts, starts, longest, longest, 0.0, True, False,
            scale=scale, window_size_left=_window(documents),
        )  # fmt: skip
        return _heads(out, q), (lse, seed, offset)
    lengths = documents.lengths
    parts = [torch.split(_flat(t), lengths) for t in (q, k, v)]
    outs, statistics = [], []
    for document in zip(*parts, strict=True):
        row = (t.transpose(0, 1)[None] for t in document)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*row, 0.0, True, scale=scale)
        outs.append(out[0].transpose(0, 1))
        statistics.append(lse)
    return _heads(torch.cat(outs), q), tuple(statistics)


def _documents_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Statistics, grad: Tensor, scale: float,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    starts, longest = documents.on_device, documents.longest
    flat = [_flat(t) for t in (grad, q, k, v, out)]
    if q.is_cuda:
        lse, seed, offset = statistics
        dq, dk, dv = _aten._flash_attention_backward(
            *flat, lse, starts, starts, longest, longest, 0.0, True, seed, offset,
            scale=scale, window_size_left=_window(documents),
        )  # fmt: skip
    else:
        grads: list[list[Tensor]] = [[], [], []]
        parts = [torch.split(t, documents.lengths) for t in flat]
        for *document, lse in zip(*parts, statistics, strict=True):
            row = (t.transpose(0, 1)[None] for t in document)
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*row, lse, 0.0, True, scale=scale)
            for collected, part in zip(grads, found, strict=True):
                collected.append(part[0].transpose(0, 1))
        dq, dk, dv = (torch.cat(parts) for parts in grads)
    return _heads(dq, q), _heads(dk, k), _heads(dv, v)
