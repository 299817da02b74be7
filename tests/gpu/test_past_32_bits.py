"""Kernels on tensors whose offsets do not fit in 32 bits, held to upstream's values in the last rows."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # upstream.py lives there

import upstream

from sloth_plugins.patches.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("_on_gpu"),
]

EPS = 1e-5
swiglu, silu_glu = (partial(f, activation="silu") for f in (ops.glu, upstream.glu))
NORMS = {
    "rms_norm": (ops.rms_norm, upstream.rms_norm, 1),
    "layer_norm": (ops.layer_norm, lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps), 2),
}
HUGE = 2**31 + 2**20


def needs_memory(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.0f} are free")


@pytest.mark.parametrize("norm", NORMS)
def test_norms_past_32_bit_offsets(norm):
    needs_memory(24)
    ours, plain, count = NORMS[norm]
    n = 8192
    x = torch.zeros(HUGE // n, n, dtype=torch.bfloat16)
    x[-40:] = torch.randn(40, n).bfloat16()
    parameters = torch.rand(count, n).bfloat16()
    leaf = x.requires_grad_()
    y = ours(leaf, *parameters, EPS)
    tail = x.detach()[-40:].clone().requires_grad_()
    own = plain(tail, *parameters, EPS)
    torch.testing.assert_close(y[-40:], own, rtol=0.01, atol=1e-3)
    g = torch.randn(1, n).bfloat16()
    y.backward(g.expand(y.shape))
    own.backward(g.expand(own.shape))
    torch.testing.assert_close(leaf.grad[-40:], tail.grad, rtol=0.02, atol=1e-2)


def test_swiglu_past_32_bit_offsets():
    needs_memory(40)
    n = 2**15
    gate = torch.zeros(HUGE // n, n, dtype=torch.bfloat16)
    gate[-3:] = torch.randn(3, n).bfloat16()
    up = torch.ones_like(gate)
    gate.requires_grad_()
    y = swiglu(gate, up)
    tail = gate.detach()[-3:].clone().requires_grad_()
    own = silu_glu(tail, up[-3:])
    torch.testing.assert_close(y[-3:], own, rtol=0.01, atol=1e-3)
    # As halves of wider rows, so that row offsets pass the limit as well.
    half = swiglu(gate.detach()[:, : n // 2], up[:, n // 2 :])
    torch.testing.assert_close(half[-3:], own.detach()[:, : n // 2], rtol=0.01, atol=1e-3)
    del half
    y.backward(torch.ones_like(y))
    own.backward(torch.ones_like(own))
    torch.testing.assert_close(gate.grad[-3:], tail.grad, rtol=0.02, atol=1e-2)


def test_rotary_past_32_bit_offsets():
    needs_memory(24)
    seq, heads, dim = HUGE // (16 * 128), 16, 128
    q = torch.zeros(1, seq, heads * dim, dtype=torch.bfloat16)
    q[:, -5:] = torch.randn(1, 5, heads * dim).bfloat16()
    k = torch.randn(1, seq, dim).bfloat16()
    cos, sin = torch.zeros(1, seq, dim, dtype=torch.bfloat16), torch.zeros(1, seq, dim, dtype=torch.bfloat16)
    angles = torch.randn(1, 5, dim)
    cos[:, -5:], sin[:, -5:] = angles.cos().bfloat16(), angles.sin().bfloat16()

    def heads_first(x):
        return x.view(1, x.shape[1], -1, dim).transpose(1, 2)

    q_out, k_out = ops.apply_rotary(heads_first(q), heads_first(k), cos, sin)
    own = upstream.apply_rotary(heads_first(q[:, -5:]), heads_first(k[:, -5:]), cos[:, -5:], sin[:, -5:])
    assert torch.equal(q_out[:, :, -5:], own[0])
    assert torch.equal(k_out[:, :, -5:], own[1])
