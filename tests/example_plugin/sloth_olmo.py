"""OLMo 2 for sloth-plugins: this file and its entry point are the whole plugin."""

from sloth_plugins.patches.conventions import TINY, cross_entropy, glu, layout, modeling, rms_norm, rope
from sloth_plugins.registry import ArchitectureSpec, hookimpl

OLMO2 = modeling("olmo2")


@hookimpl
def sloth_architectures():
    yield ArchitectureSpec(
        name="olmo2",
        model_types=("olmo2",),
        patches=(
            rms_norm(OLMO2, "Olmo2", "cast_after_weight"),
            rope(OLMO2, "Olmo2", "keep_dtype"),
            glu(OLMO2, "Olmo2"),
            cross_entropy(OLMO2, "Olmo2"),
        ),
        layout=layout(
            OLMO2,
            "Olmo2",
            attention_norm=None,
            mlp_norm=None,
            attention_output_norm="post_attention_layernorm",
            mlp_output_norm="post_feedforward_layernorm",
            norm_cast="after_weight",
            q_norm="self_attn.q_norm",
            k_norm="self_attn.k_norm",
        ),
        tiny=TINY,
    )
