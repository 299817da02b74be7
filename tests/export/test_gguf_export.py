"""Files from every kind of source, what they say of the model, and what is left where something goes wrong."""

import importlib.util
import os
import shutil
import stat
import sys
from types import SimpleNamespace

import gguf
import gguf_tiny as tiny
import llama_runtime
import numpy as np
import pytest
import torch
from adapted_models import adapt
from gguf_tiny import left_in, tensors
from llama_programs import install_module, install_programs, on_path
from transformers import AutoModelForCausalLM

from sloth_plugins.errors import SlothError
from sloth_plugins.export import weights
from sloth_plugins.export.gguf import export, save_pretrained_gguf
from sloth_plugins.export.gguf import export as package_export
from sloth_plugins.export.gguf.methods import base_method, parse_methods

EXPORT_MODULE = sys.modules[package_export.__module__]


@pytest.fixture(autouse=True)
def _no_programs(monkeypatch):
    """Whatever the machine has, llama.cpp is found only where a test puts it."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name == "llama_cpp" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    llama_runtime.require()
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", on_path(install_programs(place)))
    return place


def read(file):
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}


class TestMetadata:
    def test_llama(self, folder, tokenizer, tmp_path):
        made = export(folder, tmp_path, tokenizer, "bf16")
        found = read(made.files[0])
        expected = {
            "general.architecture": "llama",
            "general.name": "my-llama",
            "general.file_type": 32,
            "llama.context_length": 512,
            "llama.embedding_length": 256,
            "llama.block_count": 2,
            "llama.feed_forward_length": 512,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 64,
            "llama.vocab_size": tiny.ROWS,
            "llama.rope.dimension_count": 64,
            "llama.rope.freq_base": 500000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.chat_template": tiny.CHATML,
        }
        assert {key: found.get(key) for key in expected} == expected
        # The turn ends with <|im_end|>, which is not the EOS token.
        assert tokenizer.convert_ids_to_tokens(found["tokenizer.ggml.eot_token_id"]) == "<|im_end|>"
        assert "rope_freqs.weight" in tensors(made.files[0])

    def test_gemma3(self, tmp_path):
        model = tiny.tiny_model("gemma3_text", final_logit_softcapping=30.0)
        found = read(save_pretrained_gguf(model, tmp_path, tiny.sentencepiece("never"), "f16").files[0])
        expected = {
            "gemma3.attention.sliding_window": 32,
            "gemma3.attention.sliding_window_pattern": [True, False, True],
            "gemma3.final_logit_softcapping": 30.0,
            "gemma3.rope.freq_base": 1000000.0,
            "gemma3.rope.freq_base_swa": 10000.0,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.add_space_prefix": False,
        }
        assert {key: found.get(key) for key in expected} == expected

    def test_names_that_llama_cpp_acts_upon_are_not_written(self, folder, tokenizer, tmp_path):
        file = export(folder, tmp_path, tokenizer, "f16", name="My-Phi-3-mini").files[0]
        assert read(file)["general.name"] == "My-phi-mini"
        stripping = tiny.sentencepiece("always", rstrip=True)
        file = export(folder, tmp_path / "phi", stripping, "f16", name="mini").files[0]
        assert read(file)["general.name"] == "Phi-3 mini"

    def test_named_chat_templates(self, folder, tmp_path):
        tokenizer = tiny.byte_level("llama-bpe", chat_template={"default": tiny.CHATML, "tool_use": "x"})
        found = read(export(folder, tmp_path, tokenizer, "f16").files[0])
        assert found["tokenizer.chat_template"] == tiny.CHATML
        assert found["tokenizer.chat_template.tool_use"] == "x"


class TestTypes:
    def test_bf16_is_bit_for_bit_the_checkpoint(self, folder, tokenizer, tmp_path):
        found = tensors(export(folder, tmp_path, tokenizer, "bf16").files[0])
        stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        stored = found["blk.0.ffn_up.weight"]
        assert stored.tensor_type == gguf.GGMLQuantizationType.BF16
        expected = stock["model.layers.0.mlp.up_proj.weight"].view(torch.int16).numpy()
        assert np.array_equal(stored.data.view(np.int16), expected)
        assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32

    def test_q8_0_rows_in_chunks_are_those_of_the_whole(self, monkeypatch):
        from sloth_plugins.export.gguf import tensors as module

        values = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
        whole = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
        monkeypatch.setattr(module, "CHUNK", 5 * 64)
        assert np.array_equal(module.encode(values, "Q8_0"), whole)

    def test_rows_that_do_not_divide_stay_f16(self, tokenizer, tmp_path):
        model = tiny.tiny_model("qwen2", intermediate_size=100)
        found = tensors(export(model, tmp_path, tokenizer, "q8_0").files[0])
        assert found["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
        assert found["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0

    @pytest.mark.parametrize("method", ["f32", "f16", "bf16", "q8_0"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_none_are_refused(self, tokenizer, tmp_path, method, value):
        model = tiny.tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        with pytest.raises(SlothError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
            export(model, tmp_path, tokenizer, method)
        assert left_in(tmp_path) == []

    @pytest.mark.parametrize(
        ("method", "held", "beyond"), [("f16", 65519, 65520), ("q8_0", 8.32e6, 8.33e6), ("bf16", 3.3e38, 3.4e38)]
    )
    def test_values_beyond_a_type_are_refused(self, tokenizer, tmp_path, method, held, beyond):
        model = tiny.tiny_model("llama")
        for value in (held, -held, beyond, -beyond):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight[3, 5] = value
            if abs(value) == held:
                stored = tensors(export(model, tmp_path / str(value), tokenizer, method).files[0])[
                    "blk.0.ffn_up.weight"
                ]
                assert np.isfinite(gguf.dequantize(stored.data, stored.tensor_type)).all()
                continue
            with pytest.raises(SlothError, match=rf"up_proj\.weight has values beyond {method.upper()}; choose f32"):
                export(model, tmp_path / "out", tokenizer, method)
            assert left_in(tmp_path / "out") == []

    def test_methods_are_words_with_commas_or_a_list(self):
        assert parse_methods("Q4_K_M, f16,q4_k_m") == parse_methods(["q4_k_m", "f16"]) == ["q4_k_m", "f16"]
        # As the command hands them over.
        assert parse_methods(["q4_k_m,f16", "q8_0"]) == ["q4_k_m", "f16", "q8_0"]
        assert parse_methods(None) == ["q8_0"]
        with pytest.raises(SlothError, match="no quantization 'q4_km'; did you mean 'q4_k_m'"):
            parse_methods("q4_km")
        with pytest.raises(SlothError, match="no quantization was named"):
            parse_methods([])

    @pytest.mark.parametrize(
        ("dtype", "methods", "expected"),
        [
            (torch.bfloat16, ["q4_k_m"], "bf16"),
            (torch.float16, ["q4_k_m"], "f16"),
            (torch.float32, ["q4_k_m"], "f32"),
            ("bfloat16", ["f32", "q4_k_m"], "f32"),
            (None, ["q4_k_m", "q8_0"], "bf16"),
        ],
    )
    def test_k_quants_are_made_of_what_keeps_all_bits(self, dtype, methods, expected):
        assert base_method(SimpleNamespace(dtype=dtype), methods) == expected


class TestSources:
    def test_adapter_live_model_and_merged_folder_give_the_same_file(self, tokenizer, tmp_path):
        base, run = tmp_path / "base", tmp_path / "run"
        tiny.tiny_model("llama", dtype=torch.bfloat16).save_pretrained(base)
        live = adapt(AutoModelForCausalLM.from_pretrained(base))
        live.save_pretrained(run)
        tokenizer.save_pretrained(run)
        merged = tmp_path / "merged"
        from sloth_plugins.export.merging import merge

        merge(run, merged)
        again = adapt(AutoModelForCausalLM.from_pretrained(base))
        sources = {"run": run, "merged": merged, "live": again}
        files = {
            name: export(source, tmp_path / f"{name}-out", tokenizer, "bf16", name="x").files[0]
            for name, source in sources.items()
        }
        contents = {name: file.read_bytes() for name, file in files.items()}
        assert contents["run"] == contents["merged"] == contents["live"]
        plain = export(base, tmp_path / "base-out", tokenizer, "bf16", name="x").files[0].read_bytes()
        assert contents["run"] != plain

    def test_the_tokenizer_is_the_folders(self, folder, tmp_path):
        assert len(export(folder, tmp_path, methods="f16").files) == 1

    def test_without_a_tokenizer(self, folder, tmp_path):
        alone = tmp_path / "alone"
        alone.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(folder / name, alone / name)
        # The command has no such option.
        with pytest.raises(SlothError, match=rf"no tokenizer was found, .*; save it in {alone}$"):
            export(alone, tmp_path / "out", methods="f16")
        with pytest.raises(SlothError, match=r"no tokenizer was given with the model; .*: add tokenizer="):
            export(tiny.tiny_model("llama"), tmp_path / "out", methods="f16")

    def test_the_base_s_tokenizer_is_not_that_of_a_vocabulary_that_has_grown(self, folder, tokenizer, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(tiny.ROWS + 8)
        run = tmp_path / "run"
        adapt(model).save_pretrained(run, save_embedding_layers=True)
        with pytest.raises(SlothError, match=r"has 1032 rows of tokens where its base .* has 1024"):
            export(run, tmp_path / "out", methods="f16")
        tokenizer.save_pretrained(run)
        assert len(export(run, tmp_path / "out", methods="f16").files) == 1

    def test_a_model_file_without_what_reads_it(self, folder, tmp_path, monkeypatch):
        alone = tmp_path / "alone"
        shutil.copytree(folder, alone)
        (alone / "tokenizer.json").rename(alone / "tokenizer.model")
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name))
        with pytest.raises(SlothError, match=r"tokenizer.model is read by sentencepiece: pip install"):
            export(alone, tmp_path / "out", methods="f16")

    def test_an_unknown_family_names_the_known_ones(self, tokenizer, tmp_path):
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=900))
        with pytest.raises(
            SlothError, match=r"no GGUF for model_type 'gpt2'.*known: llama, mistral.*qwen3.*gemma2.*phi3"
        ):
            export(model, tmp_path, tokenizer, "f16")


class TestQuantized:
    def test_converted_once_and_made_by_the_program(self, folder, tokenizer, tmp_path, programs, monkeypatch):
        reads = []
        opened = weights.open_weights

        def counting(*arguments):
            found = opened(*arguments)
            original = found.read
            monkeypatch.setattr(type(found), "read", lambda self, name: reads.append(name) or original(name))
            return found

        monkeypatch.setattr(EXPORT_MODULE, "open_weights", counting)
        out = tmp_path / "out"
        made = export(folder, out, tokenizer, ["q4_k_m", "q5_k_m"])
        assert left_in(out) == ["Modelfile", "model-q4_k_m.gguf", "model-q5_k_m.gguf"]
        assert len(reads) == len(set(reads)) > 10
        assert [read(file)["general.file_type"] for file in made.files] == [15, 17]
        kinds = {tensor.tensor_type.name for tensor in tensors(made.files[0]).values()}
        assert {"Q4_K", "Q6_K"} <= kinds
        assert made.notes == []

    def test_by_the_module_in_the_same_way(self, folder, tokenizer, tmp_path, programs, monkeypatch):
        by_program = export(folder, tmp_path / "program", tokenizer, "q4_k_m").files[0]
        place = tmp_path / "site"
        place.mkdir()
        monkeypatch.setenv("PYTHONPATH", str(install_module(place)))
        monkeypatch.setenv("PATH", "")
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "llama_cpp" else found(name))
        made = export(folder, tmp_path / "module", tokenizer, "q4_k_m")
        assert made.notes == []
        assert made.files[0].read_bytes() == by_program.read_bytes()

    def test_without_llama_cpp_nothing_is_begun(self, folder, tokenizer, tmp_path):
        with pytest.raises(SlothError, match=r"q4_k_m is made by llama\.cpp, which is not here: pip install llama-cpp"):
            export(folder, tmp_path / "out", tokenizer, ["f16", "q4_k_m"])
        assert not (tmp_path / "out").exists()

    def test_what_llama_cpp_says_when_it_fails(self, folder, tokenizer, tmp_path, programs):
        script(programs / "llama-quantize", "echo loading; echo 'error: the moon is full'; exit 1")
        out = tmp_path / "out"
        with pytest.raises(SlothError, match="could not make q4_k_m: error: the moon is full"):
            export(folder, out, tokenizer, "q4_k_m")
        assert left_in(out) == []


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestTokensAreCompared:
    def test_by_llama_cpp_where_it_is(self, folder, tmp_path, programs):
        for number, tokenizer in enumerate(
            [tiny.byte_level("tekken"), *(tiny.sentencepiece(prefix) for prefix in tiny.SENTENCEPIECE)]
        ):
            made = export(folder, tmp_path / str(number), tokenizer, "f16")
            assert not [note for note in made.notes if "not compared" in note]

    def test_and_told_where_it_is_not(self, folder, tokenizer, tmp_path):
        assert export(folder, tmp_path, tokenizer, "f16").notes == [
            "llama.cpp is not here, so its tokens were not compared with the tokenizer's"
        ]

    def test_a_difference_ends_the_export(self, folder, tmp_path, programs):
        out = tmp_path / "out"
        # Digits one by one, and not in threes.
        with pytest.raises(SlothError, match=r"llama\.cpp tokenizes otherwise than this tokenizer near '.*2"):
            export(folder, out, tiny.byte_level("llama-bpe"), "f16", pre_tokenizer="tekken")
        assert left_in(out) == []

    def test_a_name_is_checked_without_it(self, folder, tokenizer, tmp_path):
        with pytest.raises(SlothError, match="knows no pre-tokenizer 'llama-bpa'; did you mean 'llama-bpe'"):
            export(folder, tmp_path / "out", tokenizer, "f16", pre_tokenizer="llama-bpa")
        assert not (tmp_path / "out").exists()
        made = export(folder, tmp_path / "out", tokenizer, "f16", pre_tokenizer="dbrx")
        assert read(made.files[0])["tokenizer.ggml.pre"] == "dbrx"

    def test_and_by_it_where_it_is(self, folder, tokenizer, tmp_path, programs):
        with pytest.raises(SlothError, match=r"llama\.cpp cannot read the file that was written"):
            export(folder, tmp_path / "out", tokenizer, "f16", pre_tokenizer="llama-bpa")

    def test_a_file_that_it_cannot_read(self, folder, tokenizer, tmp_path, programs):
        script(programs / "llama-tokenize", "echo 'error: what is this' >&2; exit 1")
        with pytest.raises(SlothError, match=r"llama\.cpp cannot read the file that was written: error: what is this"):
            export(folder, tmp_path / "out", tokenizer, "f16")
        assert left_in(tmp_path / "out") == []


def test_without_gguf(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlothError, match=r"pip install 'sloth-plugins\[gguf\]'"):
        export(folder, tmp_path, tokenizer, "f16")


@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_llama_cpp_may_be_missing_anywhere_but_in_ci(ci, outcome, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(llama_runtime, "LIBRARIES", tmp_path)
    with pytest.raises(outcome, match="make llama"):
        llama_runtime.require()
