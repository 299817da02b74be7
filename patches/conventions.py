"""What most decoder models of transformers have in common, so that a family's file says only what is its own.

A modeling module `transformers.models.NAME.modeling_NAME` has classes `<Prefix>RMSNorm`, `<Prefix>MLP`,
`<Prefix>Attention`, `<Prefix>DecoderLayer`, `<Prefix>Model` and `<Prefix>ForCausalLM`, and a function
`apply_rotary_pos_emb`.
"""

from collections.abc import Mapping
from typing import Any

from sloth_plugins.registry import BlockLayout, Patch

FORWARDS = "sloth_plugins.patches.forwards"
# Names in transformers' ACT2FN that the activation kernels compute.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")
GGUF_WINDOW = {"attention.sliding_window": "sliding_window"}
TINY: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def modeling(name: str) -> str:
    """The modeling module of a model type."""
    return f"transformers.models.{name}.modeling_{name}"


def rms_norm(module: str, prefix: str, order: str = "cast_before_weight", **differences: Any) -> Patch:
    """`<Prefix>RMSNorm`, `order` being a factory of forwards/rms_norm.py."""
    return Patch(
        name="rms_norm",
        target=f"{module}:{prefix}RMSNorm",
        replacement=f"{FORWARDS}.rms_norm:{order}",
        summary="RMSNorm in one kernel each way",
        **differences,
    )


def rope(module: str, prefix: str, kind: str = "promote", **differences: Any) -> Patch:
    """`apply_rotary_pos_emb` within `<Prefix>Attention`, `kind` being a factory of forwards/rope.py."""
    with_norms = "with the norms before it, " if kind.endswith("after_norm") else ""
    return Patch(
        name="rope",
        target=f"{module}:apply_rotary_pos_emb",
        within=f"{module}:{prefix}Attention",
        replacement=f"{FORWARDS}.rope:{kind}",
        summary=f"rotary embedding of q and k, {with_norms}in one kernel each way",
        **differences,
    )


def glu(module: str, prefix: str, kind: str = "gated", activation: str = "hidden_act", **differences: Any) -> Patch:
    """`<Prefix>MLP`, `kind` being a factory of forwards/glu.py and `activation` the config attribute that names it."""
    return Patch(
        name="glu",
        target=f"{module}:{prefix}MLP",
        replacement=f"{FORWARDS}.glu:{kind}",
        where={activation: ACTIVATIONS},
        summary="gate, activation and product in one kernel each way, the product never kept",
        **differences,
    )


def cross_entropy(module: str, prefix: str, **differences: Any) -> Patch:
    """`<Prefix>ForCausalLM`, whose forward ends in its output embeddings."""
    return Patch(
        name="cross_entropy",
        target=f"{module}:{prefix}ForCausalLM",
        replacement=f"{FORWARDS}.causal_lm:cross_entropy",
        summary="the loss from hidden states in chunks; logits only where they are read",
        **differences,
    )


def layout(module: str, prefix: str, **differences: Any) -> BlockLayout:
    """Llama's block, with `differences`; a part given as None is one that the family does not have."""
    parts = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")},
        **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }
    called = {
        "replaces": tuple(
            f"{module}:{name}" for name in (f"{prefix}Attention.forward", f"{prefix}MLP", "apply_rotary_pos_emb")
        )
    }
    return BlockLayout(layer=f"{module}:{prefix}DecoderLayer", **{**parts, **called, **differences})
