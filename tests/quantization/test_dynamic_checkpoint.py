"""What `quantize` writes, as stock transformers and PEFT load it, and the config for loading on the fly."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import LINEAR, ids, logits, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sloth_plugins.errors import SlothError
from sloth_plugins.export import open_weights
from sloth_plugins.quantization import dynamic_config, load_with_adapter, measure, quantize
from sloth_plugins.quantization.packing import Packing


def kinds(model):
    """Paths of linear layers by what they are."""
    found = {"Linear": set(), "Linear4bit": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[type(module).__name__].add(name)
    return found


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


@pytest.fixture
def made(model, tmp_path, options):
    return quantize(model, tmp_path / "out", budget="12%", **options)


def test_exactly_the_listed_modules_stay_in_16_bits(made):
    loaded = load(made.folder)
    kept = made.decision.kept
    assert kept
    assert kinds(loaded)["Linear"] == kept | {"lm_head"}
    assert len(kinds(loaded)["Linear4bit"]) == 3 * 7 - len(kept)
    listed = json.loads((made.folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert listed == made.decision.skip == sorted(listed)
    assert kept | {"lm_head"} <= set(listed)


@pytest.fixture
def nearest(model, tmp_path, options):
    return quantize(model, tmp_path / "nearest", budget="12%", rounding="nearest", **options)


def test_weights_are_what_bitsandbytes_makes_of_them_or_untouched(model, nearest):
    original, written = open_weights(model), open_weights(nearest.folder)
    assert written.shapes() == original.shapes()
    in_4_bits = {f"{name}.weight" for name in kinds(load(nearest.folder))["Linear4bit"]}
    assert in_4_bits
    for name in original.shapes():
        expected = original.read(name)
        if name in in_4_bits:
            expected = Packing(dtype=torch.bfloat16).pack(expected).dequantised(expected)
        assert torch.equal(written.read(name).bfloat16(), expected), name


def test_by_its_config_stock_transformers_load_the_same_weights(model, nearest, options):
    config = dynamic_config(model, budget="12%", **options)
    assert config.llm_int8_skip_modules == nearest.decision.skip
    loaded, written = load(model, quantization_config=config), load(nearest.folder)
    assert kinds(loaded) == kinds(written)
    assert torch.equal(logits(loaded), logits(written))


def test_bytes_are_those_of_the_file(made):
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - no mapping
    decision = made.decision
    assert decision.total == stored
    assert 0 < decision.extra <= decision.budget == int(0.12 * decision.measurement.all_four_bit)


def test_of_a_larger_budget_more_is_kept_and_less_is_lost(model, tmp_path, options):
    costs = [quantize(model, tmp_path / str(b), budget=f"{b}%", **options).decision.cost() for b in (0, 10, 40)]
    assert costs[0] > costs[1] > costs[2]
    assert quantize(model, tmp_path / "none", budget="0", **options).decision.skip == ["lm_head"]


def test_the_report_says_what_and_why(made):
    report = json.loads((made.folder / "quantization_report.json").read_text())
    kept = {name for name, module in report["modules"].items() if module["bits"] == 16}
    assert kept == made.decision.kept
    assert report["llm_int8_skip_modules"] == made.decision.skip
    assert report["bytes"]["total"] == made.decision.total
    total = sum(module["scores"]["fisher"] for module in report["modules"].values())
    assert report["cost"]["all_4_bit"] == pytest.approx(total)
    assert (made.folder / "quantization_report.png").read_bytes().startswith(b"\x89PNG")
    table = (made.folder / "quantization_report.txt").read_text()
    assert all(name.rpartition(".")[2] in table for name in kept)


def test_without_matplotlib_the_numbers_are_still_there(model, tmp_path, options, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = quantize(model, tmp_path / "out", **options)
    assert sorted(path.suffix for path in made.folder.glob("quantization_report.*")) == [".json", ".txt"]


def test_peft_trains_it_and_its_tokenizer_is_there(made):
    assert AutoTokenizer.from_pretrained(made.folder)("ab")["input_ids"]
    model = get_peft_model(load(made.folder), LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
    model(input_ids=ids(), labels=ids()).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 21
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


def test_shards_are_written_and_loaded(model, tmp_path, options):
    made = quantize(model, tmp_path / "out", shard_bytes=40_000, **options)
    assert len(list(made.folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(made.folder)), logits(load(quantize(model, tmp_path / "one", **options).folder)))


def test_the_slow_truth_chooses_too_and_is_kept(model, options):
    found = measure(model, score="kl", **options)
    assert all(linear.scores["kl"] > 0 for linear in found.linears)
    assert measure(model, score="kl", **options) == found
    dearest = sorted(found.linears, key=lambda linear: -linear.scores["kl"])[:6]
    by_fisher = sorted(found.linears, key=lambda linear: -linear.scores["fisher"])[:9]
    assert {linear.name for linear in dearest} <= {linear.name for linear in by_fisher}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "fischer"}, "score 'fischer' is not known; did you mean 'fisher'?"),
        ({"budget": "lots"}, "'lots' is not understood"),
        ({"device": "cdua"}, "device 'cdua' is not known; did you mean 'cuda'?"),
        ({"init": "quera"}, "init 'quera' is not known; did you mean 'qera'?"),
        ({"init": "qera", "rank": 0}, "rank 0 is no rank"),
        ({"dtype": "bf16"}, "dtype 'bf16' is not known"),
        ({"samples": 10**7}, "Python's own text has"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, options, change, said):
    with pytest.raises(SlothError) as raised:
        quantize(model, tmp_path / "out", **options | change)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(model, tmp_path, options):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SlothError, match="sees no GPU here; use cpu"):
        quantize(model, tmp_path / "out", **options | {"device": "cuda"})


def test_what_is_quantised_already_is_refused(made, tmp_path, options):
    with pytest.raises(SlothError, match="is quantised already; name the 16-bit model"):
        quantize(made.folder, tmp_path / "again", **options)


def test_an_existing_folder_is_replaced_only_by_force(model, made, options):
    with pytest.raises(SlothError, match="exists; choose another folder"):
        quantize(model, made.folder, **options)
    assert quantize(model, made.folder, budget="0", force=True, **options).decision.kept == frozenset()


def test_without_a_tokenizer_text_cannot_be_read(tmp_path, options):
    save_model(tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SlothError, match="holds no tokenizer"):
        quantize(tmp_path / "model", tmp_path / "out", **options)


@pytest.mark.parametrize("init", ["qera", "svd", "loftq"])
def test_an_adapter_begins_nearer_to_the_16_bit_model(model, tmp_path, options, init):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    made = quantize(model, tmp_path / "out", init=init, rank=16, budget="5%", **options)
    both = load_with_adapter(made.folder, device_map="cpu")
    assert isinstance(both, PeftModel)
    near = float((logits(both) - logits(plain)).square().mean())
    with both.disable_adapter():
        far = float((logits(both) - logits(plain)).square().mean())
    assert near < 0.7 * far
    assert all(p.requires_grad for n, p in both.named_parameters() if "lora_" in n)
