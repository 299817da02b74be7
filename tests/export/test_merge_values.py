"""W + delta against float64, for every way in which a base may be stored: at most one rounding to bf16."""

import pytest
import torch
from adapted_models import LINEAR, QUANTISED, adapt, load, save_base

from sloth_plugins.export import merge, open_weights

LAYER = "model.layers.1.mlp.down_proj"
# Half a step of bfloat16's 8 bits, and the steps of the fp32 sums before it.
ROUNDING = 2**-8
SUMS = 2**-22
STORED = [None, *QUANTISED]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("values") / "base", tie_word_embeddings=False)


def exact(weight):
    """A stored weight in float64, by bitsandbytes' definition and not by its code."""
    if type(weight).__name__ == "Int8Params":
        return weight.data.double() * weight.SCB.double()[:, None] / 127
    if type(weight).__name__ != "Params4bit":
        return weight.detach().double()
    state = weight.quant_state
    scales = state.absmax.double()
    if state.nested:
        groups = state.state2.code.double()[state.absmax.long()].reshape(-1)
        blocks = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: groups.numel()]
        scales = groups * blocks + state.offset.double()
    packed = weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).long()
    values = state.code.double()[codes]
    return (values.reshape(-1, state.blocksize) * scales[:, None]).reshape(state.shape)


def truth(model, layer=LAYER):
    """W, delta and the sum of the magnitudes that delta is made of, in float64."""
    module = model.get_submodule(f"base_model.model.{layer}")
    a, b = (getattr(module, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
    scaling = module.scaling["default"]
    return exact(module.base_layer.weight), b @ a * scaling, b.abs() @ a.abs() * scaling


def assert_within(found, truth, rounding):
    weight, delta, summed = truth
    error = (found.double() - (weight + delta)).abs()
    allowed = rounding * (weight + delta).abs() + SUMS * (weight.abs() + summed)
    assert bool((error <= allowed).all()), (error / allowed).max()


@pytest.mark.parametrize("stored", STORED)
def test_a_live_model_is_merged_with_one_rounding(base, tmp_path, stored):
    model = adapt(load(base, stored))
    expected = truth(model)
    name = f"{LAYER}.weight"
    assert_within(open_weights(model).read(name), expected, 0)
    assert_within(open_weights(merge(model, tmp_path / "out")).read(name), expected, ROUNDING)


@pytest.mark.parametrize("stored", STORED)
def test_a_run_on_a_saved_base_is_merged_to_the_same_bytes(base, tmp_path, stored):
    model = load(base, stored)
    model.save_pretrained(tmp_path / "base")
    model = adapt(model)
    model.save_pretrained(tmp_path / "run")
    expected = truth(model)
    found = open_weights(merge(tmp_path / "run", tmp_path / "out", base=tmp_path / "base"))
    assert_within(found.read(f"{LAYER}.weight"), expected, ROUNDING)
    live = open_weights(merge(model, tmp_path / "live"))
    assert found.shapes().keys() == live.shapes().keys()
    assert all(torch.equal(found.read(name), live.read(name)) for name in live.shapes())


@pytest.mark.parametrize("settings", [{}, {"torch": "medium"}, {"autocast": True}], ids=["plain", "medium", "autocast"])
def test_what_training_has_set_does_not_coarsen_it(base, settings):
    model = adapt(load(base, "nf4"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(settings.get("torch", before))
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in settings):
            found = open_weights(model).read(f"{LAYER}.weight")
        assert torch.get_float32_matmul_precision() == settings.get("torch", before)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_within(found, truth(model), 0)
    assert not found.requires_grad


@pytest.mark.parametrize("stored", ["nf4", "nf4 twice"])
def test_a_weight_that_inference_on_a_cpu_has_reordered_is_read(base, stored):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = adapt(load(base, stored))
    weight, delta, _ = truth(model)
    layer = model.get_submodule(f"base_model.model.{LAYER}").base_layer
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    held = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    found = open_weights(model).read(f"{LAYER}.weight")
    # bitsandbytes has rounded the scales to bf16, and so every weight by as much.
    assert bool(((found.double() - weight - delta).abs() <= ROUNDING * weight.abs() + SUMS).all())
    assert torch.equal(held[0], layer.weight.data)
    assert torch.equal(held[1], layer.weight.quant_state.absmax)


def test_a_model_that_has_run_in_eight_bits_is_read(base):
    model = adapt(load(base, "int8"))
    expected = truth(model)
    model(input_ids=torch.arange(8)[None])
    assert_within(open_weights(model).read(f"{LAYER}.weight"), expected, 0)


def test_reading_leaves_the_model_alone(base):
    model = adapt(load(base, "nf4 twice"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = open_weights(model)
    for name in weights.shapes():
        weights.read(name).zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_in_16_bits_are_multiplied_in_32(base):
    model = adapt(load(base)).to(torch.bfloat16)
    assert_within(open_weights(model).read(f"{LAYER}.weight"), truth(model), 0)


@pytest.mark.parametrize("scale", ["lora_alpha", "rslora"])
def test_the_scaling_of_a_folder_is_that_of_the_model(base, tmp_path, scale):
    options = {"use_rslora": True} if scale == "rslora" else {"lora_alpha": 3}
    patterns = {"rank_pattern": {"down_proj": 7, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {".*down_proj": 5}}
    model = adapt(load(base), **options, **patterns)
    model.save_pretrained(tmp_path / "run")
    folder = open_weights(tmp_path / "run", base)
    for module in [LAYER, *(f"model.layers.0.self_attn.{name}" for name in LINEAR[:4]), "model.layers.0.mlp.up_proj"]:
        assert_within(folder.read(f"{module}.weight"), truth(model, module), 0)
