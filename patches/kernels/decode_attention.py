"""Attention of one token of each row over its cache, in Triton.

A program has the query heads that share a key head, and a part of the row's tokens; where there are too few rows to
fill the device, tokens are split among programs, and a second kernel joins what they found. Tokens that a row does not
have are not read.
"""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from .dispatch import multiprocessors, on_device_of
from .rows import cdiv, next_power_of_2

MAX_SPLITS = 32


@triton.jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr, scale, softcap, window,
    q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out [B, H, SPLITS, D] and, with several parts, lse [B, H, SPLITS] of one part for one row and key head."""
    row, head = (tl.program_id(0) // KEY_HEADS).to(tl.int64), (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    split = tl.program_id(1)
    n = tl.load(lengths_ptr + row).to(tl.int32) + 1
    first = n * 0
    if WINDOW:
        first = tl.maximum(n - window, 0)
    per_split = tl.cdiv(tl.cdiv(n - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, n)

    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = head * GROUP + group
    in_group, in_dims = group < GROUP, dims < D
    mask = in_group[:, None] & in_dims[None, :]
    q = tl.load(q_ptr + row * q_b + heads[:, None] * q_h + dims[None, :], mask=mask, other=0.0)
    highest = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    found = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < end
        at64 = at.to(tl.int64)
        both = there[:, None] & in_dims[None, :]
        k = tl.load(k_ptr + row * k_b + head * k_h + at64[:, None] * k_n + dims[None, :], mask=both, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            # tanh(x) as 1 - 2 / (exp(2x) + 1), which has no overflow that matters.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(there[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        v = tl.load(v_ptr + row * v_b + head * v_h + at64[:, None] * v_n + dims[None, :], mask=both, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        highest = higher
    # A part without tokens has found nothing, with weight 0.
    found = found / tl.where(total > 0.0, total, 1.0)[:, None]
    at_out = (row * KEY_HEADS * GROUP + heads) * SPLITS + split
    tl.store(out_ptr + at_out[:, None] * D + dims[None, :], found.to(out_ptr.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        lse = tl.where(total > 0.0, highest + tl.log(tl.where(total > 0.0, total, 1.0)), -float("inf"))
        tl.store(lse_ptr + at_out, lse, mask=in_group)


@triton.jit
def join_kernel(
    parts_ptr, lse_ptr, out_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """The parts of one head of one row, each by its weight."""
    head = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + head * SPLITS + splits, mask=splits < SPLITS, other=-float("inf"))
    weights = tl.exp(lse - tl.max(lse, axis=0))
    mask = (splits < SPLITS)[:, None] & (dims < D)[None, :]
    parts = tl.load(parts_ptr + (head * SPLITS + splits)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    joined = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + head * D + dims, joined.to(out_ptr.dtype.element_ty), mask=dims < D)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Write `out`; same contract as `reference_decoding.decode_attention`."""
    (n_rows, n_q, dim), (n_k, capacity) = q.shape, keys.shape[1:3]
    most = capacity if window is None else min(capacity, window)
    # Two programs to each multiprocessor, none with less than a block of tokens.
    block_n = 128 // keys.element_size()
    splits = max(1, min(MAX_SPLITS, 2 * multiprocessors(q) // (n_rows * n_k), cdiv(most, block_n)))
    block_d = max(16, next_power_of_2(dim))
    if splits == 1:
        parts = lse = out
    else:
        parts = torch.empty((n_rows, n_q, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((n_rows, n_q, splits), dtype=torch.float32, device=q.device)
    kernel: Any = decode_attention_kernel
    join: Any = join_kernel
    with on_device_of(q):
        kernel[(n_rows * n_k, splits)](
            q, keys, values, lengths, parts, lse, scale, softcap or 0.0, window or 0,
            q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3],
            KEY_HEADS=n_k, GROUP=n_q // n_k, BLOCK_G=max(16, next_power_of_2(n_q // n_k)), D=dim, BLOCK_D=block_d,
            BLOCK_N=block_n, SPLITS=splits, SOFTCAP=softcap is not None, WINDOW=window is not None,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            join[(n_rows * n_q,)](
                parts, lse, out, D=dim, BLOCK_D=block_d, SPLITS=splits, BLOCK_S=next_power_of_2(splits), num_warps=4
            )
