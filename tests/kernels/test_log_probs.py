"""The fused head against all logits at once: log-probabilities, statistics, cross entropy, and their gradients."""

import pytest
import torch
from accuracy import INTERPRETED, check
from torch.nn import functional as F

from sloth_plugins.patches.kernels.ops.vocab_rows import LogitShape
from sloth_plugins.patches.losses import rows
from sloth_plugins.patches.losses.linear_log_probs import linear_cross_entropy, linear_log_probs

pytestmark = pytest.mark.usefixtures("_poisoned")

ROWS, HIDDEN, VOCABULARY = 21, 40, 131
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "plain": LogitShape(),
    "scaled": LogitShape(pre=0.25),
    "softcapped": LogitShape(cap=2.0),
    "all": LogitShape(pre=1.5, cap=3.0, post=1 / 0.7),
}
HEADS = {"frozen": (True, False, False), "trained": (True, True, True), "bias only": (False, False, True)}
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Five rows in a chunk, so that the last one is shorter."""
    monkeypatch.setattr(rows, "tile_rows", lambda *args, **kwargs: 5)
    monkeypatch.setattr("sloth_plugins.patches.losses.chunks.tile_rows", lambda *args, **kwargs: 5)


def inputs(dtype, n=ROWS):
    hidden = torch.randn(n, HIDDEN, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64) / 4
    return [tensor.to(dtype) for tensor in (hidden, weight, torch.randn(VOCABULARY, dtype=torch.float64))]


def targets(ignored=(), n=ROWS):
    made = torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(1))
    made[list(ignored)] = -100
    return made


def logits(hidden, weight, bias, shape):
    """As upstream makes them: rounded to the inputs' dtype, then fp32 (fp64 stays)."""
    y = F.linear(hidden, weight, bias)
    z = (y if y.dtype is torch.float64 else y.float()) * shape.pre
    if shape.cap is not None:
        z = shape.cap * torch.tanh(z / shape.cap)
    return z * shape.post


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs(dtype, shape, head):
    chosen, at = SHAPES[shape], targets()

    def plain(*tensors):
        return logits(*tensors, chosen).log_softmax(-1).gather(-1, at[:, None]).squeeze(-1)

    def ours(*tensors):
        return linear_log_probs(*tensors, at, shape=chosen).log_probs

    check(ours, plain, inputs(dtype), HEADS[head])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(dtype, shape, head):
    chosen, at = SHAPES[shape], targets()

    def plain(*tensors):
        log_p = logits(*tensors, chosen).log_softmax(-1)
        return log_p.gather(-1, at[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    def ours(*tensors):
        found = linear_log_probs(*tensors, at, shape=chosen, outputs=("entropy",))
        return found.log_probs, found.entropy

    check(ours, plain, inputs(dtype), HEADS[head])


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype):
    at, shape = targets(ignored=(3, 20)), SHAPES["all"]
    tensors = inputs(dtype)
    z = logits(*(tensor.double() for tensor in tensors), shape)
    at[5] = z[5].argmax()
    found = linear_log_probs(*tensors, at, shape=shape, outputs=STATISTICS)
    kept = at != -100
    log_p = z.log_softmax(-1)
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": z.mean(-1),
    }
    own = logits(*tensors, shape).double()
    for name, truth in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double(), truth * kept, rtol=1e-5, atol=4 * float((own - z).abs().max()) + 1e-5
        )
    assert found.is_top1.dtype is torch.bool
    assert torch.equal(found.is_top1, (own.argmax(-1) == at) & kept)
    assert found.is_top1[5] or dtype is not torch.float32


def test_a_tie_with_an_earlier_token_is_not_top1():
    hidden, weight = torch.ones(2, 4), torch.zeros(6, 4)
    weight[1] = weight[4] = 1.0
    found = linear_log_probs(hidden, weight, None, torch.tensor([4, 1]), outputs=("is_top1",))
    assert found.is_top1.tolist() == [False, True]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype, smoothing, reduction, head):
    at = targets(ignored=(0, 1, 7, 20))
    options = {"label_smoothing": smoothing, "reduction": reduction}

    def plain(*tensors):
        return F.cross_entropy(logits(*tensors, SHAPES["softcapped"]), at, **options)

    def ours(*tensors):
        given = {"shape": SHAPES["softcapped"], "smoothing": smoothing, "reduction": reduction}
        return linear_cross_entropy(*tensors, at, **given)

    check(ours, plain, inputs(dtype), HEADS[head])


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_fp32_gradients_are_within_a_millionth(head):
    at = targets(ignored=(2, 3))
    tensors = inputs(torch.float32)
    leaves = [tensor.requires_grad_(flag) for tensor, flag in zip(tensors, HEADS[head], strict=True)]
    linear_cross_entropy(*leaves, at).backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    F.cross_entropy(F.linear(*doubles), at).backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        if leaf.requires_grad:
            assert relative(leaf.grad, double.grad) < 1e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no float64 path of ours")
@pytest.mark.parametrize("head", HEADS)
def test_float64(head):
    at = targets(ignored=(2, 3))
    leaves = [tensor.requires_grad_(flag) for tensor, flag in zip(inputs(torch.float64), HEADS[head], strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = linear_cross_entropy(*leaves, at, shape=SHAPES["all"], smoothing=0.2)
    expected = F.cross_entropy(logits(*leaves, SHAPES["all"]), at, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True)
    for ours, plain in grads:
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_of_every_kind(dtype):
    wide, _, _ = inputs(dtype, n=2 * ROWS)
    hidden = wide[::2]
    weight = inputs(dtype)[1].t().contiguous().t()
    at = torch.stack([targets(), targets()], -1)[:, 0]
    found = linear_log_probs(hidden, weight, None, at).log_probs
    expected = linear_log_probs(hidden.contiguous(), weight.contiguous(), None, at.contiguous()).log_probs
    torch.testing.assert_close(found, expected)


def test_other_functions_of_the_same_log_probs():
    """Twice in one graph, and a weight that is used elsewhere too."""
    at = targets()

    def plain(hidden, weight, bias):
        log_p = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, at[:, None]).squeeze(-1)
        return (log_p * torch.linspace(-1, 1, ROWS)).sum() + log_p.exp().sum() + weight[at].pow(2).sum()

    def ours(hidden, weight, bias):
        log_p = linear_log_probs(hidden, weight, bias, at).log_probs
        return (log_p * torch.linspace(-1, 1, ROWS)).sum() + log_p.exp().sum() + weight[at].pow(2).sum()

    check(ours, plain, inputs(torch.float32))


@pytest.mark.parametrize("head", HEADS)
def test_a_graph_that_is_kept_can_be_run_again(head):
    leaves = [tensor.requires_grad_(flag) for tensor, flag in zip(inputs(torch.float32), HEADS[head], strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    loss = linear_cross_entropy(*leaves, targets())
    first = torch.autograd.grad(loss, wanted, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, wanted, torch.tensor(3.0))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, wanted)


def test_a_second_derivative_is_refused():
    leaves = [tensor.requires_grad_() for tensor in inputs(torch.float32)]
    grads = torch.autograd.grad(linear_cross_entropy(*leaves, targets()), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grads[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [0, 1, ROWS])
def test_rows_none_of_which_counts(n, reduction, dtype):
    leaves = [tensor.requires_grad_() for tensor in inputs(dtype, n=n)]
    at = torch.full((n,), -100)
    found = linear_cross_entropy(*leaves, at, reduction=reduction)
    torch.testing.assert_close(found, F.cross_entropy(torch.zeros(n, 9), at, reduction=reduction), equal_nan=True)
    linear_cross_entropy(*leaves, at, reduction="sum").backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("n", [1, 4, 5, 6])
def test_few_rows(n):
    at = targets(n=n)
    check(
        lambda *tensors: linear_cross_entropy(*tensors, at),
        lambda *tensors: F.cross_entropy(logits(*tensors, SHAPES["plain"]), at),
        inputs(torch.float32, n=n),
    )


@pytest.mark.parametrize("wrong", [VOCABULARY, VOCABULARY + 400, -1, -101])
def test_a_target_outside_the_vocabulary_is_named(wrong):
    at = targets(ignored=(4,))
    at[9] = wrong
    with pytest.raises(IndexError, match=rf"target {wrong} is out of bounds.*{VOCABULARY} tokens.*-100"):
        linear_cross_entropy(*inputs(torch.float32), at)


def test_another_index_is_ignored():
    at = targets()
    at[[2, 5]] = 7
    found = linear_log_probs(*inputs(torch.float32), at, ignore_index=7).log_probs
    assert found[2] == found[5] == 0
    with pytest.raises(IndexError, match="target -100"):
        linear_log_probs(*inputs(torch.float32), targets(ignored=(1,)), ignore_index=7)


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, bias = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"do not fit each other: \(21, 40\), \(131, 40\), \(20,\)"):
        linear_log_probs(hidden, weight, bias, targets(n=20))
    with pytest.raises(ValueError, match="unknown output 'entropie'"):
        linear_log_probs(hidden, weight, bias, targets(), outputs=("entropie",))
    with pytest.raises(ValueError, match="average is not a valid value"):
        linear_cross_entropy(hidden, weight, bias, targets(), reduction="average")


INFINITE = {
    "a target": (0, 3, float("-inf")),
    "others": (1, None, float("-inf")),
    "plus infinity": (2, 60, float("inf")),
    "nan": (3, 60, float("nan")),
    "a whole row": (4, slice(None), float("-inf")),
    "the first block of a row": (5, slice(0, 100), float("-inf")),
}


@pytest.mark.parametrize("case", INFINITE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits_give_what_torch_gives(case, smoothing):
    """The bias is added to every row, so it makes any logit infinite."""
    _, where, value = INFINITE[case]
    hidden, weight, bias = inputs(torch.float32)
    at = targets()
    bias[(at[0] + 1) % VOCABULARY if where is None else where] = value
    leaf = hidden.clone().requires_grad_()
    found = linear_cross_entropy(leaf, weight, bias, at, reduction="none", smoothing=smoothing)
    found.sum().backward()
    other = hidden.clone().requires_grad_()
    expected = F.cross_entropy(F.linear(other, weight, bias), at, reduction="none", label_smoothing=smoothing)
    expected.sum().backward()
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(leaf.grad, other.grad, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_weight_of_another_dtype():
    hidden, weight, bias = inputs(torch.float32)
    at = targets()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    linear_cross_entropy(*leaves, at, compute_dtype=torch.float16).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 3
    with torch.autocast("cpu", dtype=torch.float16):
        other = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        F.cross_entropy(F.linear(*other).float(), at).backward()
    for leaf, plain in zip(leaves, other, strict=True):
        assert relative(leaf.grad, plain.grad.double()) < 4e-3


def test_small_probabilities_survive_fp16():
    """Unit gradients of a large vocabulary are below fp16's normal numbers; a scaled loss brings them back."""
    made = torch.Generator().manual_seed(2)
    hidden = torch.randn(6, 16, generator=made).half()
    weight = (torch.randn(20000, 16, generator=made) / 8).half()
    at = torch.randint(0, 20000, (6,), generator=made)
    leaf = hidden.clone().requires_grad_()
    (linear_cross_entropy(leaf, weight, None, at) * 2.0**12).backward()
    truth = hidden.double().requires_grad_()
    (F.cross_entropy(F.linear(truth, weight.double()), at) * 2.0**12).backward()
    plain = hidden.clone().requires_grad_()
    (F.cross_entropy(F.linear(plain, weight).float(), at) * 2.0**12).backward()
    assert relative(leaf.grad, truth.grad) < 2 * relative(plain.grad, truth.grad) + 1e-3
