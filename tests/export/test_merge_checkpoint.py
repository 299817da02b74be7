"""What a merged folder holds, and that stock transformers loads it."""

import json
import os
import shutil

import pytest
import torch
from adapted_models import adapt, load, logits, save_base, tokenizer, without
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import sloth_plugins.export
from sloth_plugins.errors import SlothError
from sloth_plugins.export import attach, merge, open_weights, save_pretrained_merged


def kl(expected, found):
    return (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean().item()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_base(tmp_path_factory.mktemp("checkpoint") / "base", shard="100KB")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, tmp_path):
    adapt(load(base)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_layout_is_that_of_save_pretrained(base, run, tmp_path):
    out = merge(run, tmp_path / "out", shard_bytes=100_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    assert index["weight_map"].keys() == held.keys() == load(base).state_dict().keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_generation_config_that_transformers_would_not_write_is_kept(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0.5, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model = adapt(load(folder))
    for number, source in enumerate((model, folder)):
        out = merge(source, tmp_path / str(number))
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_small_model_is_one_file(run, tmp_path):
    out = merge(run, tmp_path / "out")
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("stored", [None, "nf4", "nf4 twice", "fp4"])
def test_stock_transformers_computes_what_peft_does(base, tmp_path, stored):
    model = adapt(load(base, stored))
    out = merge(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    expected = logits(model)
    # Both compute in bf16; the difference is that of roundings, where base and adapter differ by far more.
    assert kl(expected, logits(loaded)) < 3e-3 < 0.1 < kl(expected, logits(load(base)))


def test_the_merged_model_of_a_peft_merge_in_fp32_is_ours(base, tmp_path):
    model = adapt(load(base, dtype=torch.float32))
    out = merge(model, tmp_path / "out", dtype="float32")
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_merge_from_four_bits_beats_a_merge_into_four_bits(base, tmp_path):
    model = adapt(load(base, "nf4"))
    expected = logits(model)
    out = merge(model, tmp_path / "out")
    ours = kl(expected, logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)))
    into = kl(expected, logits(adapt(load(base, "nf4")).merge_and_unload()))
    assert ours * 20 < into


@pytest.mark.parametrize("stored", [None, "nf4", "fp4", "int8"])
def test_four_bits_are_those_that_transformers_makes_of_the_merged_model(base, tmp_path, stored):
    model = adapt(load(base, stored))
    sixteen, four = merge(model, tmp_path / "16"), merge(model, tmp_path / "4", method="merged_4bit")
    written = json.loads((four / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == ["lm_head"]
    assert written["bnb_4bit_quant_type"] == ("fp4" if stored == "fp4" else "nf4")
    names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    config = BitsAndBytesConfig(load_in_4bit=True, **{name: written[name] for name in names})
    config.bnb_4bit_compute_dtype = torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(
        sixteen, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    found = AutoModelForCausalLM.from_pretrained(four, device_map="cpu", dtype="auto")
    assert found.config.dtype == torch.bfloat16
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(logits(found), logits(expected))


def test_what_the_base_left_in_16_bits_stays_so_in_four(base, tmp_path):
    kept = ["model.layers.0.mlp.down_proj", "lm_head"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=kept, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "base")
    model = adapt(model)
    model.save_pretrained(tmp_path / "run")
    for source, options in ((model, {}), (tmp_path / "run", {"base": tmp_path / "base"})):
        out = merge(source, tmp_path / "out", method="merged_4bit", force=True, **options)
        loaded = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
        assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
        assert type(loaded.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"
        assert kl(logits(adapt(load(base))), logits(loaded)) < 0.5


@pytest.mark.parametrize(("asked", "got"), [(None, torch.float16), ("bfloat16", torch.bfloat16), ("float32", None)])
def test_the_dtype_is_the_base_s_own_unless_asked(tmp_path, asked, got):
    base = save_base(tmp_path / "base", dtype=torch.float16)
    model = adapt(load(base, dtype=torch.float16))
    model.save_pretrained(tmp_path / "run")
    for source in (model, tmp_path / "run"):
        out = merge(source, tmp_path / "out", dtype=asked, force=True)
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {got or torch.float32}


def test_sixteen_bits_of_a_base_in_32_are_bfloat16(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.float32)
    out = merge(base, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_values_beyond_float16_are_refused(tmp_path):
    model = load(save_base(tmp_path / "base"))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(SlothError, match=r"model\.norm\.weight has values beyond torch\.float16; choose .*bfloat16"):
        merge(model, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_model_that_diverged_is_refused(base, tmp_path):
    model = adapt(load(base))
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(SlothError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinite values"):
        merge(model, tmp_path / "out")


def untied(model):
    """The head is another matrix than the embedding, and the config says that it is the same."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    return model


@pytest.mark.parametrize("kind", ["folder", "adapter", "live", "live adapter"])
def test_a_head_of_its_own_stays_whatever_the_config_says(tmp_path, kind):
    tied = load(save_base(tmp_path / "tied", tie_word_embeddings=True))
    base = tmp_path / "base"
    untied(tied).save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = tied.lm_head.weight.detach()  # transformers drops what its config calls tied
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    model = adapt(untied(load(tmp_path / "tied"))) if "adapter" in kind else untied(load(tmp_path / "tied"))
    expected = logits(model)
    if kind == "adapter":
        model.save_pretrained(tmp_path / "run")
        without(tmp_path / "run", base_model_name_or_path=str(base))
    source = {"folder": base, "adapter": tmp_path / "run"}.get(kind, model)
    out = merge(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert kl(expected, logits(load(out))) < (3e-3 if "adapter" in kind else 1e-12)


@pytest.mark.parametrize("kind", ["folder", "live"])
def test_a_copy_of_the_embedding_is_not_written(tmp_path, kind):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    stored = load_file(base / "model.safetensors")
    copied = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": copied}, base / "model.safetensors", {"format": "pt"})
    model = load(base)
    if kind == "live":
        model.lm_head.weight = torch.nn.Parameter(copied)
    out = merge(model if kind == "live" else base, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert load_file(out / "model.safetensors").keys() == stored.keys() - {"lm_head.weight"}


def test_one_tensor_that_the_config_calls_two_is_written_twice(base, tmp_path):
    model = load(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = model.model.embed_tokens.weight
    found = load_file(merge(model, tmp_path / "out") / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_the_tokenizer_may_be_given_or_lie_with_the_run(base, run, tmp_path):
    own = tokenizer()
    own.chat_template = "{{ 'mine' }}"
    out = merge(run, tmp_path / "given", own)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 'mine' }}"
    own.save_pretrained(run)
    out = merge(run, tmp_path / "of the run")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 'mine' }}"
    assert (merge(load(base), tmp_path / "of the base") / "tokenizer.json").is_file()


def test_a_tokenizer_that_is_not_there_is_told_before(base, run, tmp_path):
    tokenizer().save_pretrained(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for method in ("merged_16bit", "lora"):
        with pytest.raises(SlothError, match=r"the tokenizer .*/mime is no folder; did you mean 'mine'"):
            merge(run, tmp_path / "out", str(tmp_path / "mime"), method=method)
        with pytest.raises(SlothError, match="empty holds no tokenizer"):
            merge(run, tmp_path / "out", tmp_path / "empty", method=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "run"]
    assert (merge(run, tmp_path / "out", tmp_path / "mine") / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["live", "live adapter", "adapter"])
def test_the_base_s_tokenizer_is_not_that_of_a_vocabulary_that_has_grown(base, tmp_path, kind):
    model = load(base)
    model.resize_token_embeddings(140)
    source = adapt(model) if "adapter" in kind else model
    if kind == "adapter":
        source.save_pretrained(tmp_path / "run", save_embedding_layers=True)
        source = tmp_path / "run"
    with pytest.raises(SlothError, match=r"has 140 rows of tokens where its base .*base has 128, .*tokenizer="):
        merge(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if kind == "adapter":
        tokenizer().save_pretrained(source)
        assert (merge(source, tmp_path / "out") / "tokenizer.json").is_file()
    else:
        assert (merge(source, tmp_path / "out", tokenizer()) / "tokenizer.json").is_file()


def test_the_adapter_alone_can_be_saved(base, run, tmp_path):
    tokenizer().save_pretrained(run)
    for number, source in enumerate((run, adapt(load(base)))):
        out = merge(source, tmp_path / str(number), method="lora")
        assert (out / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
        assert not (out / "model.safetensors").exists()
    assert (tmp_path / "0" / "tokenizer.json").is_file()
    with pytest.raises(SlothError, match="has no adapter to save"):
        merge(base, tmp_path / "none", method="lora")
    with pytest.raises(SlothError, match="has no adapter to save"):
        merge(load(base), tmp_path / "none", method="lora")


def test_a_trainer_s_folder_stands_for_its_newest_checkpoint(base, run, tmp_path):
    folder = tmp_path / "trainer"
    for step in (9, 10):
        shutil.copytree(run, folder / f"checkpoint-{step}")
    (folder / "checkpoint-11").mkdir()
    without(folder / "checkpoint-10", lora_alpha=0)
    tokenizer().save_pretrained(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(open_weights(folder).read(name), open_weights(base).read(name).float())
    assert not torch.equal(open_weights(folder / "checkpoint-9").read(name), open_weights(base).read(name).float())
    assert (merge(folder, tmp_path / "out") / "tokenizer.json").is_file()


def test_the_base_is_found_beside_the_run_and_from_anywhere(base, run, tmp_path, monkeypatch):
    without(run, base_model_name_or_path="base")
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert open_weights("run").shapes() == open_weights(base).shapes()
    (tmp_path / "base").rename(run / "base")
    monkeypatch.chdir("/")
    assert open_weights(run).shapes() == open_weights(base).shapes()


def test_a_base_in_the_hub_s_cache_is_found(base, run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--me--tiny" / "snapshots" / commit
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    without(run, base_model_name_or_path="me/tiny")
    assert open_weights(run).shapes() == open_weights(base).shapes()


def test_methods_of_one_object_do_the_same(base, run, tmp_path):
    import copy

    model = adapt(load(base))
    kind = type(model)
    assert attach(model) is model
    model.save_pretrained_merged(tmp_path / "1", tokenizer(), save_method="merged_16bit")
    save_pretrained_merged(adapt(load(base)), tmp_path / "2", tokenizer())
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert type(model) is kind
    assert not hasattr(kind, "save_pretrained_merged")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule("base_model.model.model.norm").weight.zero_()
    other.save_pretrained_merged(tmp_path / "3")
    assert not load_file(tmp_path / "3" / "model.safetensors")["model.norm.weight"].any()
    assert {"save_pretrained_gguf", "push_to_hub_merged", "push_to_hub_gguf"} <= vars(model).keys()


def test_a_patched_model_is_saved_as_a_stock_one(base, tmp_path):
    import sloth_plugins

    model = adapt(load(base))
    expected = files(merge(model, tmp_path / "stock"))
    sloth_plugins.patch(model)
    found = files(merge(model, tmp_path / "patched"))
    # The card names the patches.
    assert found.pop("README.md") != expected.pop("README.md")
    assert found == expected


def test_public_names_are_there():
    for name in sloth_plugins.export.__all__:
        assert getattr(sloth_plugins.export, name).__doc__


def test_typos_name_the_nearest(base, tmp_path):
    with pytest.raises(SlothError, match="save_method 'merged_16bits' is not known; did you mean 'merged_16bit'"):
        merge(base, tmp_path / "out", method="merged_16bits")
    with pytest.raises(SlothError, match="dtype 'bfloat' is not known; did you mean 'bfloat16'"):
        merge(base, tmp_path / "out", dtype="bfloat")
    os.rename(base, base.with_name("base2"))
    with pytest.raises(SlothError, match="base is no folder; did you mean 'base2'"):
        merge(base, tmp_path / "out")
    os.rename(base.with_name("base2"), base)
