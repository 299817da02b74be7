"""OLMo 2 for sloth-plugins: this file and its entry point are the whole plugin."""

from sloth_plugins.registry import ArchitectureSpec, BlockLayout, Patch, hookimpl

MODELING = "transformers.models.olmo2.modeling_olmo2"
FORWARDS = "sloth_plugins.patches.forwards"
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


@hookimpl
def sloth_architectures():
    layout = BlockLayout(
        layer=f"{MODELING}:Olmo2DecoderLayer",
        attention_norm=None,
        mlp_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        norm_cast="after_weight",
        **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")},
        **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    )
    norm = Patch(
        name="rms_norm", target=f"{MODELING}:Olmo2RMSNorm", replacement=f"{FORWARDS}.rms_norm:cast_after_weight"
    )
    rope = Patch(
        name="rope",
        target=f"{MODELING}:apply_rotary_pos_emb",
        within=f"{MODELING}:Olmo2Attention",
        replacement=f"{FORWARDS}.rope:keep_dtype",
    )
    glu = Patch(name="glu", target=f"{MODELING}:Olmo2MLP", replacement=f"{FORWARDS}.glu:swiglu")
    yield ArchitectureSpec(name="olmo2", model_types=("olmo2",), patches=(norm, rope, glu), layout=layout, tiny=TINY)
