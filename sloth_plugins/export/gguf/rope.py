"""Rotary embeddings in llama.cpp's terms: keys of metadata, and tensors of factors by which it divides frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import SlothError, nearest

SAME_EVERYWHERE = "full_attention"
LOCAL = "sliding_attention"


@dataclass(slots=True)
class Rope:
    """Keys below the architecture's, e.g. `rope.freq_base`; tensors of fp32 [rotary dims / 2]; what is not the same."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def head_dim(config: Any) -> int:
    """The size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """By type of layer, the parameters of its rotary embedding with `rope_theta`; `full_attention` is always there.

    transformers 5 keeps them in `rope_parameters`, for all layers or by type; before, `rope_theta` stood beside
    `rope_scaling`, and Gemma 3's local layers had `rope_local_base_freq`.
    """
    found = getattr(config, "rope_parameters", None)
    if isinstance(found, Mapping) and SAME_EVERYWHERE in found:
        return {kind: dict(values) for kind, values in found.items() if isinstance(values, Mapping)}
    if not isinstance(found, Mapping):
        found = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    result = {SAME_EVERYWHERE: dict(found)}
    local = getattr(config, "rope_local_base_freq", None)
    if local is not None:
        result[LOCAL] = {"rope_theta": local}
    return result


def describe_rope(config: Any) -> Rope:
    """What llama.cpp must know. Raises SlothError for a scaling that it cannot do."""
    by_kind = rope_parameters(config)
    values = by_kind[SAME_EVERYWHERE]
    dims = int(head_dim(config) * float(values.get("partial_rotary_factor") or partial_rotary_factor(config)))
    rope = Rope({"rope.dimension_count": dims, "rope.freq_base": float(values["rope_theta"])})
    if LOCAL in by_kind:
        rope.metadata["rope.freq_base_swa"] = float(by_kind[LOCAL]["rope_theta"])
        _must_be_plain(by_kind[LOCAL])
    kind = _kind(values)
    if kind not in SCALINGS:
        raise SlothError(
            f"llama.cpp has no rope scaling {kind!r}{nearest(kind, SCALINGS)}; it has {', '.join(SCALINGS)}"
        )
    SCALINGS[kind](rope, config, values, dims)
    return rope


def partial_rotary_factor(config: Any) -> float:
    """The share of a head's dimensions that turn."""
    return float(getattr(config, "partial_rotary_factor", None) or 1.0)


def _kind(values: Mapping[str, Any]) -> str:
    return str(values.get("rope_type") or values.get("type") or "default")


def _must_be_plain(values: Mapping[str, Any]) -> None:
    if _kind(values) != "default":
        raise SlothError(
            f"llama.cpp does not scale the rotary embedding of local layers; this one is {_kind(values)!r}"
        )


def _original_context(config: Any, values: Mapping[str, Any]) -> int:
    found = values.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def _default(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    pass


def _linear(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    rope.metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(values["factor"])}


def _dynamic(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    rope.notes.append(
        f"llama.cpp has no dynamic rope scaling: past {config.max_position_embeddings} tokens its answers differ"
    )


def _llama3(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    """Frequencies by wavelength: short ones stay, long ones are divided by the factor, between them it is blended.

    Source: Llama 3.1's reference code, as described in transformers' documentation of rope_type `llama3`.
    """
    base, factor = float(values["rope_theta"]), float(values["factor"])
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    context = _original_context(config, values)
    factors = []
    for pair in range(dims // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / dims)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            kept = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - kept) / factor + kept))
    rope.tensors["rope_freqs.weight"] = factors


def _yarn(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    """llama.cpp blends between 32 and 1 turns, and scales by 1 + ln(factor) / 10 times `attn_factor`."""
    for key, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        given = values.get(key)
        if given is not None and given != fixed:
            raise SlothError(f"llama.cpp's yarn has {key}={fixed}, and this model has {given}")
    factor = float(values["factor"])
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    asked = values.get("attention_factor")
    if asked is None and values.get("mscale") and values.get("mscale_all_dim"):
        scales = [1 + 0.1 * float(values[key]) * math.log(factor) for key in ("mscale", "mscale_all_dim")]
        asked = scales[0] / scales[1]
    rope.metadata |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original_context(config, values),
    }
    if asked is not None:
        rope.metadata["rope.scaling.attn_factor"] = float(asked) / usual


def _longrope(rope: Rope, config: Any, values: Mapping[str, Any], dims: int) -> None:
    """Factors for short and for long contexts, of which llama.cpp takes one by the size of its context."""
    context = _original_context(config, values)
    stretch = config.max_position_embeddings / context
    asked = values.get("attention_factor")
    if asked is None:
        stretch = float(values.get("factor") or stretch)
        asked = math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0
    rope.metadata |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": context,
        "rope.scaling.attn_factor": float(asked),
    }
    for name in ("long", "short"):
        factors = [float(value) for value in values[f"{name}_factor"]]
        if len(factors) != dims // 2:
            raise SlothError(f"{name}_factor has {len(factors)} values; the rotary embedding needs {dims // 2}")
        rope.tensors[f"rope_factors_{name}.weight"] = factors
    rope.notes.append(
        f"llama.cpp takes the long rope factors for a context of more than {context} tokens, whatever the text's length"
    )


SCALINGS = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "dynamic": _dynamic,
}
