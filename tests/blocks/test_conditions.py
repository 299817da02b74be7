"""Each condition on projections and adapters that does not hold: upstream's forward runs, and the reason is said."""

import pytest
import torch
from lora_models import batch, distance, fuse, gradients, lora_model
from peft import LoraConfig
from torch import nn

from sloth_plugins import revert

pytestmark = pytest.mark.filterwarnings("ignore")


def layer_of(model, index=0):
    return model.base_model.model.model.layers[index]


def q_of(model):
    return layer_of(model).self_attn.q_proj


def second_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=r".*\.0\..*q_proj", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def merge(model):
    q_of(model).merge()


class QuantLinear(nn.Linear):
    """Stands for the layers of GPTQ, AWQ and 8-bit, which are known by no name here."""

    def forward(self, x):
        return 2 * super().forward(x)


def unknown_base(model):
    old = q_of(model).base_layer
    q_of(model).base_layer = QuantLinear(old.in_features, old.out_features, bias=False).requires_grad_(False)


def unknown_a(model):
    q_of(model).lora_A["default"] = QuantLinear(48, 4, bias=False)


def ones(like):
    return nn.Parameter(torch.ones_like(like), requires_grad=False)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrised(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def weight_normed(module):
    nn.utils.weight_norm(module)


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


def other_dropout(model):
    q_of(model).lora_dropout["default"] = nn.Dropout1d(0.0)


def a_in_double(model):
    q_of(model).lora_A["default"].double()
    q_of(model).lora_B["default"].double()


def biased(model):
    q_of(model).base_layer.bias = nn.Parameter(torch.randn(48))


# What is done to the first layer, and a part of what is then said of it.
CHANGES = {
    "two active adapters": (second_adapter, "self_attn.q_proj has 2 active adapters"),
    "merged": (merge, "the adapter of self_attn.q_proj is merged"),
    "an unknown base": (unknown_base, "self_attn.q_proj is a test_conditions.QuantLinear"),
    "an unknown A": (unknown_a, "lora_A of self_attn.q_proj is a test_conditions.QuantLinear"),
    "an unknown dropout": (other_dropout, "the dropout of self_attn.q_proj is a torch.nn.modules.dropout.Dropout1d"),
    "a trained base": (lambda m: q_of(m).base_layer.requires_grad_(), "the weight of self_attn.q_proj is trained"),
    "a trained bias": (biased, "the bias of self_attn.q_proj is trained"),
    "a parametrised base": (lambda m: parametrised(q_of(m).base_layer), "q_proj is a torch.nn.utils.parametrize"),
    "a parametrised A": (lambda m: parametrised(q_of(m).lora_A["default"]), "lora_A of self_attn.q_proj is a"),
    "weight_norm": (lambda m: weight_normed(q_of(m).base_layer), "self_attn.q_proj has hooks"),
    "a replaced forward": (lambda m: replaced_forward(q_of(m)), "the forward of self_attn.q_proj was replaced"),
    "a replaced forward of the base": (
        lambda m: replaced_forward(q_of(m).base_layer),
        "the forward of self_attn.q_proj was replaced",
    ),
    "a replaced forward of B": (
        lambda m: replaced_forward(q_of(m).lora_B["default"]),
        "the forward of lora_B of self_attn.q_proj was replaced",
    ),
    "no cast of the input": (
        lambda m: setattr(q_of(m), "cast_input_dtype_enabled", False),
        "peft was told not to cast the input of self_attn.q_proj",
    ),
    "an adapter in another dtype": (a_in_double, "the adapter of self_attn.q_proj is in torch.float64"),
    "fp16 adapters without autocast": (
        lambda m: [part["default"].bfloat16() for part in (q_of(m).lora_A, q_of(m).lora_B)],
        "the adapter of self_attn.q_proj is in torch.bfloat16, its input in torch.float32, without autocast",
    ),
}


def assert_only_the_first_falls_back(model, runs, said, reason, change=None, **kwargs):
    """With `change` the condition held for a while, in which the layer was read and ran fused."""
    if change is not None:
        fuse(model)
        gradients(model)
        assert len(runs) == 2
        revert(model)
        change(model)
    expected_loss, expected = gradients(model, **kwargs)
    runs.clear()
    assert fuse(model) == 2
    loss, found = gradients(model, **kwargs)
    assert len(runs) == 1
    (line,) = said
    assert reason in line
    assert "LlamaDecoderLayer runs upstream's forward" in line
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_projection_that_is_not_plain(change, late, runs, said):
    model = lora_model()
    apply, reason = CHANGES[change]
    if not late:
        apply(model)
    assert_only_the_first_falls_back(model, runs, said, reason, apply if late else None)


CONFIGS = {
    "DoRA": ({"use_dora": True}, "self_attn.q_proj has a variant of LoRA (DoraLinearVariant)"),
    "bias of B": ({"lora_bias": True}, "lora_B of self_attn.q_proj has a bias"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_kind_of_lora_that_is_not_plain(config, runs, said):
    settings, reason = CONFIGS[config]
    model = lora_model(**settings, target_modules=["q_proj", "down_proj"], layers_to_transform=[0])
    assert_only_the_first_falls_back(model, runs, said, reason)


WATCHED = {
    "self_attn.q_proj": q_of,
    "self_attn.q_proj, base": lambda m: q_of(m).base_layer,
    "lora_A of self_attn.q_proj": lambda m: q_of(m).lora_A["default"],
    "lora_B of self_attn.q_proj": lambda m: q_of(m).lora_B["default"],
    "the dropout of self_attn.q_proj": lambda m: q_of(m).lora_dropout["default"],
    "self_attn": lambda m: layer_of(m).self_attn,
    "mlp": lambda m: layer_of(m).mlp,
    "mlp.down_proj": lambda m: layer_of(m).mlp.down_proj,
    "input_layernorm": lambda m: layer_of(m).input_layernorm,
    "post_attention_layernorm": lambda m: layer_of(m).post_attention_layernorm,
    "the activation": lambda m: layer_of(m).mlp.act_fn,
}
HOOKS = {
    "pre": ("register_forward_pre_hook", lambda module, args: None),
    "forward": ("register_forward_hook", lambda module, args, output: None),
    "backward": ("register_full_backward_hook", lambda module, given, sent: None),
    "backward pre": ("register_full_backward_pre_hook", lambda module, sent: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("watched", WATCHED)
def test_hooks(watched, kind, runs, said):
    model, calls = lora_model(), []
    # Without it there are no gradients in the first layer that a hook could see.
    model.enable_input_require_grads()
    register, hook = HOOKS[kind]

    def watch(model):
        getattr(WATCHED[watched](model), register)(lambda *args: (calls.append(1), hook(*args))[1])

    assert_only_the_first_falls_back(model, runs, said, watched.partition(",")[0], watch)
    assert len(calls) == 2, "once by stock, once by the patched model"


def test_global_hooks(runs, said):
    model, calls = lora_model(), []
    fuse(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(type(module)))
    try:
        gradients(model)
    finally:
        handle.remove()
    assert not runs
    assert calls.count(nn.Linear) == 2 * 7 * 3 + 1
    gradients(model)
    assert len(runs) == 2


def test_adapter_names(runs, said):
    """peft passes them with hooks on every projection, for one call."""
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names = {"adapter_names": ["default", "other"]}
    model.eval()
    expected = gradients(model, **names)
    fuse(model)
    found = gradients(model, **names)
    assert not runs
    assert any("self_attn.q_proj has hooks" in line for line in said)
    assert torch.equal(found[0], expected[0])
    gradients(model)
    assert len(runs) == 2


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_of_the_wrong_shape_is_upstreams_error(part, runs, said):
    model = lora_model()
    fuse(model)
    gradients(model)
    revert(model)
    getattr(q_of(model), part)["default"].weight = nn.Parameter(torch.randn(5, 40))
    with pytest.raises(RuntimeError) as expected:
        gradients(model)
    fuse(model)
    with pytest.raises(RuntimeError) as found:
        gradients(model)
    assert str(found.value) == str(expected.value)
    assert any("the adapter of self_attn.q_proj has shapes" in line for line in said)


def test_a_weight_that_is_elsewhere(runs, said):
    model = lora_model()
    fuse(model)
    gradients(model)
    runs.clear()
    q_of(model).base_layer.to("meta")
    with torch.no_grad():
        model(input_ids=batch())
    assert len(runs) <= 1
    assert any("the weight of self_attn.q_proj is on meta, the input on cpu" in line for line in said)


@pytest.mark.parametrize("kind", [nn.Linear, "lora"])
def test_a_class_whose_forward_somebody_replaces(kind, runs, said, monkeypatch):
    """Even if it is replaced after the first forward, and passes for the original by its names."""
    import functools

    model = lora_model()
    fuse(model)
    gradients(model)
    assert len(runs) == 2
    kind = type(q_of(model)) if kind == "lora" else kind
    original, calls = kind.forward, []

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    gradients(model)
    assert len(runs) == 2
    assert calls
