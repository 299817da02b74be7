"""Phi: Phi-3, 3.5 and 4 with fused projections and partial rotary, Phi-1.5 and 2 with LayerNorm and a plain MLP."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, GgufFormat, Patch, hookimpl

from .conventions import ACTIVATIONS, FORWARDS, GGUF_WINDOW, TINY, cross_entropy, glu, layout, modeling, rms_norm, rope

PHI, PHI3 = modeling("phi"), modeling("phi3")
SEPARATE = dict.fromkeys(("q", "k", "v", "gate", "up"))


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Phi-3 to 4, and Phi-1.5 and 2."""
    yield ArchitectureSpec(
        name="phi3",
        family="phi",
        model_types=("phi3",),
        patches=(
            rms_norm(PHI3, "Phi3"),
            rope(PHI3, "Phi3", "partial"),
            glu(PHI3, "Phi3", "gated_fused"),
            cross_entropy(PHI3, "Phi3"),
        ),
        layout=layout(
            PHI3,
            "Phi3",
            **{**SEPARATE, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
            rotary="partial_half",
            sliding_window="sliding_window",
        ),
        backbone=f"{PHI3}:Phi3Model",
        tiny={**TINY, "original_max_position_embeddings": 128},
        gguf=GgufFormat(
            architecture="phi3",
            metadata={**GGUF_WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"},
        ),
    )
    yield ArchitectureSpec(
        name="phi",
        family="phi",
        model_types=("phi",),
        patches=(
            Patch(
                name="layer_norm",
                target="torch.nn.modules.normalization:LayerNorm",
                replacement=f"{FORWARDS}.layer_norm:layer_norm",
                summary="LayerNorm in one kernel each way",
            ),
            rope(PHI, "Phi"),
            Patch(
                name="mlp",
                target=f"{PHI}:PhiMLP",
                replacement=f"{FORWARDS}.mlp:plain",
                where={"hidden_act": ACTIVATIONS},
                summary="the activation in one kernel each way",
            ),
            cross_entropy(PHI, "Phi"),
        ),
        layout=layout(
            PHI,
            "Phi",
            mlp_norm=None,
            gate=None,
            o="self_attn.dense",
            up="mlp.fc1",
            down="mlp.fc2",
            norm="layer",
            activation="gelu_tanh",
            rotary="partial_half",
            residual="parallel",
        ),
        backbone=f"{PHI}:PhiModel",
        tiny=TINY,
    )
