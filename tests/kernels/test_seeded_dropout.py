"""Dropout whose mask a seed gives again: the same at any time, for any values, dtype and strides."""

import pytest
import torch

from sloth_plugins.patches.kernels.ops.dropout import add_dropped, dropped

pytestmark = pytest.mark.usefixtures("_poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (5, 3), (3, 48), (1, 1024), (2, 1025), (37, 100), (3, 4097)]
SEED = 1234567


def mask_of(shape, p, seed=SEED):
    return dropped(torch.ones(shape), p, seed) != 0


def strided(shape, dtype, beyond):
    wide = torch.randn(shape[0], shape[1] + beyond).to(dtype)
    return wide[:, : shape[1]], wide[:, shape[1] :], wide[:, shape[1] :].clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, p, dtype):
    x, *_ = strided(shape, dtype, 3)
    found = dropped(x, p, SEED)
    assert found.dtype is dtype
    assert found.shape == x.shape
    keep = mask_of(shape, p)
    truth = torch.where(keep, x.double() / (1 - p) if p < 1 else 0.0, 0.0)
    assert not found[~keep].any()
    # Rounded once; Triton's interpreter truncates where it casts to bf16.
    error = (found.double() - truth).abs()
    assert (error <= truth.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_depends_on_seed_and_shape_only(shape):
    keep = mask_of(shape, 0.5)
    for dtype in DTYPES:
        x, *_ = strided(shape, dtype, 11)
        x = x.abs() + 1
        for given in (x, x.contiguous()):
            assert torch.equal(dropped(given, 0.5, SEED) != 0, keep)
    torch.rand(7)
    assert torch.equal(mask_of(shape, 0.5), keep), "whatever was drawn in between"
    if keep.numel() > 40:
        assert not torch.equal(mask_of(shape, 0.5, SEED + 1), keep)


def test_torchs_generator_is_left_alone():
    x, state = torch.randn(5, 7), torch.get_rng_state()
    dropped(x, 0.3, SEED)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.not_interpreted(reason="its masks are the reference's to the bit")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_frequencies(p):
    """Over all elements, over each row and column, and over neighbours, within five standard deviations."""
    keep = mask_of((120, 150), p).double()
    deviation = (p * (1 - p)) ** 0.5
    for found, count in ((keep.mean(), keep.numel()), (keep.mean(0), 120), (keep.mean(1), 150)):
        assert (found - (1 - p)).abs().max() < 5 * deviation / count**0.5
    centred = keep - (1 - p)
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert shifted.mean().abs() < 5 * deviation**2 / shifted.numel() ** 0.5
    other = mask_of((120, 150), p, SEED + 1).double() - (1 - p)
    assert (centred * other).mean().abs() < 5 * deviation**2 / keep.numel() ** 0.5


def test_nan_and_inf_are_dropped_too():
    x = torch.full((4, 50), float("nan"))
    x[::2] = float("inf")
    found, keep = dropped(x, 0.5, SEED), mask_of((4, 50), 0.5)
    assert not found[~keep].any()
    assert not torch.isfinite(found[keep]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_added(shape, dtype):
    x, *_ = strided(shape, dtype, 3)
    total, rest, before = strided(shape, dtype, 5)
    expected = total + dropped(x, 0.4, SEED)
    exact = total.double() + dropped(x, 0.4, SEED).double()
    add_dropped(total, x, 0.4, SEED)
    assert torch.equal(rest, before), "written beyond the rows"
    keep = mask_of(shape, 0.4)
    assert torch.equal(total[~keep], expected[~keep])
    error = (total.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2])
def test_any_seed(seed):
    keep = mask_of((50, 60), 0.5, seed)
    assert 0.4 < keep.double().mean() < 0.6
    assert torch.equal(mask_of((50, 60), 0.5, seed), keep)
