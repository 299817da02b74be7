"""A model's configuration in GGUF's keys."""

from __future__ import annotations

import re
from typing import Any

from sloth_plugins.registry import ArchitectureSpec, GgufFormat

from ...discovery import plugins
from ...errors import SlothError, nearest
from .rope import Rope, head_dim

# What llama.cpp's reader does by name: it would strip spaces after the special tokens of a "phi-3".
NAMED_TRICKS = re.compile(r"phi-?3", re.IGNORECASE)


def architecture_of(config: Any) -> tuple[ArchitectureSpec, GgufFormat]:
    """The architecture of a config, and how llama.cpp knows it. Raises SlothError where nobody says."""
    spec = plugins().architecture_of(config)
    if spec is not None and spec.gguf is not None:
        return spec, spec.gguf
    known = [kind for spec in plugins().architectures.values() if spec.gguf for kind in spec.model_types]
    kind = str(getattr(config, "model_type", None))
    raise SlothError(f"no GGUF for model_type {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")


def describe_model(config: Any, form: GgufFormat, rope: Rope) -> dict[str, Any]:
    """Values by key below the architecture's, such as `context_length`. Ints, floats, strings, and lists of bools."""
    heads = config.num_attention_heads
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **{key: getattr(config, attribute, None) for key, attribute in form.metadata.items()},
        **rope.metadata,
    }
    kinds = getattr(config, "layer_types", None)
    if form.windowed and kinds:
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds]
    return {key: value for key, value in values.items() if value is not None}


def differences(config: Any, form: GgufFormat) -> list[str]:
    """What llama.cpp will do otherwise than transformers, a line each; raises SlothError where it would be wrong."""
    if form.query_scale is not None:
        scale = getattr(config, form.query_scale)
        by_hidden = config.num_hidden_layers in form.query_scale_by_hidden
        taken = config.hidden_size // config.num_attention_heads if by_hidden else head_dim(config)
        if scale != taken:
            raise SlothError(
                f"llama.cpp scales the queries of a {form.architecture} with {config.num_hidden_layers} layers by "
                f"1/sqrt({taken}); this one has {form.query_scale}={scale}"
            )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and not form.windowed and "sliding_attention" in kinds and window < config.max_position_embeddings:
        return [
            f"llama.cpp has no sliding window for {form.architecture}: answers differ past {window} tokens of context"
        ]
    return []


def neutral_name(name: str) -> str:
    """`name` without what llama.cpp acts upon when it reads it."""
    return NAMED_TRICKS.sub("phi", name) or "model"
