"""Bytes of a fused layer in closed form: what it keeps under each policy, and what its backward needs for a while.

For T tokens, hidden size h, a features of all query heads, kv of all key heads, f of gate (as of up), ranks r. The
layer's input x and the sum after the attention have the residual stream's dtype, all else that of the products:

    always      x [T, h], the low-rank products [T, r] of all groups (r rounded up), the statistics of the MLP's norm,
                what a norm after `down` needs [T, h]
    ATTENTION   and the attention's output [T, a] with its row statistics
    KEEP        and q [T, a], k and v [T, kv], the sum after the attention [T, h], gate and up [T, f]
"""

from collections.abc import Sequence

from ..blocks.group import Group, row_of
from ..blocks.made_weight import joint_shape
from ..blocks.policy import Policy
from ..blocks.projection import Projection
from ..blocks.run import Parts
from ..kernels.ops.block_norm import Norm

_FP32 = 4


def kept(parts: Parts, tokens: int, policy: Policy, width: int, graph: int = 0) -> int:
    """Bytes that a layer keeps from its forward to its backward; `width` are those of a number in its input.

    `graph` are the bytes that upstream's attention function keeps beside q, k and v, where that runs.
    """
    h, e = parts.qkv.k, parts.qkv.dtype.itemsize
    a, kv = _heads(parts)
    per_token = h * width + _ranks(parts) * e + _statistics(parts.mlp_norm)
    if parts.mlp_output_norm is not None:
        per_token += h * e + _statistics(parts.mlp_output_norm)
    if policy is Policy.INPUT:
        return tokens * per_token
    per_token += a * e
    if graph:
        # The graph begins with q, k and v of its own.
        per_token += (a + 2 * kv) * e
    else:
        per_token += parts.heads[0] * _FP32
    if policy is Policy.ATTENTION:
        return tokens * per_token + graph
    per_token += _statistics(parts.attention_norm) + _up(parts) * e
    if not parts.is_parallel:
        per_token += h * width
    if not graph or parts.qk_norms is not None:
        per_token += (a + kv) * e + (0 if graph else kv * e)
    if parts.qk_norms is not None:
        per_token += (parts.heads[0] + parts.heads[1]) * _FP32
    if parts.attention_output_norm is not None:
        per_token += h * e + _statistics(parts.attention_output_norm)
    return tokens * per_token + graph


def offloaded(parts: Parts, tokens: int, policy: Policy, width: int) -> list[int]:
    """Bytes of those tensors that a layer keeps under a policy and that may wait in host memory."""
    sizes = [tokens * parts.qkv.k * width]
    if policy is Policy.ATTENTION:
        sizes.append(tokens * _heads(parts)[0] * parts.qkv.dtype.itemsize)
    return sizes


def work(parts: Parts, tokens: int, policy: Policy, width: int) -> int:
    """Bytes that the backward of a layer needs at its worst moment, beside what was kept.

    That is in the MLP: gradients of the activation [T, f] and of its input, one weight where it is made, and without
    KEEP what the layer's forward has made again.
    """
    h, e = parts.qkv.k, parts.qkv.dtype.itemsize
    a, kv = _heads(parts)
    per_token = parts.down.k * e + 2 * h * e + 2 * h * width
    if policy is not Policy.KEEP:
        per_token += _up(parts) * e + h * width + (2 * a + 2 * kv) * e
    return tokens * per_token + largest_weight(parts)


def largest_weight(parts: Parts) -> int:
    """Bytes of the largest weight that is made for each product; 0 where all are used as they are."""
    return max((bytes_of(group, made) for group in parts.groups for made in group.made_together()), default=0)


def bytes_of(group: Group, made: Sequence[Projection]) -> int:
    """Bytes of the weights of these projections of a group as they are made: unpacked from four bits, or cast."""
    rows, cols = joint_shape(made, group.room)
    return rows * cols * group.dtype.itemsize


def _heads(parts: Parts) -> tuple[int, int]:
    """Features of all query heads, and of all key heads."""
    n_q, n_k, dim = parts.heads
    return n_q * dim, n_k * dim


def _ranks(parts: Parts) -> int:
    return sum(row_of(group.r) for group in parts.groups)


def _up(parts: Parts) -> int:
    """Features of gate and up, with the room that is left behind them."""
    return parts.up.n + (parts.up.room if parts.is_gated else 0)


def _statistics(norm: Norm) -> int:
    return (2 if norm.is_layer else 1) * _FP32
