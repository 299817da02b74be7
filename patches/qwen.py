"""Qwen: Qwen 2 and 2.5 (with DeepSeek-R1-Distill-Qwen), Qwen 3, and the language model of Qwen 2.5-VL."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, GgufFormat, hookimpl

from .conventions import GGUF_WINDOW, TINY, cross_entropy, glu, layout, modeling, rms_norm, rope

QWEN2, QWEN3, QWEN2_5_VL = modeling("qwen2"), modeling("qwen3"), modeling("qwen2_5_vl")
WINDOW = {"sliding_window": "sliding_window"}
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
TINY_VL_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Qwen 2 and 2.5, Qwen 3, Qwen 2.5-VL."""
    yield ArchitectureSpec(
        name="qwen2",
        family="qwen",
        model_types=("qwen2",),
        patches=(rms_norm(QWEN2, "Qwen2"), rope(QWEN2, "Qwen2"), glu(QWEN2, "Qwen2"), cross_entropy(QWEN2, "Qwen2")),
        layout=layout(QWEN2, "Qwen2", **WINDOW),
        backbone=f"{QWEN2}:Qwen2Model",
        tiny=TINY,
        gguf=GgufFormat(architecture="qwen2", metadata=GGUF_WINDOW),
    )
    yield ArchitectureSpec(
        name="qwen3",
        family="qwen",
        model_types=("qwen3",),
        patches=(
            rms_norm(QWEN3, "Qwen3"),
            rope(QWEN3, "Qwen3", "promote_after_norm"),
            glu(QWEN3, "Qwen3"),
            cross_entropy(QWEN3, "Qwen3"),
        ),
        layout=layout(QWEN3, "Qwen3", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", **WINDOW),
        backbone=f"{QWEN3}:Qwen3Model",
        tiny={**TINY, "head_dim": 16},
        gguf=GgufFormat(architecture="qwen3", metadata=GGUF_WINDOW),
    )
    yield ArchitectureSpec(
        name="qwen2_5_vl",
        family="qwen",
        model_types=("qwen2_5_vl_text",),
        patches=(
            rms_norm(QWEN2_5_VL, "Qwen2_5_VL", formerly=(f"{QWEN2}:Qwen2RMSNorm",)),
            # Before, cos and sin came in three sections, which the attention put together inside the function.
            rope(QWEN2_5_VL, "Qwen2_5_VL", requires=("transformers>=5.17",)),
            glu(QWEN2_5_VL, "Qwen2"),
        ),
        layout=layout(
            QWEN2_5_VL,
            "Qwen2_5_VL",
            replaces=(f"{QWEN2_5_VL}:Qwen2_5_VLAttention.forward", f"{QWEN2_5_VL}:Qwen2MLP"),
            # Before, the rotary embedding came in three sections.
            requires=("transformers>=5.17",),
            **WINDOW,
        ),
        backbone=f"{QWEN2_5_VL}:Qwen2_5_VLTextModel",
        tiny={
            "model_type": "qwen2_5_vl",
            "text_config": {**TINY, "rope_scaling": MROPE, "rope_parameters": MROPE},
            "vision_config": TINY_VL_VISION,
            **{f"{kind}_token_id": 90 + n for n, kind in enumerate(("image", "video", "vision_start", "vision_end"))},
        },
    )
