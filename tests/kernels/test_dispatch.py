import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from sloth_plugins.patches.kernels import dispatch, ops
from sloth_plugins.patches.kernels.dispatch import backend_for

HERE = backend_for(torch.ones(1))


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_and_parameters_have_a_backend():
    assert HERE in ("reference", "triton")
    x = torch.ones(2, 3)
    assert backend_for(x, nn.Parameter(x), x.half(), x.bfloat16(), x.t(), x.expand(4, 2, 3)) == HERE


REFUSED = {
    "subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "parameter subclass": lambda: type("Packed", (nn.Parameter,), {})(torch.ones(3)),
    "meta": lambda: torch.ones(3, device="meta"),
    "fp64": lambda: torch.ones(3, dtype=torch.float64),
    "integers": lambda: torch.ones(3, dtype=torch.int64),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "empty": lambda: torch.ones(0, 3),
    "sparse": lambda: torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_steps_aside_for(make):
    plain = torch.ones(3)
    assert backend_for(make()) is None
    assert backend_for(plain, make()) is None
    assert backend_for(make(), plain) is None


def test_steps_aside_for_fake_tensors():
    with FakeTensorMode():
        assert backend_for(torch.ones(3)) is None


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_steps_aside_inside_a_transform(transform):
    seen = []

    def f(x):
        seen.append(backend_for(x))
        return x.sum()

    transform(f)(torch.ones(2, 3))
    assert seen == [None]
    assert backend_for(torch.ones(2, 3)) == HERE


def test_steps_aside_for_forward_mode():
    with forward_ad.dual_level():
        assert backend_for(forward_ad.make_dual(torch.ones(3), torch.ones(3))) is None
    assert backend_for(torch.ones(3)) == HERE


def test_steps_aside_while_tracing():
    seen = []

    def f(x):
        seen.append(backend_for(x))
        return x + 1

    torch.jit.trace(f, torch.ones(3), check_trace=False)
    assert seen == [None]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own imports warn
def test_steps_aside_while_compiling():
    def f(x, w):
        if ops.supports_rms_norm(x, w) or ops.supports_glu(x, x) or backend_for(x) is not None:
            return x
        return x + 1

    x, w = torch.zeros(2, 3), torch.ones(3)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, w), torch.ones(2, 3))
    assert torch.equal(f(x, w), x)


def test_an_op_names_what_it_refuses():
    with pytest.raises(TypeError, match=r"rms_norm cannot run on Tensor\(torch\.float64, cpu, \(2, 3\)\)"):
        ops.rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3), 1e-5)


def test_launches_on_the_cpu_need_no_device():
    with dispatch.on_device_of(torch.ones(1)) as entered:
        assert entered is None
