"""Four-bit base weights: gradients are those of a dense model that holds the same, dequantised numbers."""

import copy

import pytest
import torch
from lora_models import KNOWN, assert_every_policy, batch, distance, fuse, gradients
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

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


def quantised(architecture="llama", dense=(), compute_dtype=torch.float32, **options):
    """A four-bit model, and a dense one with the same weights; both without adapters."""
    sizes = {**SIZES, "num_attention_heads": 4}
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


def with_adapters(model):
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).train()


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
