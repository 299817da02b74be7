"""Llama: Llama 2 and 3.x, TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama and others of `model_type` llama."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, GgufFormat, hookimpl

from .conventions import TINY, cross_entropy, glu, layout, modeling, rms_norm, rope

LLAMA = modeling("llama")


@hookimpl
def sloth_architectures() -> Iterator[ArchitectureSpec]:
    """Llama."""
    yield ArchitectureSpec(
        name="llama",
        model_types=("llama",),
        patches=(rms_norm(LLAMA, "Llama"), rope(LLAMA, "Llama"), glu(LLAMA, "Llama"), cross_entropy(LLAMA, "Llama")),
        layout=layout(LLAMA, "Llama"),
        backbone=f"{LLAMA}:LlamaModel",
        tiny=TINY,
        gguf=GgufFormat(architecture="llama", permuted=True),
    )
