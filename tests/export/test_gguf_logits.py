"""llama.cpp computes what transformers does: every family, every type of file, long contexts."""

import dataclasses

import gguf_tiny as tiny
import llama_runtime
import numpy as np
import pytest
import torch
from llama_programs import install_programs, on_path
from paths import EXAMPLE

from sloth_plugins.discovery import Plugins
from sloth_plugins.errors import SlothError
from sloth_plugins.export.gguf import export, metadata
from sloth_plugins.registry import GgufFormat

BOUNDS = {"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4, "q8_0": 2e-3, "q4_k_m": 1e-1}
# Each family with the pre-tokenizer that it, or a relative, has.
PRE_TOKENIZER = {"mistral": "tekken", "ministral": "tekken", "qwen2": "qwen2", "qwen3": "qwen2", "phi3": "gpt-4o"}
PREFIX = {"gemma": "never", "gemma2": "never", "gemma3_text": "never"}
LINES = tiny.mixed_lines()


def tokenizer_of(kind, of_sentencepiece):
    if of_sentencepiece:
        return tiny.sentencepiece(PREFIX.get(kind, "always"))
    return tiny.byte_level(PRE_TOKENIZER.get(kind, "llama-bpe"))


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def divergence(left, right):
    """KL in nats, averaged over positions, in float64."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (left, right.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(autouse=True)
def _programs(tmp_path, monkeypatch):
    llama_runtime.require()
    monkeypatch.setenv("PATH", on_path(install_programs(tmp_path)))


# By turns: the tokenizer is no matter of families.
@pytest.mark.parametrize(("kind", "of_sentencepiece"), [(kind, i % 2 == 1) for i, kind in enumerate(tiny.FAMILIES)])
def test_tokens_and_logits_in_every_type(kind, of_sentencepiece, tmp_path):
    model, tokenizer = tiny.tiny_model(kind), tokenizer_of(kind, of_sentencepiece)
    made = export(model, tmp_path / "out", tokenizer, BOUNDS)
    ids = tokenizer("\n".join(LINES[:8]))["input_ids"][:160]
    expected = logits(model, ids)
    # Far from uniform, so that a divergence says something.
    assert divergence(expected, np.zeros_like(expected)) > 0.3
    found = {}
    for method, file in zip(BOUNDS, made.files, strict=True):
        with llama_runtime.Llama(file) as loaded:
            if method == "f16":
                different = [
                    line
                    for line in LINES
                    if loaded.tokenize(line) != tokenizer(line, add_special_tokens=False).input_ids
                ]
                assert different == []
            assert loaded.tokenize("\n".join(LINES[:8]), add_special=True)[:160] == ids
            found[method] = divergence(expected, loaded.logits(ids))
    assert {method: kl for method, kl in found.items() if not 0 <= kl < BOUNDS[method]} == {}
    # Fewer bits are further away: each file is of its own type.
    assert found["f16"] < found["bf16"] < found["q8_0"] < found["q4_k_m"]


def random_ids(length):
    return torch.randint(10, 700, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def compare(model, tmp_path, length, n_ctx=None):
    """The divergence of an f32 file at the positions of the second half."""
    file = export(model, tmp_path / "m", tiny.byte_level("gpt-2"), "f32").files[0]
    ids = random_ids(length)
    with llama_runtime.Llama(file) as loaded:
        found = loaded.logits(ids, n_ctx)
    half = slice(length // 2, None)
    return divergence(logits(model, ids)[half], found[half])


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_windows_are_kept(kind, tmp_path):
    model = tiny.tiny_model(kind, sliding_window=16)
    assert compare(model, tmp_path, 200) < 1e-5
    ids, other = random_ids(200), tiny.tiny_model(kind, sliding_window=64)
    assert divergence(logits(model, ids), logits(other, ids)) > 1e-3


def test_mistral_is_right_within_its_window_and_says_so(tmp_path):
    model = tiny.tiny_model("mistral", sliding_window=64)
    assert compare(model, tmp_path, 60) < 1e-5
    made = export(model, tmp_path / "m", tiny.byte_level("gpt-2"), "f32", force=True)
    assert "llama.cpp has no sliding window for llama: answers differ past 64 tokens of context" in made.notes


THETA = {"rope_theta": 10000.0}
LLAMA3 = tiny.OWN["llama"]["rope_parameters"]
SCALED = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "yarn with a scale": (
        "qwen3",
        {
            "rope_parameters": {
                **{**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                "attention_factor": 1.3,
            }
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "partial": ("phi3", {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.75}}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_far_past_the_original_context(name, tmp_path):
    kind, changes = SCALED[name]
    model = tiny.tiny_model(kind, **changes)
    assert compare(model, tmp_path, 400) < 1e-5
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    by_kind = {"full_attention": plain, "sliding_attention": plain}
    other = tiny.tiny_model(kind, rope_parameters=by_kind if name == "gemma3" else plain)
    ids = random_ids(400)
    assert divergence(logits(model, ids), logits(other, ids)) > 1e-4


@pytest.mark.parametrize(("length", "context"), [(240, 256), (400, 512)], ids=["short", "long"])
def test_longrope_in_short_and_long_contexts(length, context, tmp_path):
    dims = torch.arange(32)
    values = {**THETA, "rope_type": "longrope", "original_max_position_embeddings": 256}
    values |= {"short_factor": (1 + 0.02 * dims).tolist(), "long_factor": (1 + 0.2 * dims).tolist()}
    changes = {"rope_parameters": values, "original_max_position_embeddings": 256}
    model = tiny.tiny_model("phi3", **changes)
    assert compare(model, tmp_path, length, context) < 1e-5


def test_a_plugins_architecture_needs_one_line_of_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import sloth_olmo

    known = Plugins(load_entry_points=False)
    spec = next(iter(sloth_olmo.sloth_architectures()))
    known.architectures["olmo2"] = dataclasses.replace(spec, gguf=GgufFormat(architecture="olmo2"))
    monkeypatch.setattr(metadata, "plugins", lambda: known)
    assert compare(tiny.tiny_model("olmo2"), tmp_path, 100) < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 100}, r"1/sqrt\(64\); this one has query_pre_attn_scalar=100"),
        (
            "llama",
            {
                "rope_parameters": {
                    **{**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                    "beta_fast": 16,
                }
            },
            "yarn has beta_fast=32, and this model has 16",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(kind, changes, words, tmp_path):
    with pytest.raises(SlothError, match=words):
        export(tiny.tiny_model(kind, **changes), tmp_path / "m", tiny.byte_level("gpt-2"), "f32")
    assert not (tmp_path / "m").exists()
