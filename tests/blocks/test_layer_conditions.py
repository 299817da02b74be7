"""Each condition on a layer, its norms, its attention and its call that does not hold: upstream's forward runs."""

import functools

import pytest
import torch
from lora_models import FAMILIES, batch, distance, fuse, gradients, lora_model
from torch import nn
from transformers.models.llama import modeling_llama

from sloth_plugins import revert

pytestmark = pytest.mark.filterwarnings("ignore")


def layers_of(model):
    return model.base_model.model.model.layers


def both(model, runs, **kwargs):
    """Stock's and the fused model's loss and gradients, and how often a layer ran fused."""
    expected = gradients(model, **kwargs)
    assert fuse(model) == 2
    found = gradients(model, **kwargs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert distance(found[1], expected[1]) < 1e-5
    return len(runs)


class Squared(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x).square()


class MyMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x) + x


def module_of_another_class(layer):
    layer.mlp.__class__ = MyMLP


def layer_norm(layer):
    layer.input_layernorm = nn.LayerNorm(48).requires_grad_(False)


def replaced(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def trained_sinks(layer):
    layer.self_attn.sinks = nn.Parameter(torch.zeros(4))


# What is done to the first layer, and a part of what is then said of it.
CHANGES = {
    "a trained norm": (lambda layer: layer.input_layernorm.requires_grad_(), "input_layernorm is trained"),
    "a trained norm of the MLP": (
        lambda layer: layer.post_attention_layernorm.requires_grad_(),
        "post_attention_layernorm is trained",
    ),
    "another norm": (layer_norm, "input_layernorm is a torch.nn.modules.normalization.LayerNorm"),
    "a parametrised norm": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer.input_layernorm, "weight", nn.Identity()),
        "input_layernorm has no weight",
    ),
    "a norm of one weight": (
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(1), requires_grad=False)),
        "input_layernorm has shape (1,) for 48 features",
    ),
    "a replaced forward of a norm": (
        lambda layer: replaced(layer.input_layernorm),
        "the forward of input_layernorm was replaced",
    ),
    "a replaced forward of the attention": (
        lambda layer: replaced(layer.self_attn),
        "the forward of self_attn was replaced",
    ),
    "a replaced forward of the MLP": (lambda layer: replaced(layer.mlp), "the forward of mlp was replaced"),
    "a replaced forward of the activation": (lambda layer: replaced(layer.mlp.act_fn), "the activation is SiLU"),
    "another MLP": (module_of_another_class, "the forward of mlp was replaced by test_layer_conditions"),
    "another activation": (lambda layer: setattr(layer.mlp, "act_fn", Squared()), "the activation is Squared"),
    "a function for activation": (
        lambda layer: (layer.mlp._modules.pop("act_fn"), setattr(layer.mlp, "act_fn", torch.tanh)),
        "the activation is tanh",
    ),
    "another child": (lambda layer: layer.self_attn.add_module("extra", nn.Linear(2, 2)), "self_attn.extra is Linear"),
    "a child of the layer": (lambda layer: layer.add_module("extra", nn.Identity()), "extra is Identity"),
    "dropout": (lambda layer: layer.mlp.add_module("dropout", nn.Dropout(0.5)), "mlp.dropout is dropout"),
    "parameters of the attention's own": (trained_sinks, "self_attn has parameters of its own that are trained"),
}


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_layer_that_is_not_plain(change, late, runs, said):
    model = lora_model()
    apply, reason = CHANGES[change]
    if late:
        fuse(model)
        gradients(model)
        revert(model)
    apply(layers_of(model)[0])
    assert both(model, runs) == 1 + 2 * late
    assert len(said) == 1
    assert reason in next(iter(said))


def test_dropout_that_does_nothing_is_no_reason(runs):
    model = lora_model()
    layers_of(model)[0].mlp.add_module("dropout", nn.Dropout(0.0))
    layers_of(model)[1].self_attn.add_module("dropout", nn.Dropout(0.5).eval())
    assert both(model, runs) == 2


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (("llama", "llama"), {"attention_dropout": 0.1}, "its attention has dropout"),
        (("phi3", "phi3"), {"resid_pdrop": 0.1}, "resid_attn_dropout is dropout"),
        (("phi", "phi"), {"resid_pdrop": 0.1}, "resid_dropout is dropout"),
        (("llama", "llama"), {"hidden_act": "relu"}, "the activation is ReLU"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_configs(family, changes, reason, runs, said):
    model = lora_model(*family, changes=changes)
    torch.manual_seed(1)
    expected = gradients(model)
    fuse(model)
    torch.manual_seed(1)
    found = gradients(model)
    assert not runs
    assert any(reason in line for line in said)
    assert torch.equal(found[0], expected[0])
    assert distance(found[1], expected[1]) < 1e-6
    if "hidden_act" not in changes:
        # Without dropout the same model runs fused.
        model.eval()
        expected = gradients(model)
        assert len(runs) == 2
        model.train()


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaAttention", "LlamaRMSNorm"])
def test_a_class_whose_forward_somebody_replaces(name, runs, said, monkeypatch):
    """By a function that passes for upstream's by its names."""
    model = lora_model()
    fuse(model)
    gradients(model)
    assert len(runs) == 2
    kind = getattr(modeling_llama, name)
    original, calls = kind.forward, []

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    gradients(model)
    assert len(runs) == 2
    assert len(calls) == {"LlamaRMSNorm": 5}.get(name, 2)
    assert any("was replaced by test_layer_conditions" in line for line in said)


@pytest.mark.parametrize("family", FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_in_float64_upstream_runs(family, runs, said):
    model = lora_model(*family, dtype=torch.float64)
    expected = gradients(model)
    fuse(model)
    found = gradients(model)
    assert not runs
    assert any("no plain tensor" in line for line in said)
    assert torch.equal(found[0], expected[0])


def test_compiled(runs):
    model = lora_model()
    expected = model(input_ids=batch()).logits
    fuse(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=batch()).logits, expected)
    assert not runs
