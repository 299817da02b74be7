"""Llama: `config.model_type == "llama"` (Llama 2 and 3.x, TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama ...)."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, BlockLayout, Patch, hookimpl

MODELING = "transformers.models.llama.modeling_llama"
FORWARDS = "sloth_plugins.patches.forwards"

LLAMA = ArchitectureSpec(
    name="llama",
    model_types=("llama",),
    requires=("transformers>=4.57.6",),
    patches=(
        Patch(
            name="rms_norm",
            target=f"{MODELING}:LlamaRMSNorm",
            replacement=f"{FORWARDS}.rms_norm:cast_before_weight",
            summary="RMSNorm in one kernel each way",
        ),
        Patch(
            name="rope",
            target=f"{MODELING}:apply_rotary_pos_emb",
            within=f"{MODELING}:LlamaAttention",
            replacement=f"{FORWARDS}.rope:promote",
            summary="rotary embedding of q and k in one kernel each way",
        ),
        Patch(
            name="glu",
            target=f"{MODELING}:LlamaMLP",
            replacement=f"{FORWARDS}.glu:swiglu",
            where={"hidden_act": ("silu", "swish")},
            summary="SwiGLU in one kernel each way, its product never kept",
        ),
    ),
    layout=BlockLayout(
        layer=f"{MODELING}:LlamaDecoderLayer",
        attention_norm="input_layernorm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    tiny={
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 128,
    },
)


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Llama."""
    yield LLAMA
