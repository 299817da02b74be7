"""One tensor of a checkpoint as llama.cpp wants it: its name, its order of rows, its type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SlothError

if TYPE_CHECKING:
    import numpy

    from sloth_plugins.registry import ArchitectureSpec, GgufFormat

# Buffers of old checkpoints: llama.cpp computes them.
NOT_WRITTEN = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
CHUNK = 16 * 1024 * 1024
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_names(names: Iterable[str], form: GgufFormat, layers: int) -> dict[str, str]:
    """GGUF's name for each of a checkpoint's, layer by layer. Raises SlothError for names that llama.cpp has not."""
    import gguf

    by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if form.architecture not in by_name:
        raise SlothError(f"the installed gguf has no architecture {form.architecture!r}; pip install -U gguf")
    known = gguf.get_tensor_name_map(by_name[form.architecture], layers)
    found, unknown = {}, []
    for name in names:
        if name.endswith(NOT_WRITTEN):
            continue
        to = form.tensors.get(name) or known.get_name(name, (".weight", ".bias"))
        if to is None:
            unknown.append(name)
        else:
            found[name] = to
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise SlothError(f"llama.cpp's {form.architecture} has no tensor for {unknown[0]!r}{more}")
    return dict(sorted(found.items(), key=lambda item: _natural(item[1])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The GGML type of a tensor where `wanted` is that of the file: vectors stay F32, rows that do not divide F16."""
    import gguf

    if len(shape) < 2:
        return "F32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
    return wanted if shape[-1] % block == 0 else "F16"


def byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape of a tensor of that GGML type as bytes."""
    import gguf

    return tuple(gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[kind]))


def prepare(name: str, tensor: torch.Tensor, spec: ArchitectureSpec, form: GgufFormat, config: Any) -> torch.Tensor:
    """The values that llama.cpp wants: norms with their offset, rows of q and k in its order."""
    offset = spec.layout.norm_offset if spec.layout is not None else 0.0
    if offset and name.endswith("norm.weight"):
        return tensor.float() + offset
    if form.permuted and ".q_proj." in name:
        return neighbours(tensor, config.num_attention_heads)
    if form.permuted and ".k_proj." in name:
        return neighbours(tensor, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return tensor


def neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * dim, ...] so that what turns together, row i and i + dim / 2 of each head, lies side by side."""
    dim = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def require_range(name: str, tensor: torch.Tensor, kind: str) -> None:
    """Raise SlothError unless every value is finite, and stays so in that GGML type."""
    low, high = tensor.aminmax()
    largest = torch.maximum(-low, high).float()
    if not largest.isfinite():
        raise SlothError(f"{name} holds NaN or infinite values: a file is damaged, or training diverged")
    # A block of Q8_0 is 127 steps of a scale in F16. Rounding keeps the order, so the largest value speaks for all.
    stored = (largest / 127).half() if kind == "Q8_0" else largest.to(TORCH_TYPES[kind])
    if not stored.isfinite():
        raise SlothError(f"{name} has values beyond {kind}; choose f32 (K-quants are made of it too where both are)")


def encode(tensor: torch.Tensor, kind: str) -> numpy.ndarray[Any, Any]:
    """The bytes of a tensor in a GGML type, [..., bytes of a row]; a rounded copy at most, and a chunk in fp32."""
    import gguf
    import numpy

    if kind in TORCH_TYPES:
        return tensor.to(TORCH_TYPES[kind]).contiguous().view(torch.uint8).numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    result = numpy.empty(byte_shape(tuple(rows.shape), kind), dtype=numpy.uint8)
    step = max(1, CHUNK // rows.shape[-1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].float().numpy()
        result[start : start + step] = gguf.quantize(chunk, gguf.GGMLQuantizationType[kind])
    return result.reshape(byte_shape(tuple(tensor.shape), kind))
