"""Four-bit base weights: gradients are those of a dense model that holds the same, dequantised numbers."""

import copy

import pytest
import torch
from lora_models import KNOWN, assert_every_policy, batch, distance, fuse, gradients
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from sloth_plugins.patches.blocks import decoder_layer, joint_group
from sloth_plugins.patches.blocks.policy import Policy
from sloth_plugins.testing import tiny_model

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
# Rows are multiples of every blocksize used: for others bitsandbytes' CPU kernel begins a new block with each row.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes compiles its fallbacks, anew for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def projections(model):
    for module in [m for m in model.modules() if type(m).__name__.endswith(("Attention", "MLP"))]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                yield module, name, child


def quantised(architecture="llama", dense=(), compute_dtype=torch.float32, sizes=None, **options):
    """A four-bit model, and a dense one with the same weights; both without adapters."""
    sizes = {**SIZES, "num_attention_heads": 4, **(sizes or {})}
    if architecture in ("phi", "phi3"):
        del sizes["head_dim"]
    model = tiny_model(KNOWN.architectures[architecture], architecture, **sizes)
    model.config.use_cache = False
    exact = copy.deepcopy(model)
    settings = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": False, **options}
    for (module, name, linear), (_, _, plain) in zip(projections(model), projections(exact), strict=True):
        if name in dense:
            continue
        blocksize = settings["blocksize"]
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=compute_dtype,
            quant_type=settings["quant_type"], compress_statistics=settings["compress_statistics"],
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, blocksize=blocksize,
            compress_statistics=settings["compress_statistics"], quant_type=settings["quant_type"], module=layer,
        )  # fmt: skip
        layer.bias = linear.bias
        layer = layer.to("cpu")
        setattr(module, name, layer)
        assert layer.weight.dtype is torch.uint8
        values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.weight.data.copy_(values)
    return model, exact


def with_adapters(model, r=4, **options):
    torch.manual_seed(7)
    given = {"lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(r=r, **given)).train()


STATES = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "double": {"compress_statistics": True},
    "blocksize 128": {"blocksize": 128},
    "double, 128, fp4": {"compress_statistics": True, "blocksize": 128, "quant_type": "fp4"},
    "some dense": {"dense": ("q_proj", "up_proj")},
    "only down": {"dense": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")},
}


def assert_gradients_are_the_dense_models(model, exact, runs):
    assert_every_policy(with_adapters(model), runs, gradients(with_adapters(exact)))


@pytest.mark.parametrize("state", STATES)
def test_gradients(state, runs):
    assert_gradients_are_the_dense_models(*quantised(**STATES[state]), runs)


@pytest.mark.parametrize("architecture", ["phi3", "phi", "qwen2", "gemma2"])
def test_other_layouts(architecture, runs):
    assert_gradients_are_the_dense_models(*quantised(architecture), runs)


def groups(model):
    """The groups of the first layer's last reading."""
    (layer,) = [module for module in model.modules() if module in decoder_layer._readings][:1]
    return decoder_layer._readings[layer][0][2].groups


WITH_ROOM = {
    "all": ({}, {}),
    "some": ({"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}, {}),
    "other ranks and scales": ({"rank_pattern": {"k_proj": 16}, "alpha_pattern": {"v_proj": 3}}, {}),
    "mixed with dense": ({}, {"dense": ("k_proj", "down_proj")}),
    "odd ranks": ({"rank_pattern": {"k_proj": 5, "down_proj": 3}}, {}),
}


@pytest.mark.parametrize("case", WITH_ROOM)
def test_low_rank_terms_inside_the_products(case, runs):
    options, state = WITH_ROOM[case]
    model, exact = (with_adapters(model, 8, **options) for model in quantised(**state))
    assert_every_policy(model, runs, gradients(exact))
    assert [group.room for group in groups(model)] == {
        "all": [24, 8, 16, 8], "some": [16, 0, 8, 8], "other ranks and scales": [32, 8, 16, 8],
        "mixed with dense": [0, 8, 16, 0], "odd ranks": [0, 8, 16, 0],
    }[case]  # fmt: skip


@pytest.mark.parametrize("architecture", ["phi3", "phi", "qwen2", "qwen3", "gemma2"])
def test_low_rank_terms_inside_the_products_of_other_layouts(architecture, runs):
    model, exact = (with_adapters(model, 8) for model in quantised(architecture))
    assert_every_policy(model, runs, gradients(exact))
    assert all(group.room == group.r > 0 for group in groups(model))


def test_dropout_beside_products_with_room(runs, monkeypatch):
    """The input's gradient is dropped as the input was, which no product can do."""
    model = with_adapters(quantised()[0], 8, lora_dropout=0.5)
    fuse(model)
    torch.manual_seed(3)
    found = gradients(model)
    assert [group.room for group in groups(model)] == [24, 8, 16, 8]
    monkeypatch.setattr(joint_group, "STEP", 5)
    decoder_layer._readings.clear()
    torch.manual_seed(3)
    expected = gradients(model)
    assert not any(group.room for group in groups(model))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert distance(found[1], expected[1]) < 1e-5
    assert len(runs) == 4


def test_bitsandbytes_own_backward_agrees(runs):
    model = with_adapters(quantised()[0])
    expected = gradients(model)[1]
    fuse(model)
    assert distance(gradients(model)[1], expected) < 1e-5
    assert len(runs) == 2


def test_a_weight_that_was_quantised_anew(runs):
    """What is remembered of a quant state must not outlive it."""
    model = with_adapters(quantised()[0])
    fuse(model)
    gradients(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = bnb.nn.Params4bit(torch.randn(128, 128), requires_grad=False, quant_type="fp4")
    layer.weight = layer.weight.to("cpu")
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found = gradients(model)
    dense = nn.Linear(128, 128, bias=False).requires_grad_(False)
    dense.weight.data.copy_(values)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer = dense
    expected = gradients(model)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert distance(found[1], expected[1]) < 1e-5
    assert len(runs) == 6


def test_a_compute_dtype_that_is_not_the_inputs(runs, said):
    model = with_adapters(quantised(compute_dtype=torch.bfloat16)[0])
    expected = gradients(model)
    fuse(model)
    found = gradients(model)
    assert not runs
    assert any("q_proj computes in torch.bfloat16, its input is in torch.float32" in line for line in said)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prepared_for_training_under_autocast(compute_dtype, checkpointing, runs):
    """peft makes everything else fp32, norms and residual stream too; products are in autocast's dtype."""
    model, exact = quantised(compute_dtype=compute_dtype)
    # What peft recognises a four-bit model by.
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model, exact = with_adapters(model), with_adapters(exact)

    def measured(model):
        found = [gradients(model, batch(seed=seed)) for seed in range(6)]
        return torch.cat([grad.flatten() for _, grads in found for grad in grads.values()]), found

    truth, _ = measured(exact)
    with torch.autocast("cpu", torch.bfloat16):
        stock, expected = measured(model)
        fuse(model)
        ours, found = measured(model)
    assert [run.policy for run in runs] == [Policy.INPUT if checkpointing else Policy.KEEP] * 12
    assert all(run.dtype is torch.bfloat16 for run in runs)
    assert all(grad.dtype is torch.float32 for _, grads in found for grad in grads.values())
    for (loss, _), (expected_loss, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    assert (ours - truth).norm() <= 1.15 * (stock - truth).norm()


def test_rows_that_bitsandbytes_reads_otherwise_on_a_cpu_are_left_to_it(runs, said, monkeypatch):
    monkeypatch.setitem(SIZES, "intermediate_size", 144)
    model, _ = quantised()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    expected = gradients(model)[1]
    fuse(model)
    assert distance(gradients(model)[1], expected) < 1e-6
    assert not runs
    assert any("mlp.down_proj, whose rows are no whole blocks" in line for line in said)
