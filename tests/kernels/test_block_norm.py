"""Norms of a decoder block, row by row: values, gradients, residuals, and the output made again in the gradient."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate
from upstream import rms_norm

from sloth_plugins.patches.kernels.ops.block_norm import Norm, norm_rows, norm_rows_backward

pytestmark = pytest.mark.usefixtures("_poisoned")

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (1, 3), (5, 2), (3, 48), (37, 64), (7, 100), (2, 4097), (1, 16384)]
# (offset, cast_before_weight, is_layer, has a bias)
KINDS = {
    "llama": (0.0, True, False, False),
    "after": (0.0, False, False, False),
    "gemma": (1.0, False, False, False),
    "layer": (0.0, False, True, True),
    "layer, no bias": (0.0, False, True, False),
}


def norm_of(kind, n, dtype):
    offset, cast, layer, biased = KINDS[kind]
    weight = ((0 if offset else 1) + 0.2 * torch.randn(n)).to(dtype)
    return Norm(weight, torch.randn(n).to(dtype) if biased else None, EPS, offset, cast, layer)


def plain(x, norm, residual=None):
    """As upstream's modelling code has it, in the dtype of x."""
    weight = norm.weight.to(x.dtype)
    if norm.is_layer:
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    else:
        y = rms_norm(x, weight, norm.eps, norm.offset, norm.cast_before_weight)
    return y if residual is None else residual + y


def strided(rows, n, dtype, beyond):
    """Random rows with `beyond` elements between them, that must stay as they are."""
    wide = torch.randn(rows, n + beyond).to(dtype)
    return wide[:, :n], wide[:, n:], wide[:, n:].clone()


def gradients(x, norm, g, residual_grad=None, dtype=None):
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    plain(leaf, norm).backward(g.to(leaf.dtype))
    return leaf.grad if residual_grad is None else leaf.grad + residual_grad.to(leaf.dtype)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, kind, dtype, with_residual):
    norm = norm_of(kind, shape[1], dtype)
    x, *_ = strided(*shape, dtype, 5)
    residual = strided(*shape, dtype, 3)[0] if with_residual else None
    out, rest, before = strided(*shape, dtype, 7)
    out.fill_(float("nan"))
    stats = norm_rows(x, norm, out, residual)
    wide = None if residual is None else residual.double()
    own = plain(x, norm, residual)
    # Triton's interpreter truncates what a residual is added to, and both may cancel.
    truncated = residual is not None and INTERPRETED and dtype is torch.bfloat16
    size = (plain(x, norm).abs().max() / torch.finfo(torch.float32).eps * torch.finfo(dtype).eps).item()
    assert_accurate("output", out, own, plain(x.double(), norm, wide), 2 * size if truncated else 0.0)
    assert torch.equal(rest, before), "written beyond the rows"
    assert stats.dtype is torch.float32
    assert torch.isfinite(stats).all()
    if not with_residual:
        again = torch.empty(shape, dtype=dtype)
        norm_rows(x, norm, again)
        assert torch.equal(again, out)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, kind, dtype, with_residual):
    norm = norm_of(kind, shape[1], dtype)
    x, *_ = strided(*shape, dtype, 5)
    out = torch.empty(shape, dtype=dtype)
    stats = norm_rows(x, norm, out)
    dn, rest, before = strided(*shape, dtype, 2)
    g = dn.clone()
    residual_grad = strided(*shape, dtype, 3)[0] if with_residual else None
    dx, beyond, beyond_before = strided(*shape, dtype, 4)
    dx.fill_(float("nan"))
    norm_rows_backward(dn, x, norm, stats, dx=dx, residual_grad=residual_grad, restore=True)
    # Of a row of one or two numbers all of the gradient cancels but what eps leaves.
    cancelling = 64.0 / EPS**0.5 if shape[1] < 3 else 0.0
    assert_accurate(
        "gradient",
        dx,
        gradients(x, norm, g, residual_grad),
        gradients(x, norm, g, residual_grad, torch.float64),
        cancelling,
    )
    assert torch.equal(dn, out), "the norm's output, bit for bit"
    assert torch.equal(rest, before)
    assert torch.equal(beyond, beyond_before)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_the_residuals_gradient(kind):
    norm, x = norm_of(kind, 100, torch.float32), torch.randn(7, 100)
    out = torch.empty_like(x)
    stats = norm_rows(x, norm, out)
    g, total = torch.randn(7, 100), torch.randn(7, 100)
    expected = torch.empty_like(x)
    norm_rows_backward(g.clone(), x, norm, stats, dx=expected, residual_grad=total)
    norm_rows_backward(g.clone(), x, norm, stats, dx=total, residual_grad=total)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_restored(kind):
    """Whoever needs no gradient gives memory that holds anything, NaN too."""
    norm, x = norm_of(kind, 100, torch.float32), torch.randn(7, 100)
    out = torch.empty_like(x)
    stats = norm_rows(x, norm, out)
    dn = torch.full_like(x, float("nan"))
    norm_rows_backward(dn, x, norm, stats, dx=None, restore=True)
    assert torch.equal(dn, out)


def test_without_restore_the_gradient_stays():
    norm, x = norm_of("llama", 100, torch.float32), torch.randn(7, 100)
    stats = norm_rows(x, norm, torch.empty_like(x))
    dn = torch.randn(7, 100)
    before = dn.clone()
    norm_rows_backward(dn, x, norm, stats, dx=torch.empty_like(x))
    assert torch.equal(dn, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", DTYPES[1:], ids=str)
def test_wide_stream_and_narrow_products(kind, half):
    """Under autocast: the stream and the norm in fp32, its output and that gradient in half precision."""
    norm, x = norm_of(kind, 96, torch.float32), torch.randn(9, 96)
    exact = torch.empty_like(x)
    norm_rows(x, norm, exact)
    out = torch.empty(9, 96, dtype=half)
    stats = norm_rows(x, norm, out)
    assert_accurate("output", out, exact.to(half), plain(x.double(), norm))
    dn = torch.randn(9, 96).to(half)
    g, residual_grad, dx = dn.float(), torch.randn(9, 96), torch.empty_like(x)
    norm_rows_backward(dn, x, norm, stats, dx=dx, residual_grad=residual_grad, restore=True)
    assert_accurate(
        "gradient", dx, gradients(x, norm, g, residual_grad), gradients(x, norm, g, residual_grad, torch.float64)
    )
    assert torch.equal(dn, out)


@pytest.mark.parametrize("value", [0.0, 1e-20, 6e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows(kind, value):
    norm = norm_of(kind, 64, torch.float32)
    x = torch.randn(4, 64).sign() * value
    out, dx, g = torch.empty_like(x), torch.empty_like(x), torch.randn(4, 64)
    stats = norm_rows(x, norm, out)
    norm_rows_backward(g.clone(), x, norm, stats, dx=dx)
    assert_accurate("output", out, plain(x, norm), plain(x.double(), norm))
    assert_accurate("gradient", dx, gradients(x, norm, g), gradients(x, norm, g, dtype=torch.float64))
