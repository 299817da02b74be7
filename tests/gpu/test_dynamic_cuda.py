"""Dynamic 4-bit on a card: what is decided there is what stock transformers load, written or on the fly."""

import pytest
import torch
from tiny_models import ids, logits, save_model
from transformers import AutoModelForCausalLM

from sloth_plugins import FastLanguageModel
from sloth_plugins.quantization import measure, on_the_fly, quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

bitsandbytes = pytest.importorskip("bitsandbytes")

BUDGET = "30%"
SHORT = {"samples": 4, "length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return quantize(model, folder / "out", budget=BUDGET, cache=folder / "cache", **SHORT)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cuda:0"}).eval()


def paths(model, kind):
    return {name for name, module in model.named_modules() if type(module) is kind}


def rows():
    return ids(rows=5, length=37).cuda()


def test_exactly_the_listed_modules_stay_in_16_bits(made):
    loaded = load(made.folder)
    every = {linear.name for linear in made.decision.measurement.linears}
    assert 0 < len(made.decision.kept) < len(every)
    assert paths(loaded, torch.nn.Linear) == made.decision.kept | {"lm_head"}
    assert paths(loaded, bitsandbytes.nn.Linear4bit) == every - made.decision.kept
    assert all(parameter.device.type == "cuda" for parameter in loaded.parameters())


def test_loading_on_the_fly_computes_the_same(model, made, monkeypatch):
    monkeypatch.setattr(on_the_fly, "SAMPLES", SHORT["samples"])
    monkeypatch.setattr(on_the_fly, "LENGTH", SHORT["length"])
    written = logits(load(made.folder), rows())
    loaded, _ = FastLanguageModel.from_pretrained(str(model), 64, torch.bfloat16, load_in_4bit=f"dynamic:{BUDGET}")
    found = logits(loaded.eval(), rows())
    assert written.isfinite().all()
    assert torch.equal(found, written)
    plain = logits(load(model), rows())
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.5


def test_scores_are_those_of_the_cpu(model, made, tmp_path):
    """Not to the last bit: products are summed in another order, and tokens drawn by another generator."""
    there = measure(model, device="cpu", cache=tmp_path, **SHORT)
    for ours, theirs in zip(made.decision.measurement.linears, there.linears, strict=True):
        assert ours.packed_bytes == theirs.packed_bytes
        assert ours.scores["weight"] == pytest.approx(theirs.scores["weight"], rel=0.02)
        assert ours.scores["activation"] == pytest.approx(theirs.scores["activation"], rel=0.1)
