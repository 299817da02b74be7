"""`load_in_4bit="dynamic"`: the loader gives a stock model in 4 bits, but for what the measurement keeps."""

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sloth_plugins import FastLanguageModel
from sloth_plugins.export.formats import NF4
from sloth_plugins.quantization import dynamic_config, measuring, on_the_fly, quantize, rounding_pass

SHORT = {"samples": 4, "length": 32}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few samples, as a whole measurement is tested elsewhere."""
    monkeypatch.setattr(on_the_fly, "SAMPLES", SHORT["samples"])
    monkeypatch.setattr(on_the_fly, "LENGTH", SHORT["length"])


def in_16_bits(model):
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def listed(names, model):
    """Those of a skip list that the model has; joint projections are listed too, for programs that make them."""
    return set(names) & {name for name, _ in model.named_modules()}


def test_what_is_decided_is_loaded(model):
    loaded, tokenizer = FastLanguageModel.from_pretrained(str(model), 64, load_in_4bit="dynamic:30%")
    config = loaded.config.quantization_config
    wanted = dynamic_config(model, budget="30%", **SHORT).llm_int8_skip_modules
    assert config.llm_int8_skip_modules == wanted
    kept = in_16_bits(loaded)
    assert kept == listed(wanted, loaded)
    assert "lm_head" in kept
    assert len(kept) > 1
    four = [module for module in loaded.modules() if type(module) is bitsandbytes.nn.Linear4bit]
    assert len(four) == 3 * 7 - (len(kept) - 1)
    assert {module.compute_dtype for module in four} == {torch.float32}
    assert tokenizer.model_max_length == 64


def test_the_default_budget(model):
    loaded, _ = FastLanguageModel.from_pretrained(str(model), load_in_4bit="dynamic")
    assert in_16_bits(loaded) == listed(dynamic_config(model, **SHORT).llm_int8_skip_modules, loaded)


def test_adapters_on_it_train(model):
    loaded, _ = FastLanguageModel.from_pretrained(str(model), load_in_4bit="dynamic:30%")
    loaded = FastLanguageModel.get_peft_model(loaded, r=4)
    ids = torch.arange(16)[None]
    loss = loaded(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def four_bit(model):
    return {
        name.replace(".base_layer", ""): module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def test_its_values_are_those_of_a_checkpoint(model, tmp_path):
    """With adapters too, which were saved by the base's name."""
    made = quantize(model, tmp_path / "made", budget="30%", **SHORT)
    expected = four_bit(AutoModelForCausalLM.from_pretrained(made.folder, device_map="cpu"))
    nearest = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=made.decision.skip)
    nearest = four_bit(AutoModelForCausalLM.from_pretrained(model, quantization_config=nearest, device_map="cpu"))
    loaded, _ = FastLanguageModel.from_pretrained(str(model), load_in_4bit="dynamic:30%")
    FastLanguageModel.get_peft_model(loaded, r=4).save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), load_in_4bit="dynamic:30%")
    assert isinstance(again, PeftModel)
    for one in (loaded, again.get_base_model()):
        found = four_bit(one)
        assert found.keys() == expected.keys() == nearest.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(torch.equal(expected[name], nearest[name]) for name in expected)


def test_values_are_chosen_once_for_each_choice(model, monkeypatch):
    passes = []
    own = rounding_pass.round_layers
    monkeypatch.setattr(rounding_pass, "round_layers", lambda *args: (passes.append(args[2]), own(*args)))
    for budget in ("30%", "30%", "0", "0"):
        FastLanguageModel.from_pretrained(str(model), load_in_4bit=f"dynamic:{budget}")
    assert len(passes) == 2
    assert passes[1] == frozenset()
    kept = [path.parent.name for path in measuring.cache_folder().rglob("*.safetensors") if "rounded-" in str(path)]
    assert set(kept) == {rounding_pass.pass_name(())}
    assert len(kept) == 3 * 7


def test_layers_that_are_not_there_are_told(model, monkeypatch):
    lines = []
    monkeypatch.setattr(on_the_fly, "say", lines.append)
    made = on_the_fly.OnTheFly.decided(model, "0")
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=made.config(torch.float32))
    made.put_values(loaded)
    assert lines == []
    loaded.model.layers[1].mlp.up_proj = torch.nn.Identity()
    made.put_values(loaded)
    assert lines == [
        "1 of 21 linear layers keep the nearest 4-bit values: "
        "as loaded the model has no 4-bit model.layers.1.mlp.up_proj"
    ]
