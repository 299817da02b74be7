"""What the checkpoints of a family differ in: rope scaling, biases, tied embeddings, windows, norms of q and k."""

import pytest
import torch
from models import KNOWN, assert_close, build, gradients

import sloth_plugins

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5, 2, 2.5, 3, 4, 5]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def scaled(rope, **more):
    """A rope setting under both of the names that upstream has had for it."""
    return {"rope_scaling": dict(rope), "rope_parameters": {"rope_theta": 10000.0, **rope}, **more}


VARIANTS = {
    "llama3 rope": ("llama", "llama", scaled(LLAMA3)),
    "yarn rope": ("llama", "llama", scaled(YARN)),
    "linear rope": ("llama", "llama", scaled({"rope_type": "linear", "factor": 2.0})),
    "dynamic rope": ("llama", "llama", scaled({"rope_type": "dynamic", "factor": 2.0})),
    "tied embeddings": ("llama", "llama", {"tie_word_embeddings": True}),
    "biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "one kv head": ("llama", "llama", {"num_key_value_heads": 1}),
    "gelu instead of silu": ("llama", "llama", {"hidden_act": "gelu"}),
    "mistral without a window": ("mistral", "mistral", {"sliding_window": None}),
    "mistral, odd head size": ("mistral", "mistral", {"head_dim": 10}),
    "qwen2, window in some layers": (
        "qwen2",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2, tied": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3, attention bias": ("qwen3", "qwen3", {"attention_bias": True}),
    "qwen3, yarn": ("qwen3", "qwen3", scaled(YARN)),
    "gemma2 without softcaps": ("gemma2", "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2, eager": ("gemma2", "gemma2", {"attn_implementation": "eager"}),
    "gemma3, all layers global": ("gemma3", "gemma3_text", {"layer_types": ["full_attention"] * 2}),
    "phi3, partial rotary": (
        "phi3",
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3, longrope": ("phi3", "phi3", scaled(LONG, original_max_position_embeddings=16)),
    "phi3, window": ("phi3", "phi3", {"sliding_window": 6}),
    "phi, norms of q and k": ("phi", "phi", {"qk_layernorm": True}),
    "phi, whole rotary": (
        "phi",
        "phi",
        {
            "partial_rotary_factor": 1.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_as_stock_does(variant):
    architecture, kind, changes = VARIANTS[variant]
    stock, model = build(architecture, kind, **changes), build(architecture, kind, **changes)
    report = sloth_plugins.patch(model, "1")
    assert {outcome.state for outcome in report.outcomes} == {"applied"}
    assert {outcome.patch for outcome in report.outcomes} == {p.name for p in KNOWN.patches(architecture) if p.default}
    ids = torch.randint(3, 90, (2, 41), generator=torch.Generator().manual_seed(3))
    # Padding on the left, as generation has it, and on the right, as training has.
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, -5:] = 0
    assert_close(gradients(model, ids), gradients(stock, ids), factor=100)
    assert_close(gradients(model, ids, attention_mask=mask), gradients(stock, ids, attention_mask=mask), factor=100)


def part(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_the_layout_is_the_layers_own(architecture):
    """Every part that a layout names is there, and every projection and norm of a layer is named."""
    name, kind = architecture
    layout = KNOWN.architectures[name].layout
    model = build(name, kind)
    _, _, layer_class = layout.layer.partition(":")
    (layer, *_) = [module for module in model.modules() if type(module).__name__ == layer_class]
    projections = (
        layout.q,
        layout.k,
        layout.v,
        layout.qkv,
        layout.o,
        layout.gate,
        layout.up,
        layout.gate_up,
        layout.down,
    )
    norms = (
        *(layout.attention_norm, layout.attention_output_norm, layout.mlp_norm, layout.mlp_output_norm),
        *(layout.q_norm, layout.k_norm),
    )
    named = {part(layer, path): path for path in (*projections, *norms) if path is not None}
    assert {m for m in layer.modules() if isinstance(m, torch.nn.Linear)} == {
        part(layer, path) for path in projections if path is not None
    }
    kinds = {"rms": "RMSNorm", "layer": "LayerNorm"}
    assert {m for m in layer.modules() if type(m).__name__.endswith(kinds[layout.norm])} == {
        part(layer, path) for path in norms if path is not None
    }
    assert len(named) == sum(path is not None for path in (*projections, *norms))
    for attribute in filter(None, (layout.softcap, layout.sliding_window)):
        assert hasattr(model.config, attribute)
    (norm, *_) = [part(layer, path) for path in norms if path is not None]
    # Gemma's weights are kept around zero.
    assert float(norm.weight.detach().mean()) == (1.0 - layout.norm_offset)
