from functools import partial

import pytest
import torch
import upstream
from accuracy import INTERPRETED, check

from sloth_plugins.patches.kernels import ops

pytestmark = pytest.mark.usefixtures("_poisoned")

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LLAMA = (partial(ops.rms_norm, eps=EPS), partial(upstream.rms_norm, eps=EPS))


def both(**options):
    return partial(ops.rms_norm, eps=EPS, **options), partial(upstream.rms_norm, eps=EPS, **options)


def inputs(*shape, dtype=torch.float32, weight_dtype=None):
    return torch.randn(shape).to(dtype), (1 + 0.2 * torch.randn(shape[-1])).to(weight_dtype or dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 3), (100,), (2, 3, 100), (3, 4097), (37, 64), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"cast_before_weight": False}, {"cast_before_weight": False, "offset": 1.0}])
def test_values_and_gradients(shape, dtype, options):
    # In a row of one number all of the gradient but eps cancels.
    check(*both(**options), inputs(*shape, dtype=dtype), cancelling=16.0 if shape[-1] == 1 else 0.0)


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "frozen w", "frozen x"])
@pytest.mark.parametrize("n", [10000, pytest.param(20000, marks=pytest.mark.not_interpreted(reason="takes long"))])
def test_long_rows(n, needs, cast):
    check(*both(cast_before_weight=cast), inputs(3, n), needs)


@pytest.mark.not_interpreted(reason="half a minute for the loop of test_long_rows")
@pytest.mark.parametrize("options", [{}, {"cast_before_weight": False, "offset": 1.0}])
def test_longest_rows(options):
    check(*both(**options), inputs(1, 65536), (True, not options))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(needs):
    check(*LLAMA, inputs(70, 100), needs)


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(dtype, weight_dtype, cast):
    check(*both(cast_before_weight=cast), inputs(6, 100, dtype=dtype, weight_dtype=weight_dtype))


VIEWS = {
    "transposed heads": lambda x: x.view(2, 5, 3, 24).transpose(1, 2),
    "sliced columns": lambda x: x.view(2, 15, 24)[..., 4:20],
    "sliced rows": lambda x: x.view(2, 5, 3, 24)[:, 1:4, ::2],
    "sliced heads, transposed": lambda x: x.view(2, 5, 3, 24)[:, 1:4, :2].transpose(0, 2),
    "four strided dims": lambda x: x.view(2, 5, 3, 2, 12)[:, ::2, :, :, :6].permute(1, 3, 0, 2, 4)[:2],
    "last dim not contiguous": lambda x: x.view(30, 24).t(),
    "expanded": lambda x: x.view(30, 24)[:3, None].expand(3, 4, 24),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("strided_grad", [False, True])
def test_views(view, strided_grad):
    def outgoing(y):
        g = torch.randn(y.numel() * 2)[: y.numel()].view(y.shape)
        return torch.randn(*y.shape[:-1], y.shape[-1] * 2)[..., ::2] if strided_grad else g

    base = torch.randn(720)
    weight = torch.randn(view(base).shape[-1])
    fused, plain = LLAMA
    check(lambda x, w: fused(view(x), w), lambda x, w: plain(view(x), w), (base, weight), outgoing=outgoing)


def test_layout_follows_the_input():
    x = torch.randn(2, 5, 3, 24).transpose(1, 2)
    assert ops.rms_norm(x, torch.ones(24), EPS).stride() == x.stride()


@pytest.mark.parametrize(
    "expand", [lambda y: y.new_ones(()).expand(y.shape), lambda y: torch.randn(16).expand(y.shape)]
)
def test_expanded_gradients(expand):
    check(*LLAMA, inputs(2, 3, 16), outgoing=expand)


def test_strided_weight():
    fused, plain = LLAMA
    check(lambda x, w: fused(x, w[::2]), lambda x, w: plain(x, w[::2]), (torch.randn(5, 8), torch.randn(16)))


@pytest.mark.parametrize("value", [1e4, 6e4, 1e-7])
def test_extreme_fp16_rows(value):
    x = (torch.randn(4, 64).sign() * value).half()
    check(*LLAMA, (x, torch.ones(64).half()))


def test_zero_row_is_zero():
    x = torch.zeros(2, 32, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(32), EPS)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 32))
    torch.testing.assert_close(x.grad, torch.full((2, 32), EPS**-0.5))


def test_double_backward_raises():
    x, w = inputs(3, 16)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.rms_norm(x, w, EPS).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dx.sum().backward()


@pytest.mark.not_interpreted(reason="its programs run one after the other")
def test_weight_gradient_is_deterministic():
    x, w = inputs(300, 48)
    w.requires_grad_()
    g = torch.randn(300, 48)
    first, second = (torch.autograd.grad(ops.rms_norm(x, w, EPS), w, g)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_saved_without_gradients():
    saved = []
    x, w = (t.requires_grad_() for t in inputs(3, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            quiet = ops.rms_norm(x, w, EPS)
        assert saved == []
        ops.rms_norm(x, w, EPS)
    assert quiet.grad_fn is None
    assert [t.shape for t in saved] == [(3, 16), (16,), (3,)]


def test_offset_needs_the_other_order():
    with pytest.raises(ValueError, match=r"offset 1\.0"):
        ops.rms_norm(*inputs(3, 16), EPS, offset=1.0)


def test_bf16_equals_upstream():
    x, w = inputs(64, 128, dtype=torch.bfloat16)
    if INTERPRETED:
        pytest.skip("the interpreter truncates bf16")
    assert torch.equal(ops.rms_norm(x, w, EPS), upstream.rms_norm(x, w, EPS))


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [((4, 8), (8,), True), ((8,), (8,), True), ((4, 8), (4,), False), ((4, 8), (1, 8), False), ((), (1,), False)],
)
def test_supports(x, weight, expected):
    assert ops.supports_rms_norm(torch.ones(x), torch.ones(weight)) is expected


def test_supports_no_longer_rows():
    assert not ops.supports_rms_norm(torch.ones(1, 65537), torch.ones(65537))
