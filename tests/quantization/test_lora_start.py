"""Adapters that begin as what quantisation has lost: as good as their theory, and never on another base."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sloth_plugins.errors import SlothError
from sloth_plugins.export import merge
from sloth_plugins.quantization import load_with_adapter, quantize
from sloth_plugins.quantization.lora import Start, _factors, _low_rank
from sloth_plugins.quantization.packing import Packing

PACKING = Packing(dtype=torch.bfloat16)
RANK = 8


@pytest.fixture
def weight():
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(2)).bfloat16().float()


def lost(weight):
    return weight - PACKING.pack(weight).dequantised(weight)


def test_svd_is_the_best_approximation_of_its_rank(weight):
    factors = _factors(weight, torch.ones(128), Start("svd", RANK), PACKING)
    error = lost(weight)
    left = float((error - factors["B"] @ factors["A"]).norm())
    best = float(torch.linalg.svdvals(error.double())[RANK:].square().sum().sqrt())
    assert best <= left <= 1.02 * best
    assert not factors["shift.A"].any()


def test_qera_is_the_best_for_inputs_of_unequal_size(weight):
    scale = torch.rand(128, generator=torch.Generator().manual_seed(3)) * 10
    error = lost(weight)
    down, up = _low_rank(error, scale, RANK)
    best = float(torch.linalg.svdvals((error * scale).double())[RANK:].square().sum().sqrt())
    qera = float(((error - up @ down) * scale).norm())
    plain_down, plain_up = _low_rank(error, torch.ones(128), RANK)
    assert best <= qera <= 1.02 * best
    assert qera < 0.95 * float(((error - plain_up @ plain_down) * scale).norm())


def test_an_input_that_is_always_zero_leaves_all_finite(weight):
    scale = torch.ones(128)
    scale[5] = 0
    down, up = _low_rank(lost(weight), scale, RANK)
    assert torch.isfinite(down).all()
    assert torch.isfinite(up).all()


def test_loftq_loses_less_than_one_round(weight):
    def left(init):
        f = _factors(weight, torch.ones(128), Start(init, RANK), PACKING)
        base = PACKING.pack(weight - f["shift.B"] @ f["shift.A"]).dequantised(weight)
        return float((weight - base - f["B"] @ f["A"]).norm())

    assert left("loftq") < left("svd") < float(lost(weight).norm())


def test_a_rank_beyond_the_weight_begins_with_nothing(weight):
    down, up = _low_rank(lost(weight), torch.ones(128), 200)
    assert (down.shape, up.shape) == ((200, 128), (96, 200))
    assert torch.allclose(up @ down, lost(weight), atol=1e-4)
    assert not up[:, 96:].any()
    assert down[96:].any(1).all()  # or gradients of both would be zero for ever


@pytest.mark.parametrize("init", ["svd", "qera", "loftq"])
def test_a_is_as_large_as_peft_draws_it(weight, init):
    scale = torch.rand(128, generator=torch.Generator().manual_seed(3)) + 0.1
    down = _factors(weight, scale, Start(init, RANK), PACKING)["A"]
    drawn = torch.nn.init.kaiming_uniform_(torch.empty(4096, 128), a=5**0.5)
    assert torch.allclose(down.norm(dim=1), drawn.norm(dim=1).mean(), rtol=0.01)


def test_random_numbers_of_the_caller_stay(weight):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _low_rank(lost(weight), torch.ones(128), RANK)
    assert torch.equal(torch.rand(3), expected)


def test_a_weight_that_loses_nothing_begins_with_nothing():
    down, up = _low_rank(torch.zeros(96, 128), torch.ones(128), RANK)
    assert torch.isfinite(down).all()
    assert down.any(1).all()
    assert not up.any()


@pytest.fixture
def made(model, tmp_path, options):
    return quantize(model, tmp_path / "out", init="qera", rank=4, **options).folder


def run_of(made, tmp_path):
    """The adapter as PEFT saves it after training."""
    both = load_with_adapter(made, device_map="cpu")
    both.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_the_adapter_names_its_base_and_layers_in_16_bits_begin_with_nothing(made):
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.resolve())
    both = load_with_adapter(made, device_map="cpu")
    kept = json.loads((made / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    for name, module in both.named_modules():
        if hasattr(module, "lora_B"):
            starts_from_zero = not module.lora_B["default"].weight.any()
            assert starts_from_zero == (name.removeprefix("base_model.model.") in kept), name
            assert module.scaling["default"] == 1


def test_after_training_it_is_merged_with_its_own_base_alone(model, made, tmp_path):
    run = run_of(made, tmp_path)
    merge(run, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    both = load_with_adapter(made, device_map="cpu").merge_and_unload()
    name = "model.layers.0.self_attn.o_proj.weight"
    assert merged.state_dict()[name].shape == (64, 64)
    assert both is not None
    with pytest.raises(SlothError, match=r"was begun from the quantisation error of a 4-bit model that .* is not"):
        merge(run, tmp_path / "wrong", base=model)
    assert not (tmp_path / "wrong").exists()


def test_the_merged_weight_is_nearer_to_the_original_than_the_4_bit_one(model, made, tmp_path):
    merge(run_of(made, tmp_path), tmp_path / "merged", dtype="float32")
    merge(made, tmp_path / "base", dtype="float32")
    original, merged, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (model, tmp_path / "merged", tmp_path / "base")
    )
    far = {name: float((base[name] - original[name]).norm()) for name in original}
    changed = [name for name in far if far[name] > 0]
    assert len(changed) >= 12
    assert all(float((merged[name] - original[name]).norm()) < far[name] for name in changed)


def test_another_quantisation_in_the_same_place_is_not_its_base(model, made, tmp_path, options):
    run = run_of(made, tmp_path)
    quantize(model, made, budget="0", force=True, **options)
    with pytest.raises(SlothError, match="is not; name the folder"):
        merge(run, tmp_path / "wrong")


def test_parts_of_two_makings_are_refused(model, made, tmp_path, options):
    other = quantize(model, tmp_path / "other", init="loftq", rank=4, **options).folder
    (made / "adapter").rename(tmp_path / "adapter")
    (other / "adapter").rename(made / "adapter")
    with pytest.raises(SlothError, match="was not made for the model in"):
        load_with_adapter(made, device_map="cpu")
    (made / "adapter").rename(tmp_path / "gone")
    with pytest.raises(SlothError, match="has no adapter; write it by"):
        load_with_adapter(made, device_map="cpu")


def test_plain_peft_loads_it(made):
    base = AutoModelForCausalLM.from_pretrained(made, device_map="cpu")
    assert PeftModel.from_pretrained(base, made / "adapter").peft_config["default"].r == 4


def test_adapters_of_their_own_start_fit_any_base():
    from sloth_plugins.export.adapter import base_mark_of

    assert base_mark_of({"alpha_pattern": {"layers.0": 3}}) is None
    assert base_mark_of({"alpha_pattern": {"q_proj|sloth_plugins_base_ab12": 3}}) == "ab12"
