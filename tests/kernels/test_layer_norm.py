import copy
import functools
import types

import pytest
import torch
from accuracy import INTERPRETED, check
from torch import nn

from sloth_plugins.patches.forwards.layer_norm import layer_norm as patched_forward
from sloth_plugins.patches.kernels import ops

pytestmark = pytest.mark.usefixtures("_poisoned")

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused(x, weight=None, bias=None):
    return ops.layer_norm(x, weight, bias, EPS)


def plain(x, weight=None, bias=None):
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def inputs(*shape, dtype=torch.float32, parameter_dtype=None):
    n, parameters = shape[-1], parameter_dtype or dtype
    weight, bias = 1 + 0.2 * torch.randn(n), torch.randn(n)
    return torch.randn(shape).to(dtype), weight.to(parameters), bias.to(parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 2), (5, 3), (100,), (2, 3, 100), (3, 4097), (37, 64), (1, 1, 1)], ids=str)
def test_values_and_gradients(shape, dtype):
    # In a row of two numbers all of the gradient but eps cancels.
    check(fused, plain, inputs(*shape, dtype=dtype), cancelling=16.0 if shape[-1] == 2 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["no parameters", "no bias"])
def test_without_parameters(count, dtype):
    check(fused, plain, inputs(2, 3, 100, dtype=dtype)[:count])


def test_without_weight():
    x, _, bias = inputs(2, 3, 100)
    check(lambda x, b: fused(x, None, b), lambda x, b: plain(x, None, b), (x, bias))


NEEDS = {
    "all": (True, True, True),
    "frozen parameters": (True, False, False),
    "frozen w": (True, False, True),
    "frozen b": (True, True, False),
    "frozen x": (False, True, True),
    "only w": (False, True, False),
    "only b": (False, False, True),
    "none": (False, False, False),
}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
@pytest.mark.parametrize("shape", [(70, 100), (3, 8200)], ids=str)
def test_only_the_gradients_that_are_wanted(shape, needs):
    check(fused, plain, inputs(*shape), needs)


@pytest.mark.not_interpreted(reason="half a minute for the loop of other tests")
def test_longest_rows():
    check(fused, plain, inputs(2, 16384))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_parameters(dtype):
    check(fused, plain, inputs(6, 100, dtype=dtype, parameter_dtype=torch.float32))


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_values_far_from_zero(mean):
    """E(x^2) - E(x)^2 would lose the variance: at 1e4 the squares are spaced by 8, and the variance is 1."""
    x, weight, bias = inputs(40, 500)
    check(fused, plain, (mean + x, weight, bias))
    # Nor is it enough to be as bad as torch: only a few roundings of the mean may show.
    exact = plain(*(t.double() for t in (mean + x, weight, bias)))
    assert (fused(mean + x, weight, bias) - exact).abs().max() < 4 * abs(mean) * torch.finfo(torch.float32).eps


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
    _, weight, bias = inputs(view(base).shape[-1])
    check(lambda x, *p: fused(view(x), *p), lambda x, *p: plain(view(x), *p), (base, weight, bias), outgoing=outgoing)


def test_layout_follows_the_input():
    x = torch.randn(2, 5, 3, 24).transpose(1, 2)
    assert fused(x).stride() == x.stride()


def test_strided_parameters():
    _, weight, bias = inputs(16)
    ours, theirs = (lambda x, *p, f=f: f(x, *(t[::2] for t in p)) for f in (fused, plain))
    check(ours, theirs, (torch.randn(5, 8), weight, bias))


@pytest.mark.parametrize(
    "expand", [lambda y: y.new_ones(()).expand(y.shape), lambda y: torch.randn(16).expand(y.shape)]
)
def test_expanded_gradients(expand):
    check(fused, plain, inputs(2, 3, 16), outgoing=expand)


@pytest.mark.parametrize("value", [1e4, 6e4, 1e-7])
def test_extreme_fp16_rows(value):
    x = (torch.randn(4, 64).sign() * value).half()
    check(fused, plain, (x, torch.ones(64).half(), torch.zeros(64).half()))


def test_constant_row_is_the_bias():
    x = torch.full((2, 32), 3.0, requires_grad=True)
    bias = torch.randn(32)
    y = fused(x, torch.ones(32), bias)
    g = torch.randn(2, 32)
    y.backward(g)
    assert torch.equal(y, bias.expand(2, 32))
    torch.testing.assert_close(x.grad, (g - g.mean(-1, keepdim=True)) * EPS**-0.5)


def test_double_backward_raises():
    x, weight, bias = inputs(3, 16)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(fused(x, weight, bias).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dx.sum().backward()


@pytest.mark.not_interpreted(reason="its programs run one after the other")
@pytest.mark.parametrize("shape", [(300, 48), (40, 8200)], ids=str)
def test_parameter_gradients_are_deterministic(shape):
    x, weight, bias = inputs(*shape)
    g = torch.randn(shape)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    first, second = (torch.autograd.grad(fused(x, *leaves), leaves, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_incoming_gradient_is_overwritten_only_if_nobody_sees_it():
    x, weight, bias = (t.requires_grad_() for t in inputs(70, 16))
    kept = []

    def places(keep):
        found = []

        def hook(g):
            found.append(g.data_ptr())
            if keep:
                kept.append((g, g.clone()))

        h = x * 2
        h.register_hook(lambda g: found.append(g.data_ptr()))
        y = fused(h, weight, bias)
        y.register_hook(hook)
        loss = (y * torch.arange(16.0)).sum()
        del h, y
        loss.backward()
        return found

    assert len(set(places(keep=False))) == 1
    assert len(set(places(keep=True))) == 2
    assert torch.equal(*kept[0])


def test_what_is_saved():
    saved = []
    x, weight, bias = (t.requires_grad_() for t in inputs(3, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            quiet = fused(x, weight, bias)
        assert saved == []
        fused(x, weight, bias)
    assert quiet.grad_fn is None
    assert [t.shape for t in saved] == [(3, 16), (16,), (3,), (3,)]


def test_statistics_may_come_back_in_other_strides():
    """As from hooks that keep tensors elsewhere: here the mean is laid out anew, and 1 / sqrt(variance) is not."""
    shapes = []

    def unpack(t):
        shapes.append(t.shape)
        return t.contiguous() if len(shapes) == 2 else t

    def hooked(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return fused(x.transpose(1, 2))

    check(hooked, lambda x: plain(x.transpose(1, 2)), [torch.randn(2, 5, 3, 24)])
    assert shapes == [(2, 3, 5, 24), (2, 3, 5), (2, 3, 5)]


def test_bf16_equals_upstream():
    if INTERPRETED:
        pytest.skip("the interpreter truncates bf16")
    given = inputs(64, 128, dtype=torch.bfloat16)
    # Sums in another order put a few values on the other side of a tie.
    assert (fused(*given) != plain(*given)).float().mean() < 2e-3


@pytest.mark.parametrize(
    ("x", "weight", "bias", "expected"),
    [
        ((4, 8), (8,), (8,), True),
        ((8,), (8,), None, True),
        ((4, 8), None, (8,), True),
        ((4, 8), None, None, True),
        ((4, 8), (4,), (8,), False),
        ((4, 8), (8,), (4,), False),
        ((4, 8), (1, 8), None, False),
        ((), (1,), None, False),
        ((0, 8), (8,), None, False),
        ((1, 16384), None, None, True),
        ((1, 16385), None, None, False),
    ],
)
def test_supports(x, weight, bias, expected):
    tensors = (None if shape is None else torch.ones(shape) for shape in (x, weight, bias))
    assert ops.supports_layer_norm(*tensors) is expected


@pytest.mark.parametrize("x", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [*DTYPES, torch.float64, None], ids=str)
@pytest.mark.parametrize("bias", [*DTYPES, torch.float64, None], ids=str)
def test_dtypes_are_those_that_torch_takes(x, weight, bias):
    tensors = [None if dtype is None else torch.ones(4, dtype=dtype) for dtype in (x, weight, bias)]
    try:
        expected = plain(*tensors).dtype
    except RuntimeError:
        expected = None
    supported = ops.supports_layer_norm(*tensors)
    # Alone float64 is torch's and not ours.
    assert supported is (expected is not None and x is not torch.float64)
    if supported:
        assert fused(*tensors).dtype is expected


class Case:
    """A torch.nn.LayerNorm, a copy with the patched forward, and how often that one called torch's."""

    def __init__(self, *args, dtype=torch.float32, **options):
        self.stock = nn.LayerNorm(*args, **options)
        for parameter in self.stock.parameters():
            nn.init.normal_(parameter, 1.0)
        self.stock = self.stock.to(dtype)
        self.patched = copy.deepcopy(self.stock)
        self.fell_back = 0

        @functools.wraps(nn.LayerNorm.forward)
        def counted(*args):
            self.fell_back += 1
            return nn.LayerNorm.forward(*args)

        self.patched.forward = types.MethodType(patched_forward(counted), self.patched)

    def check(self, x):
        names, parameters = zip(*self.stock.named_parameters(), strict=True)

        def run(module):
            return lambda x, *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (x,))

        check(run(self.patched), run(self.stock), [x, *parameters])


MODULES = {"plain": {}, "no bias": {"bias": False}, "other eps": {"eps": 0.1}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_the_module(options, dtype):
    case = Case(24, dtype=dtype, **options)
    case.check(torch.randn(2, 5, 24).to(dtype))
    assert case.fell_back == 0


def test_a_module_without_parameters():
    case = Case(24, elementwise_affine=False)
    check(case.patched, case.stock, [torch.randn(2, 5, 24)])
    assert case.fell_back == 0


@pytest.mark.parametrize("shape", [(5, 24), (1, 24)], ids=str)
def test_norms_over_more_dimensions_take_torchs_path(shape):
    for affine in (True, False):
        case, x = Case(shape, elementwise_affine=affine), torch.randn(2, *shape)
        assert torch.equal(case.patched(x), case.stock(x))
        assert case.fell_back == 1


def test_a_wrong_length_is_torchs_to_refuse():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        Case(24, elementwise_affine=False).patched(torch.randn(2, 12))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_on_the_cpu_leaves_it_alone(dtype, x_dtype):
    case, x = Case(24, dtype=dtype), torch.randn(2, 24).to(x_dtype)
    if not ops.supports_layer_norm(x, case.stock.weight, case.stock.bias):
        pytest.skip("torch does not take these dtypes")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = case.patched(x), case.stock(x)
    assert case.fell_back == 0
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_under_compile_torchs_path():
    case, x = Case(24), torch.randn(2, 24)
    compiled = torch.compile(case.patched, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), case.stock(x))
    assert case.fell_back == 1
