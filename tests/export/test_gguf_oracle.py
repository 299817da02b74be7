"""Tensor for tensor what llama.cpp's own converter writes, and no other metadata of the model."""

import subprocess
import sys
from pathlib import Path

import gguf
import gguf_tiny as tiny
import llama_runtime
import numpy as np
import pytest
from fetch_llama_cpp import SOURCES

from sloth_plugins.export.gguf import export

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0 + n / 40 for n in range(32)],
    "long_factor": [1.0 + n / 4 for n in range(32)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    **{kind: (kind, {}) for kind in tiny.FAMILIES if kind != "ministral"},  # unknown to theirs
    "llama, biased and tied": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN}),
    "phi3 with longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
}
# Theirs only: what they take from a folder's name and card, or what llama.cpp has as its default.
IGNORED = ("general.", "tokenizer.", "GGUF.", "quantize.")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """For each variant, our file and theirs."""
    llama_runtime.require()
    folder = tmp_path_factory.mktemp("oracle")
    files, arguments = {}, []
    for number, (name, (kind, changes)) in enumerate(VARIANTS.items()):
        source = folder / str(number)
        tokenizer = tiny.byte_level("gpt-2")
        # Theirs leaves out the rows of Gemma 3's embedding that have no token.
        rows = len(tokenizer) if kind == "gemma3_text" else tiny.ROWS
        tiny.tiny_model(kind, vocab_size=rows, **changes).save_pretrained(source)
        tokenizer.save_pretrained(source)
        ours = export(source, folder / f"{number}-ours", tokenizer, "f32").files[0]
        files[name] = (ours, folder / f"{number}.gguf")
        arguments += [str(source), str(files[name][1])]
    program = [sys.executable, str(Path(__file__).with_name("official_converter.py")), str(SOURCES), *arguments]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return files


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_the_official_converter(both, name):
    ours, theirs = (gguf.GGUFReader(file) for file in both[name])
    found, expected = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert set(found) == set(expected)
    for tensor, other in expected.items():
        assert found[tensor].tensor_type == other.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(found[tensor].shape) == list(other.shape)
        # Factors are computed, by them in fp32; weights are copied.
        exact = not tensor.startswith("rope_")
        assert np.allclose(found[tensor].data, other.data, rtol=0 if exact else 1e-6, atol=0), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_value_that_they_write_of_the_model_is_ours(both, name):
    ours, theirs = (gguf.GGUFReader(file) for file in both[name])
    for key, field in theirs.fields.items():
        if key.startswith(IGNORED) and key not in ("general.architecture", "general.file_type"):
            continue
        mine = ours.get_field(key)
        if mine is None and field.contents() == 0:
            continue  # no window
        assert mine is not None, key
        assert mine.contents() == pytest.approx(field.contents()), key


@pytest.mark.slow
def test_tokens_and_their_types(both):
    ours, theirs = (gguf.GGUFReader(file) for file in both["llama"])
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        key = f"tokenizer.ggml.{key}"
        assert ours.get_field(key).contents() == theirs.get_field(key).contents(), key
    key = "tokenizer.chat_template"
    assert ours.get_field(key).contents() == theirs.get_field(key).contents()
