"""`load_in_4bit="dynamic"`: the loader gives a stock model in 4 bits, but for what the measurement keeps."""

import bitsandbytes
import pytest
import torch

from sloth_plugins import FastLanguageModel
from sloth_plugins.quantization import decision

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few samples, as a whole measurement is tested elsewhere."""
    measure = decision.measure
    monkeypatch.setattr(decision, "measure", lambda *args, **kw: measure(*args, **kw | {"samples": 4, "length": 32}))


def in_16_bits(model):
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def listed(names, model):
    """Those of a skip list that the model has; joint projections are listed too, for programs that make them."""
    return set(names) & {name for name, _ in model.named_modules()}


def test_what_is_decided_is_loaded(model):
    loaded, tokenizer = FastLanguageModel.from_pretrained(str(model), 64, load_in_4bit="dynamic:30%")
    config = loaded.config.quantization_config
    wanted = decision.dynamic_config(model, budget="30%").llm_int8_skip_modules
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
    assert in_16_bits(loaded) == listed(decision.dynamic_config(model).llm_int8_skip_modules, loaded)


def test_adapters_on_it_train(model):
    loaded, _ = FastLanguageModel.from_pretrained(str(model), load_in_4bit="dynamic:30%")
    loaded = FastLanguageModel.get_peft_model(loaded, r=4)
    ids = torch.arange(16)[None]
    loss = loaded(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
