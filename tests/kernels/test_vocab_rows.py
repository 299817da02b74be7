"""The row kernels on projections of several blocks, against autograd in float64."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate

from sloth_plugins.patches.kernels.ops.vocab_rows import OPTIONAL, LogitShape, RowStatistics, rows_implementation

pytestmark = pytest.mark.usefixtures("_poisoned")

BLOCK = 2048
SHAPES = {
    "plain": LogitShape(),
    "all": LogitShape(pre=0.5, cap=3.0, post=1.25),
    "negative": LogitShape(pre=-1.0, post=0.5),
}
# One column, odd, one block to the element, one more, and three blocks of which the last is short.
VOCABULARIES = [1, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 777]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def projections(n, vocabulary, dtype):
    """Rows of a wider buffer, as no caller has them now but any may; beyond them NaN."""
    wide = torch.full((n, vocabulary + 3), float("nan"), dtype=dtype)
    # Later columns are larger, so that every block moves the maximum.
    wide[:, :vocabulary] = torch.randn(n, vocabulary) * 2 + torch.linspace(0, 4, vocabulary)
    return wide, wide[:, :vocabulary]


def targets(n, vocabulary):
    return torch.linspace(0, vocabulary - 1, n).long()


def statistics(y, at, shape, smoothing):
    """What the kernels find, from logits in fp32 or, for fp64, wider."""
    z = (y if y.dtype is torch.float64 else y.float()) * shape.pre
    z = (z if shape.cap is None else shape.cap * torch.tanh(z / shape.cap)) * shape.post
    log_p = z.log_softmax(-1)
    chosen = log_p.gather(-1, at[:, None]).squeeze(-1)
    return {
        "log_probs": (1 - smoothing) * chosen + smoothing * log_p.mean(-1) if smoothing else chosen,
        "log_sum_exp": z.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == at,
    }


def found(y, at, shape, smoothing=0.0, weight=None, outputs=OPTIONAL):
    out = RowStatistics.empty(y.shape[0], outputs, y, torch.float32)
    rows_implementation(y).log_probs(y, at, out, shape, smoothing, weight)
    return out


def slope(y, loss_of):
    """d loss / dy, in the dtype that y is given in."""
    leaf = y.clone().requires_grad_()
    loss_of(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_statistics_and_gradient(vocabulary, shape, smoothing, dtype):
    shape, n, weight = SHAPES[shape], 3, -4.0
    wide, y = projections(n, vocabulary, dtype)
    at = targets(n, vocabulary)
    given = y.clone()
    own, truth = (statistics(t, at, shape, smoothing) for t in (given, given.double()))

    quiet = found(y, at, shape, smoothing)
    assert torch.equal(y, given)
    assert torch.equal(quiet.is_top1, own.pop("is_top1"))
    for name, expected in own.items():
        # With one column or smoothing, sums of this size cancel.
        assert_accurate(
            name, getattr(quiet, name), expected, truth[name], cancelling=2 * float(truth["log_sum_exp"].max())
        )

    written = found(y, at, shape, smoothing, weight, outputs=())
    assert torch.equal(written.log_probs, quiet.log_probs)
    assert wide[:, vocabulary:].isnan().all()
    plain, exact = (
        slope(t, lambda leaf: statistics(leaf, at, shape, smoothing)["log_probs"] * weight)
        for t in (given, given.double())
    )
    assert_accurate("gradient", y, plain, exact, cancelling=8.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [37, BLOCK + 1])
def test_a_target_of_minus_one(vocabulary, smoothing):
    """Its row gives 0 even where its projections are NaN; the other rows are what they are without it."""
    _, y = projections(3, vocabulary, torch.float32)
    at = targets(3, vocabulary)
    alone = y[::2].clone()
    expected = found(alone, at[::2].contiguous(), SHAPES["all"], smoothing, 2.0, outputs=())
    y[1] = float("nan")
    at[1] = -1
    out = found(y, at, SHAPES["all"], smoothing, 2.0, outputs=())
    assert out.log_probs[1] == 0
    assert torch.equal(out.log_probs[::2], expected.log_probs)
    assert (y[1] == 0).all()
    assert torch.equal(y[::2], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wants", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocabulary", [37, BLOCK + 1])
def test_gradient_of_any_function(vocabulary, shape, wants, dtype):
    shape, n, smoothing, weight = SHAPES[shape], 3, 0.1, 2.0
    wide, y = projections(n, vocabulary, dtype)
    at = targets(n, vocabulary)
    mix = {"log_probs": torch.tensor([1.0, -2.0, 0.5]), "entropy": torch.tensor([0.7, 0.0, -3.0])}
    mix = {name: value for name, value in mix.items() if wants in (name, "both")}
    given, out = y.clone(), found(y, at, shape, smoothing)

    def loss_of(leaf):
        made = statistics(leaf, at, shape, smoothing)
        return sum(made[name] * value for name, value in mix.items()) * weight

    rows_implementation(y).log_probs_gradient(
        y, at, out.log_sum_exp, out.entropy, mix.get("log_probs"), mix.get("entropy"), shape, smoothing, weight
    )
    assert wide[:, vocabulary:].isnan().all()
    plain, exact = (slope(t, loss_of) for t in (given, given.double()))
    assert_accurate("gradient", y, plain, exact, cancelling=32.0)


MINUS, PLUS, NAN = float("-inf"), float("inf"), float("nan")
INFINITE = {
    "the first block": (slice(0, BLOCK), MINUS),
    "a block between": (slice(BLOCK, 2 * BLOCK), MINUS),
    "the last block": (slice(2 * BLOCK, None), MINUS),
    "all but one": (slice(1, None), MINUS),
    "a whole row": (slice(None), MINUS),
    "plus infinity, late": (2 * BLOCK + 5, PLUS),
    "plus infinity, early": (5, PLUS),
    "not a number": (BLOCK + 5, NAN),
}


@pytest.mark.parametrize("case", INFINITE)
def test_infinite_logits(case):
    """One row is infinite in places, the other is not and stays as it is."""
    where, value = INFINITE[case]
    _, y = projections(2, 2 * BLOCK + 777, torch.float32)
    y[0, where] = value
    at = torch.tensor([0, 9])
    given, shape = y.clone(), SHAPES["plain"]
    log_p = given.log_softmax(-1)
    out = found(y, at, shape, weight=1.0)
    torch.testing.assert_close(out.log_probs, log_p[[0, 1], at], equal_nan=True)
    entropy = -torch.where(log_p == MINUS, 0.0, log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(out.entropy, entropy, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.log_sum_sq_probs, (2 * log_p).logsumexp(-1), equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.mean_logits, given.mean(-1), equal_nan=True, rtol=1e-5, atol=1e-5)
    expected = slope(given, lambda leaf: leaf.log_softmax(-1).gather(-1, at[:, None]))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-7)


def test_the_first_of_equal_maxima_is_top1():
    y = torch.zeros(4, 2 * BLOCK + 1)
    y[:2, [3, BLOCK + 3]] = y[2:, [BLOCK, 2 * BLOCK]] = 1.5
    out = found(y, torch.tensor([3, BLOCK + 3, BLOCK, 2 * BLOCK]), SHAPES["all"], outputs=("is_top1",))
    assert out.is_top1.tolist() == [True, False, True, False]


def test_a_spread_beyond_exp_is_finite():
    y = torch.zeros(2, BLOCK + 4)
    y[0, 1], y[0, BLOCK + 1], y[1, 2] = 3e4, 6e4, -6e4
    at = torch.tensor([BLOCK + 1, 2])
    truth = statistics(y.double(), at, SHAPES["plain"], 0.0)
    out = found(y, at, SHAPES["plain"])
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(getattr(out, name).double(), truth[name], rtol=1e-5, atol=1e-5)
