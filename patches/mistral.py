"""Mistral: Mistral 7B and Nemo, Ministral; sliding windows, heads whose size is not hidden_size / heads."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, GgufFormat, hookimpl

from .conventions import GGUF_WINDOW, TINY, cross_entropy, glu, layout, modeling, rms_norm, rope


def _mistral(name: str, prefix: str) -> ArchitectureSpec:
    module = modeling(name)
    return ArchitectureSpec(
        name=name,
        family="mistral",
        model_types=(name,),
        patches=(rms_norm(module, prefix), rope(module, prefix), glu(module, prefix), cross_entropy(module, prefix)),
        layout=layout(module, prefix, sliding_window="sliding_window"),
        backbone=f"{module}:{prefix}Model",
        tiny={**TINY, "head_dim": 16, "sliding_window": 8},
        gguf=GgufFormat(architecture="llama", permuted=True, metadata=GGUF_WINDOW),
    )


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Mistral and Ministral."""
    yield _mistral("mistral", "Mistral")
    yield _mistral("ministral", "Ministral")
