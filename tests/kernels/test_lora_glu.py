"""The gated activation that adds low-rank terms, against the separate steps in float64."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate, wide

from sloth_plugins.patches.kernels.ops.lora_glu import LowRank, lora_glu, lora_glu_backward

pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    # numpy's words in the interpreter, where an exp that overflows is meant to.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
ACTS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
# (tokens, features, ranks of gate, up and down; 0 for none)
CASES = [
    (3, 7, 4, 4, 4),
    (5, 70, 1, 0, 3),
    (33, 40, 0, 20, 0),
    (2, 64, 0, 0, 0),
    (1, 129, 16, 16, 16),
    (2, 100, 5, 4, 3),
]


def term(tokens, features, rank, dtype, transposed=False):
    if not rank:
        return None
    b = torch.randn(rank, features).to(dtype).t() if transposed else torch.randn(features, rank).to(dtype)
    return LowRank(wide(tokens, rank, dtype), b)


def plus(y, added):
    return y if added is None else y + added.x.to(y.dtype) @ added.b.to(y.dtype).t()


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_values_and_gradients(case, dtype, activation, in_place):
    tokens, features, gate_rank, up_rank, down_rank = case
    gate, up, dy = (wide(tokens, features, dtype) for _ in range(3))
    gate_term, up_term = term(tokens, features, gate_rank, dtype), term(tokens, features, up_rank, dtype)
    dy_term = term(tokens, features, down_rank, dtype, transposed=True)

    def plain(kind):
        leaves = [t.to(kind).detach().requires_grad_() for t in (gate, up)]
        y = ACTS[activation](plus(leaves[0], gate_term)) * plus(leaves[1], up_term)
        return [y.detach(), *torch.autograd.grad(y, leaves, plus(dy.to(kind), dy_term))]

    torchs, truths = plain(dtype), plain(torch.float64)
    y = torch.full_like(gate, torch.nan)
    lora_glu(gate, up, gate_term, up_term, activation, y)
    dgate, dup = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    grad = dy.clone()
    sums = lora_glu_backward(grad, dy_term, gate, up, dgate, dup, activation, gate_term, up_term)
    assert sums == (None, None, None)
    # numpy's products of tiles differ in the last bit between shapes of tiles.
    assert INTERPRETED or torch.equal(grad, y)
    for name, found, own, truth in zip(
        ("y", "y again", "dgate", "dup"), (y, grad, dgate, dup), torchs[:1] + torchs, truths[:1] + truths, strict=True
    ):
        assert_accurate(name, found, own, truth)


def test_what_lies_between_rows_is_not_touched():
    memory = torch.full((4, 20), 7.0)
    gate, up, dy = memory[:, :6], torch.randn(4, 6), torch.randn(4, 6)
    gate.copy_(torch.randn(4, 6))
    lora_glu_backward(dy, None, gate, up, gate, up, "silu", term(4, 6, 2, torch.float32))
    assert (memory[:, 6:] == 7.0).all()


# Rows enough for several programs, and for their sums to be added.
SUMMED = [(3, 7, 4, 4, 4), (5, 70, 1, 0, 3), (33, 40, 0, 20, 0), (300, 33, 5, 4, 3), (1, 129, 16, 16, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMMED, ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_the_factors_on_the_way(case, dtype, wanted):
    tokens, features, *ranks = case
    gate, up, dy = (wide(tokens, features, dtype) for _ in range(3))
    gate_term, up_term = (term(tokens, features, rank, dtype) for rank in ranks[:2])
    dy_term = term(tokens, features, ranks[2], dtype, transposed=True)
    args = gate, up, torch.empty_like(gate), torch.empty_like(up), "silu", gate_term, up_term
    y = dy.clone()
    lora_glu_backward(y, dy_term, *args)
    dgate, dup = (t.clone() for t in args[2:4])
    grad = dy.clone()
    sums = lora_glu_backward(grad, dy_term, *args, sum_up=wanted[0], sum_down=wanted[1])
    assert torch.equal(args[2], dgate)
    assert torch.equal(args[3], dup)
    assert wanted[1] or torch.equal(grad, y)
    terms = (gate_term if wanted[0] else None, up_term if wanted[0] else None, dy_term if wanted[1] else None)
    for name, found, given, other in zip(("gate", "up", "down"), sums, terms, (dgate, dup, y), strict=True):
        if given is None:
            assert found is None
            continue
        truth = other.double().t() @ given.x.double()
        # As torch sums products of this dtype itself.
        own = (
            torch.mm(other.t(), given.x, out_dtype=torch.float32)
            if other.is_cuda and dtype is not torch.float32
            else other.float().t() @ given.x.float()
        )
        assert found.dtype is torch.float32
        assert_accurate(name, found.t() if name == "down" else found, own, truth)
