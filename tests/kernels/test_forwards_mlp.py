"""The MLP forwards on upstream's own modules: which path each activation takes, and that the results are upstream's."""

import copy
import functools
import types

import pytest
import torch
from accuracy import check
from torch import nn
from transformers import GemmaConfig, LlamaConfig, Phi3Config, PhiConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from sloth_plugins.patches.blocks.activation import activation_of
from sloth_plugins.patches.forwards.glu import gated, gated_fused
from sloth_plugins.patches.forwards.mlp import plain
from sloth_plugins.patches.kernels import ops

# class: (config, config attribute of the activation, module attribute of it, factory)
KINDS = {
    LlamaMLP: (LlamaConfig, "hidden_act", "act_fn", gated),
    GemmaMLP: (GemmaConfig, "hidden_act", "act_fn", gated),
    Gemma2MLP: (Gemma2Config, "hidden_activation", "act_fn", gated),
    Phi3MLP: (Phi3Config, "hidden_act", "activation_fn", gated_fused),
    PhiMLP: (PhiConfig, "hidden_act", "activation_fn", plain),
}
SIZES = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36, "pad_token_id": 0}
OURS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Another formula, or one of ours in steps of Python.
THEIRS = ("relu", "quick_gelu", "gelu_fast", "gelu_10", "gelu_python", "gelu_python_tanh", "mish")


class Case:
    """Upstream's module, a copy with the patched forward, and how often that one called upstream's."""

    def __init__(self, kind, activation):
        config_class, attribute, self.holder, self.factory = KINDS[kind]
        config = config_class(**SIZES)
        # Not by the constructor: in 5.x Gemma's takes "gelu" for a legacy name of the tanh form.
        setattr(config, attribute, activation)
        self.stock = kind(config)
        self.fell_back = 0
        self.patched = self.patch(self.stock)

    def patch(self, module):
        original = type(module).forward

        @functools.wraps(original)
        def counted(*args):
            self.fell_back += 1
            return original(*args)

        patched = copy.deepcopy(module)
        patched.forward = types.MethodType(self.factory(counted), patched)
        return patched

    def activation(self):
        return getattr(self.patched, self.holder)

    def check(self, dtype=torch.float32):
        """Output and gradients of input and weights, against upstream's in float64."""
        names, weights = zip(*self.stock.named_parameters(), strict=True)

        def run(module):
            return lambda x, *w: torch.func.functional_call(module, dict(zip(names, w, strict=True)), (x,))

        check(run(self.patched), run(self.stock), [t.to(dtype) for t in (torch.randn(2, 5, 24), *weights)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_known_activations_run_in_the_kernel(kind, activation, dtype, monkeypatch):
    taken = []
    for name in ("glu", "glu_fused", "activate"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, real=real: taken.append(args[-1]) or real(*args))
    case = Case(kind, activation)
    case.check(dtype)
    assert taken == [OURS[activation]]
    # The float64 copy is not the patched one, so upstream's forward ran for no call of ours.
    assert case.fell_back == 0


@pytest.mark.parametrize("activation", THEIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_activations_take_upstreams_path(kind, activation):
    case, x = Case(kind, activation), torch.randn(2, 5, 24)
    assert torch.equal(case.patched(x), case.stock(x))
    assert case.fell_back == 1


HOOKS = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *args: seen.append(1)),
    "forward pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *args: seen.append(1)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(lambda *args: seen.append(1)),
    "backward pre-hook": lambda module, seen: module.register_full_backward_pre_hook(lambda *args: seen.append(1)),
    "hook on all modules": lambda module, seen: nn.modules.module.register_module_forward_hook(
        lambda called, *args: seen.append(1) if called is module else None
    ),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP, PhiMLP])
def test_hooks_on_the_activation_are_called(kind, hook):
    case, seen = Case(kind, "gelu_pytorch_tanh"), []
    handle = hook(case.activation(), seen)
    case.patched(torch.randn(2, 24, requires_grad=True)).sum().backward()
    handle.remove()
    assert seen == [1]
    assert case.fell_back == 1
    case.patched(torch.randn(2, 24))
    assert case.fell_back == 1


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP, PhiMLP])
def test_an_activation_that_somebody_changed_is_called(kind):
    case = Case(kind, "gelu")
    case.activation().forward = torch.zeros_like
    assert case.patched(torch.randn(2, 24)).detach().equal(case.patched(torch.zeros(2, 24)))
    assert case.fell_back == 2


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_no_kernel_takes(kind):
    case, x = Case(kind, "gelu_pytorch_tanh"), torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.equal(case.patched.double()(x), case.stock.double()(x))
    assert case.fell_back == 0


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP, PhiMLP])
def test_projections_are_called_as_modules(kind):
    case, seen = Case(kind, "silu"), []
    for name, module in case.patched.named_children():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *args, name=name: seen.append(name))
    case.patched(torch.randn(2, 24))
    assert sorted(seen) == sorted(name for name, m in case.patched.named_children() if isinstance(m, nn.Linear))
    assert len(seen) > 1


def test_torch_gelu_is_told_by_its_form():
    assert activation_of(nn.GELU()) == "gelu"
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(nn.SiLU()) == "silu"


def test_a_class_of_the_same_kind_is_not_trusted():
    class GELU(nn.GELU):
        def forward(self, x):
            return x

    assert activation_of(GELU()) is None
    assert activation_of(torch.nn.functional.gelu) is None
    changed = ACT2FN["gelu_pytorch_tanh"]
    changed.act = functools.partial(torch.nn.functional.gelu, approximate="none")
    assert activation_of(changed) == "gelu"
    changed.act = torch.tanh
    assert activation_of(changed) is None


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP, PhiMLP])
def test_under_compile_upstreams_path(kind):
    case, x = Case(kind, "gelu_pytorch_tanh"), torch.randn(2, 24)
    compiled = torch.compile(case.patched, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), case.stock(x))
    assert case.fell_back == 1
