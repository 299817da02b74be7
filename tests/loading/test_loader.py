"""What is loaded: from where, in which dtype, quantised or not, and what the options of other loaders mean."""

import json
import re
import shutil

import bitsandbytes
import peft
import pytest
import torch
import transformers

from sloth_plugins import FastLanguageModel, SlothError, activate, activation, is_bfloat16_supported
from sloth_plugins.loading.checkpointing import PLANS


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), **{"max_seq_length": 64, **options})


def selected():
    return None if activation._active is None else activation._active.selection.text


def test_transformers_own_objects_with_the_weights_of_the_folder(tiny):
    model, tokenizer = load(tiny)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert type(model) is transformers.LlamaForCausalLM
    assert type(tokenizer) is type(transformers.AutoTokenizer.from_pretrained(tiny))
    assert tokenizer.model_max_length == 64
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(tiny, dtype, expected):
    assert load(tiny, dtype=dtype)[0].dtype == expected


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_card_chooses(bf16, expected, monkeypatch):
    from sloth_plugins.loading.pretrained import choose_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert choose_dtype(None) == expected


@pytest.mark.parametrize("bf16", [True, False])
def test_scripts_ask_whether_the_card_computes_in_bfloat16(bf16, monkeypatch):
    assert is_bfloat16_supported() is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert is_bfloat16_supported() is bf16


def test_the_older_name_of_the_dtype(tiny):
    assert load(tiny, torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(SlothError, match="torch_dtype is the older name of dtype"):
        load(tiny, dtype="float32", torch_dtype="bfloat16")


def test_four_bits(tiny):
    model, _ = load(tiny, load_in_4bit=True)
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer) is bitsandbytes.nn.Linear4bit
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)
    assert type(model.lm_head) is torch.nn.Linear


def test_eight_bits(tiny):
    model, _ = load(tiny, load_in_8bit=True)
    assert type(model.model.layers[0].mlp.down_proj) is bitsandbytes.nn.Linear8bitLt


def test_a_checkpoint_that_is_quantised_already(tiny, tmp_path, capsys):
    load(tiny, load_in_4bit=True)[0].save_pretrained(tmp_path / "nf4")
    shutil.copytree(tiny, tmp_path / "nf4", dirs_exist_ok=True, ignore=lambda _, names: [
        name for name in names if not name.startswith("tokenizer")
    ])  # fmt: skip
    capsys.readouterr()
    model, _ = load(tmp_path / "nf4", load_in_4bit=True)
    assert model.is_loaded_in_4bit
    assert "quantised" not in capsys.readouterr().err
    load(tmp_path / "nf4", load_in_8bit=True)
    assert "nf4 is quantised already (bitsandbytes in 4 bits), and is loaded as it is" in capsys.readouterr().err
    with pytest.raises(SlothError, match="full_finetuning trains all weights"):
        load(tmp_path / "nf4", full_finetuning=True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"load_in_4bit": True, "full_finetuning": True}, "full_finetuning trains all weights"),
        ({"load_in_4bit": "dynamc"}, "did you mean 'dynamic'?"),
        ({"load_in_4bit": "dynamic:much"}, "much"),
        ({"dtype": "bfloat61"}, "did you mean 'bfloat16'?"),
        ({"full_finetuning": True, "use_gradient_checkpointing": "usloth"}, "did you mean 'unsloth'?"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tiny, options, line):
    with pytest.raises(SlothError, match=re.escape(line)) as caught:
        load(tiny, **options)
    assert "\n" not in str(caught.value)


def test_a_misspelt_option_is_one_line(tiny):
    with pytest.raises(SlothError, match=r"no option 'max_seq_lenght', .*; did you mean 'max_seq_length'"):
        load(tiny, max_seq_lenght=64)


def test_models_that_are_not_there(tiny, tmp_path):
    for name, line in (
        (tiny.with_name("tinny"), "did you mean 'tiny'?"),
        ("nobody/nothing", "'nobody/nothing' cannot"),
    ):
        with pytest.raises(SlothError, match=re.escape(line)) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlothError, match="holds no model"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("gone", "line"),
    [("tokenizer*", "has no tokenizer that can be loaded: "), ("model.safetensors", "cannot be loaded: ")],
)
def test_half_a_model_is_one_line(tiny, tmp_path, gone, line):
    shutil.copytree(tiny, tmp_path / "half", ignore=shutil.ignore_patterns(gone))
    with pytest.raises(SlothError, match=re.escape(line)) as caught:
        load(tmp_path / "half")
    assert "\n" not in str(caught.value)


def test_gguf_files_are_no_checkpoint(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SlothError, match=r"model-q4.gguf is made for llama.cpp and Ollama; name the checkpoint"):
        load(tmp_path)
    with pytest.raises(SlothError, match=r"model-q4.gguf is no folder$"):
        load(tmp_path / "model-q4.gguf")


def test_full_fine_tuning(tiny):
    model, _ = load(tiny, full_finetuning=True, use_gradient_checkpointing=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].gradient_checkpointing


def test_options_of_other_loaders(tiny, capsys):
    load(tiny, fast_inference=True, gpu_memory_utilization=0.5, load_in_fp8=False, random_state=3)
    first = torch.rand(1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sloth-plugins")]
    assert said == [
        "sloth-plugins: fast_inference, gpu_memory_utilization of from_pretrained: nothing here goes by that; ignored"
    ]
    load(tiny, random_state=3, attn_implementation="eager")
    assert torch.equal(torch.rand(1), first)
    with pytest.raises(SlothError, match="no option 'gpu_memory_utilisation'"):
        load(tiny, gpu_memory_utilisation=0.5)


def test_longer_than_trained(tiny, capsys):
    positions = json.loads((tiny / "config.json").read_text())["max_position_embeddings"]
    load(tiny, max_seq_length=2 * positions)
    assert '{"rope_type": "linear", "factor": 2}' in capsys.readouterr().err
    stock, _ = load(tiny)
    scaled, _ = load(tiny, rope_scaling={"rope_type": "linear", "factor": 2.0})
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq / 2)


def test_an_adapter_goes_on_training(tiny, tmp_path):
    model, tokenizer = load(tiny)
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-7")
    (tmp_path / "run" / "checkpoint-3").mkdir()
    again, found = load(tmp_path / "run", load_in_4bit=False)
    assert isinstance(again, peft.PeftModelForCausalLM)
    assert found.get_vocab() == tokenizer.get_vocab()
    trained = {name: parameter for name, parameter in again.named_parameters() if parameter.requires_grad}
    before = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained.keys() == before.keys()
    assert all(torch.equal(trained[name], before[name]) for name in before)
    small, _ = load(tmp_path / "run", load_in_4bit=True)
    assert type(small.base_model.model.model.layers[0].mlp.up_proj.base_layer) is bitsandbytes.nn.Linear4bit


def test_an_adapter_is_checkpointed_where_its_loader_is_asked_to(tiny, tmp_path):
    FastLanguageModel.get_peft_model(load(tiny)[0], r=4, use_gradient_checkpointing=False).save_pretrained(tmp_path)
    activation.deactivate()
    for how, selection in ((None, "1"), (False, "1"), (True, "1"), ("unsloth", f"{PLANS},1")):
        model, _ = load(tmp_path, use_gradient_checkpointing=how)
        assert model.base_model.model.model.layers[0].gradient_checkpointing is bool(how)
        assert selected() == selection
    with pytest.raises(SlothError, match="did you mean 'unsloth'"):
        load(tmp_path, use_gradient_checkpointing="unslot")


def test_the_flag_decides_what_is_active(tiny, monkeypatch):
    load(tiny)
    assert selected() == "1"
    activation.deactivate()
    for flag in ("0", ""):
        monkeypatch.setenv("SLOTH_PLUGINS", flag)
        FastLanguageModel.get_peft_model(load(tiny)[0])
        assert selected() is None
    monkeypatch.setenv("SLOTH_PLUGINS", "llama:rope")
    load(tiny)
    assert selected() == "llama:rope"
    activate("1,-*:glu")
    load(tiny)
    assert selected() == "1,-*:glu"
