"""States of adapters and of a model that are no reason for upstream's forward."""

import pytest
import torch
from lora_models import assert_every_policy, batch, distance, fuse, gradients, lora_model
from peft import LoraConfig

from sloth_plugins.patches.blocks.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def assert_fused_as_stock(model, runs, policies=tuple(Policy)):
    assert_every_policy(model, runs, gradients(model), policies)


CONFIGS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "only v": {"target_modules": ["v_proj"]},
    "only o": {"target_modules": ["o_proj"]},
    "only the attention": {"target_modules": ATTENTION},
    "only the MLP": {"target_modules": MLP},
    "only gate": {"target_modules": ["gate_proj"]},
    "only up": {"target_modules": ["up_proj"]},
    "only down": {"target_modules": ["down_proj"]},
    "only the first layer": {"target_modules": ATTENTION + MLP, "layers_to_transform": [0]},
    "only the second layer": {"target_modules": ATTENTION + MLP, "layers_to_transform": [1]},
    "rsLoRA": {"use_rslora": True},
    "scale 1": {"lora_alpha": 4},
    "different ranks": {
        "rank_pattern": {"q_proj": 2, "v_proj": 7, "up_proj": 3, "o_proj": 1},
        "alpha_pattern": {"k_proj": 5, "gate_proj": 9},
    },
    "high ranks": {"r": 80},
    "rank 1": {"r": 1, "lora_alpha": 1},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_configs(config, runs):
    assert_fused_as_stock(lora_model(**CONFIGS[config]), runs)


@pytest.mark.parametrize("family", ["phi3", "phi", "gemma2", "qwen3"])
@pytest.mark.parametrize("part", ["qkv_proj|q_proj", "gate_up_proj|fc1|up_proj", "down_proj|fc2"])
def test_one_adapter_in_other_layouts(family, part, runs):
    assert_fused_as_stock(lora_model(family, family, target_modules=rf".*({part})"), runs)


@pytest.mark.parametrize("needs_input", [True, False], ids=["input needs grad", "frozen input"])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "mlp.", "self_attn", "layers.0", "layers.1", "q_proj.lora_A"])
def test_frozen_parts(frozen, needs_input, runs):
    model = lora_model()
    if needs_input:
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    assert_fused_as_stock(model, runs)
    assert not [name for name in gradients(model)[1] if frozen in name]


def test_the_input_gets_its_gradient(runs):
    model = lora_model()
    embedded = torch.randn(2, 9, 48)

    def input_gradient():
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, labels=batch(2, 9)).loss.backward()
        return x.grad

    expected = input_gradient()
    fuse(model)
    torch.testing.assert_close(input_gradient(), expected)
    with model.disable_adapter():
        assert (input_gradient() - expected).norm() > 0.01 * expected.norm()
    assert len(runs) == 4


def two_adapters():
    model = lora_model()
    other = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    return model


def outputs(model):
    """What a model computes in each of the states that a trainer goes through, in an order that mixes them."""
    model.set_adapter("default")
    found = [gradients(model)]
    with model.disable_adapter(), torch.no_grad():
        found.append((model(input_ids=batch()).logits, {}))
    found.append(gradients(model, batch(1, 7)))
    model.set_adapter("other")
    found.append(gradients(model))
    model.eval()
    with torch.no_grad():
        found.append((model(input_ids=batch()).logits, {}))
    model.train()
    with torch.inference_mode():
        found.append((model(input_ids=batch()).logits, {}))
    model.set_adapter("default")
    found.append(gradients(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    found.append(gradients(model))
    return found


def test_from_one_state_to_the_next(runs):
    expected = outputs(two_adapters())
    model = two_adapters()
    fuse(model)
    found = outputs(model)
    assert len(runs) == 2 * len(expected)
    for i, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours[0], stock[0], msg=lambda text, i=i: f"state {i}: {text}")
        assert not stock[1] or distance(ours[1], stock[1]) < 5e-5
    assert (expected[0][0] - expected[3][0]).abs() > 1e-4, "the adapters differ"


def test_eval_is_fused_with_gradients(runs):
    model = lora_model(lora_dropout=0.5).eval()
    assert_fused_as_stock(model, runs)


def test_merged_and_unmerged(runs, said):
    model = lora_model()
    expected = gradients(model)[1]
    fuse(model)
    model.merge_adapter()
    with torch.no_grad():
        merged = model(input_ids=batch()).logits
    assert not runs
    assert any("is merged" in line for line in said)
    model.unmerge_adapter()
    assert distance(gradients(model)[1], expected) < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch()).logits, merged, rtol=1e-3, atol=1e-4)
    assert len(runs) == 4


def test_a_merged_adapter_that_is_disabled_is_unmerged(runs):
    model = lora_model()
    ids = batch()
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
    fuse(model)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not runs
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(runs) == 2


def test_hooks_of_the_layer_see_and_change_it(runs):
    """A layer's own hooks run around its forward, so what they change counts, with checkpointing as without."""
    results = []
    for fused in (False, True):
        for checkpointing in (False, True):
            model = lora_model()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            layer = model.base_model.model.model.layers[1]
            layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
            layer.register_forward_hook(lambda module, args, output: 3 * output)
            if fused:
                fuse(model)
            results.append(gradients(model))
    assert [run.policy for run in runs] == [Policy.KEEP] * 2 + [Policy.INPUT] * 2
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        assert distance(found, results[0][1]) < 1e-5


def test_a_reference_model_of_its_own_is_read_once(runs, monkeypatch):
    """Preference trainers switch adapters off and on in every step."""
    from sloth_plugins.patches.blocks import decoder_layer

    model = lora_model()
    fuse(model)
    reads = []
    read = decoder_layer.read_layer
    monkeypatch.setattr(decoder_layer, "read_layer", lambda *args: (reads.append(1), read(*args))[1])
    outputs = []
    for _ in range(3):
        outputs.append(model(input_ids=batch()).logits)
        with torch.no_grad(), model.disable_adapter():
            outputs.append(model(input_ids=batch()).logits)
    assert len(runs) == 12
    assert len(reads) == 4
    assert not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(outputs[i], outputs[i % 2]) for i in range(6))
