from functools import partial

import pytest
import torch
import upstream
from accuracy import check

from sloth_plugins.patches.kernels import ops

pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    # numpy's words in the interpreter, where an exp or a square that overflows is meant to.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@pytest.fixture(params=ACTIVATIONS)
def pair(request):
    """Our op and upstream's for one activation."""
    return [partial(op, activation=request.param) for op in (ops.activate, upstream.activate)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3), (2, 3, 100), (3, 4097)], ids=str)
def test_values_and_gradients(pair, shape, dtype):
    check(*pair, (torch.randn(shape).mul(3).to(dtype),))


VIEWS = {
    "transposed": lambda x: x.view(2, 6, 5, 12)[:, :3].transpose(1, 2),
    "sliced rows": lambda x: x.view(30, 24)[::2],
    "four strided dims": lambda x: x.view(2, 5, 3, 2, 12)[:, ::2, :, :, :6].permute(1, 3, 0, 2, 4)[:2],
    "last dim not contiguous": lambda x: x.view(30, 24).t(),
    "expanded": lambda x: x[:24].expand(5, 24),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(pair, view):
    ours, plain = pair
    check(lambda x: ours(view(x)), lambda x: plain(view(x)), (torch.randn(720),))


GRADIENTS = {
    "one number": lambda y: y.new_ones(()).expand(y.shape),
    "one vector": lambda y: torch.randn(y.shape[-1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1]).t(),
    "every second": lambda y: torch.randn(y.shape[0], 2 * y.shape[1])[:, ::2],
}


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients(pair, outgoing):
    check(*pair, (torch.randn(4, 30),), outgoing=outgoing)


# Near 0, around it, the two tails, and both sides of 16, from where on the slope of gelu_tanh is taken for constant.
@pytest.mark.parametrize("span", [(-0.01, 0.01), (-1, 1), (-5, -2), (2, 6), (10, 17)], ids=str)
def test_every_part_of_the_curve(pair, span):
    check(*pair, (torch.linspace(*span, 501),), outgoing=torch.ones_like)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_inputs_reach_the_limits(activation, dtype):
    """torch's own slope of gelu_tanh is NaN from 1e20 on, so the limits themselves are what is expected."""
    points = [p for p in (100.0, 6e4, 1e20, 1e30, 1e38) if p <= torch.finfo(dtype).max]
    x = torch.tensor([*(-p for p in points), *points]).to(dtype).requires_grad_()
    y = ops.activate(x, activation)
    y.sum().backward()
    assert torch.equal(y, x.detach().clamp(min=0))
    assert torch.equal(x.grad, (x > 0).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation):
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    y = ops.activate(x, activation)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False]


def test_double_backward_raises():
    x = torch.randn(3, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.activate(x, "gelu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dx.sum().backward()


def test_saves_its_input_alone():
    saved, x = [], torch.randn(3, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            ops.activate(x, "gelu")
        assert saved == []
        ops.activate(x, "gelu")
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        ops.activate(torch.ones(3), "relu")


def test_supports():
    assert ops.supports_activate(torch.ones(3))
    assert not ops.supports_activate(torch.ones(()))
    assert not ops.supports_activate(torch.ones(3).double())
    assert not ops.supports_activate(torch.ones(0))
