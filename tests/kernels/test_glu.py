from functools import partial

import pytest
import torch
import upstream
from accuracy import check

from sloth_plugins.patches.kernels import ops

pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    # numpy's words in the interpreter, where an exp that overflows is meant to.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@pytest.fixture(params=ACTIVATIONS)
def pair(request):
    """Our op and upstream's for one activation."""
    return [partial(op, activation=request.param) for op in (ops.glu, upstream.glu)]


@pytest.fixture(params=ACTIVATIONS)
def fused_pair(request):
    return [partial(op, activation=request.param) for op in (ops.glu_fused, upstream.glu_fused)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3), (2, 3, 100), (3, 4097), (1, 1, 1)], ids=str)
def test_values_and_gradients(pair, shape, dtype):
    check(*pair, (torch.randn(shape).mul(3).to(dtype), torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (6,), (5, 6), (2, 3, 100), (3, 4098)], ids=str)
def test_values_and_gradients_of_one_tensor(fused_pair, shape, dtype):
    check(*fused_pair, (torch.randn(shape).mul(3).to(dtype),))


VIEWS = {
    "halves of one tensor": lambda x: x.view(2, 5, 72).chunk(2, dim=-1),
    "transposed": lambda x: (x.view(2, 6, 5, 12)[:, :3].transpose(1, 2), x.view(2, 5, 6, 12)[:, :, :3]),
    "sliced rows": lambda x: (x.view(30, 24)[::2], x.view(30, 24)[1::2]),
    "four strided dims": lambda x: (
        x.view(2, 5, 3, 2, 12)[:, ::2, :, :, :6].permute(1, 3, 0, 2, 4)[:2],
        x.view(2, 5, 3, 2, 12)[:, ::2, :, :, 6:].permute(1, 3, 0, 2, 4)[:2],
    ),
    "last dim not contiguous": lambda x: (x.view(30, 24).t(), x.view(24, 30)),
    "both transposed": lambda x: (x[:360].view(30, 12).t(), x[360:].view(30, 12).t()),
    "expanded": lambda x: (x[:24].expand(5, 24), x[24:144].view(5, 24)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(pair, view):
    ours, plain = pair
    check(lambda x: ours(*view(x)), lambda x: plain(*view(x)), (torch.randn(720),))


FUSED_VIEWS = {
    "transposed": lambda x: x.view(5, 2, 72).transpose(0, 1),
    "sliced rows": lambda x: x.view(30, 24)[::2],
    "part of the features": lambda x: x.view(2, 5, 72)[..., 3:33],
    "four strided dims": lambda x: x.view(2, 5, 3, 2, 12)[:, ::2].permute(1, 3, 0, 2, 4)[:2],
    "last dim not contiguous": lambda x: x.view(30, 24).t(),
    "expanded": lambda x: x[:24].expand(5, 24),
}


@pytest.mark.parametrize("view", FUSED_VIEWS.values(), ids=FUSED_VIEWS.keys())
def test_views_of_one_tensor(fused_pair, view):
    ours, plain = fused_pair
    check(lambda x: ours(view(x)), lambda x: plain(view(x)), (torch.randn(720),))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted(pair, needs):
    check(*pair, (torch.randn(4, 30), torch.randn(4, 30)), needs)


GRADIENTS = {
    "one number": lambda y: y.new_ones(()).expand(y.shape),
    "one vector": lambda y: torch.randn(y.shape[-1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1]).t(),
    "every second": lambda y: torch.randn(y.shape[0], 2 * y.shape[1])[:, ::2],
}


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients(pair, outgoing):
    check(*pair, (torch.randn(4, 30), torch.randn(4, 30)), outgoing=outgoing)


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients_of_one_tensor(fused_pair, outgoing):
    check(*fused_pair, (torch.randn(4, 60),), outgoing=outgoing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(pair, dtype):
    gate = torch.tensor([-6e4, -1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 6e4]).to(dtype)
    check(*pair, (gate, torch.ones(10).to(dtype)), outgoing=torch.ones_like)


def test_halves_equal_two_tensors():
    gate_up, dy = torch.randn(3, 200, requires_grad=True), torch.randn(3, 100)
    for activation in ACTIVATIONS:
        two, one = ops.glu(*gate_up.chunk(2, -1), activation), ops.glu_fused(gate_up, activation)
        assert torch.equal(two, one)
        grads = [torch.autograd.grad(y, gate_up, dy)[0] for y in (two, one)]
        assert torch.equal(*grads)


def test_double_backward_raises():
    gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    for op in (lambda: ops.glu(gate, up, "gelu"), lambda: ops.glu_fused(gate, "gelu")):
        (dgate,) = torch.autograd.grad(op().sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            dgate.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_its_inputs_alone(activation):
    saved = []
    gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            ops.glu(gate, up, activation)
            ops.glu_fused(gate, activation)
        assert saved == []
        ops.glu(gate, up, activation)
        ops.glu_fused(gate, activation)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr(), gate.data_ptr()]


def test_unknown_activation_is_refused():
    x = torch.ones(3, 4)
    for op in (lambda: ops.glu(x, x, "relu"), lambda: ops.glu_fused(x, "relu")):
        with pytest.raises(ValueError, match="unknown activation 'relu'; known are silu, gelu_tanh, gelu"):
            op()


def test_supports():
    x = torch.ones(3, 4)
    assert ops.supports_glu(x, x)
    assert not ops.supports_glu(x, x.half())
    assert not ops.supports_glu(x, x[:1])
    assert not ops.supports_glu(x[0, 0], x[0, 0])
    assert ops.supports_glu_fused(x)
    assert not ops.supports_glu_fused(x[:, :3])
    assert not ops.supports_glu_fused(x[0, 0])
    assert not ops.supports_glu_fused(x.double())
