import pytest
import torch
import upstream
from accuracy import check

from sloth_plugins.patches.kernels import ops

pytestmark = pytest.mark.usefixtures("_poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3), (2, 3, 100), (3, 4097), (1, 1, 1)], ids=str)
def test_values_and_gradients(shape, dtype):
    check(ops.swiglu, upstream.swiglu, (torch.randn(shape).mul(3).to(dtype), torch.randn(shape).to(dtype)))


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
def test_views(view):
    check(lambda x: ops.swiglu(*view(x)), lambda x: upstream.swiglu(*view(x)), (torch.randn(720),))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted(needs):
    check(ops.swiglu, upstream.swiglu, (torch.randn(4, 30), torch.randn(4, 30)), needs)


GRADIENTS = {
    "one number": lambda y: y.new_ones(()).expand(y.shape),
    "one vector": lambda y: torch.randn(y.shape[-1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1]).t(),
    "every second": lambda y: torch.randn(y.shape[0], 2 * y.shape[1])[:, ::2],
}


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients(outgoing):
    check(ops.swiglu, upstream.swiglu, (torch.randn(4, 30), torch.randn(4, 30)), outgoing=outgoing)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, where the interpreter's exp gives inf as it should
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype):
    gate = torch.tensor([-6e4, -1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 6e4]).to(dtype)
    check(ops.swiglu, upstream.swiglu, (gate, torch.ones(10).to(dtype)), outgoing=torch.ones_like)


def test_double_backward_raises():
    gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    (dgate,) = torch.autograd.grad(ops.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dgate.sum().backward()


def test_saves_gate_and_up_alone():
    saved = []
    gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            ops.swiglu(gate, up)
        assert saved == []
        ops.swiglu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


def test_supports():
    x = torch.ones(3, 4)
    assert ops.supports_swiglu(x, x)
    assert not ops.supports_swiglu(x, x.half())
    assert not ops.supports_swiglu(x, x[:1])
    assert not ops.supports_swiglu(x[0, 0], x[0, 0])
