"""Gemma 1, 2 and 3: norms with weight + 1 in fp32, GeGLU, from Gemma 2 on four norms a layer; Gemma 3 norms q and k."""

from collections.abc import Iterator, Mapping
from typing import Any

from sloth_plugins.registry import ArchitectureSpec, GgufFormat, hookimpl

from .conventions import GGUF_WINDOW, TINY, cross_entropy, glu, layout, modeling, rms_norm, rope

GEMMA, GEMMA2, GEMMA3 = modeling("gemma"), modeling("gemma2"), modeling("gemma3")
NORM = {"norm_offset": 1.0, "norm_cast": "after_weight"}
FOUR_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
WINDOW = {"sliding_window": "sliding_window"}
SOFTCAPPED: Mapping[str, Any] = {
    "metadata": {
        **GGUF_WINDOW,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "windowed": True,
    "query_scale": "query_pre_attn_scalar",
}
ALTERNATING = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Gemma, Gemma 2, and Gemma 3's language model."""
    yield ArchitectureSpec(
        name="gemma",
        family="gemma",
        model_types=("gemma",),
        patches=(
            rms_norm(GEMMA, "Gemma", "offset_one"),
            rope(GEMMA, "Gemma"),
            glu(GEMMA, "Gemma"),
            cross_entropy(GEMMA, "Gemma"),
        ),
        layout=layout(GEMMA, "Gemma", activation="gelu_tanh", **NORM),
        backbone=f"{GEMMA}:GemmaModel",
        tiny={**TINY, "head_dim": 16},
        gguf=GgufFormat(architecture="gemma"),
    )
    yield ArchitectureSpec(
        name="gemma2",
        family="gemma",
        model_types=("gemma2",),
        patches=(
            rms_norm(GEMMA2, "Gemma2", "offset_one"),
            rope(GEMMA2, "Gemma2"),
            glu(GEMMA2, "Gemma2", activation="hidden_activation"),
            cross_entropy(GEMMA2, "Gemma2"),
        ),
        layout=layout(
            GEMMA2,
            "Gemma2",
            activation="gelu_tanh",
            softcap="attn_logit_softcapping",
            **NORM,
            **FOUR_NORMS,
            **WINDOW,
        ),
        backbone=f"{GEMMA2}:Gemma2Model",
        tiny={**TINY, **ALTERNATING},
        gguf=GgufFormat(architecture="gemma2", query_scale_by_hidden=(46,), **SOFTCAPPED),
    )
    yield ArchitectureSpec(
        name="gemma3",
        family="gemma",
        model_types=("gemma3_text",),
        patches=(
            rms_norm(GEMMA3, "Gemma3", "offset_one"),
            rope(GEMMA3, "Gemma3", "promote_after_norm"),
            glu(GEMMA3, "Gemma3", activation="hidden_activation"),
            cross_entropy(GEMMA3, "Gemma3"),
        ),
        layout=layout(
            GEMMA3,
            "Gemma3",
            activation="gelu_tanh",
            q_norm="self_attn.q_norm",
            k_norm="self_attn.k_norm",
            # Before, the layer chose between two rotary embeddings itself.
            requires=("transformers>=5",),
            **NORM,
            **FOUR_NORMS,
            **WINDOW,
        ),
        backbone=f"{GEMMA3}:Gemma3TextModel",
        tiny={**TINY, **ALTERNATING},
        gguf=GgufFormat(architecture="gemma3", query_scale_by_hidden=(62,), **SOFTCAPPED),
    )
