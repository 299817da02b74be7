"""The types of GGUF files by the names that users give them: what we write ourselves and what llama.cpp makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import SlothError, nearest

# Written by gguf's own quantiser; the value is the GGML type of all matrices.
WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
# Made by llama.cpp of a written file, mixed types by its own rules. Those that need an importance matrix are left out.
MADE = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m"),
    *("q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
)


def parse_methods(methods: str | Iterable[str] | None) -> list[str]:
    """The methods in order, each once: words, with commas or in a list; q8_0 for None.

    Raises SlothError for one that is not known.
    """
    given = [methods] if isinstance(methods, str) else ["q8_0"] if methods is None else methods
    words = [word for words in given for word in str(words).split(",")]
    known = (*WRITTEN, *MADE)
    found: dict[str, None] = {}
    for word in words:
        name = word.strip().lower()
        if name not in known:
            raise SlothError(f"no quantization {word.strip()!r}{nearest(name, known)}; known: {', '.join(known)}")
        found[name] = None
    if not found:
        raise SlothError(f"no quantization was named; known: {', '.join(known)}")
    return list(found)


def base_method(config: Any, methods: Iterable[str]) -> str:
    """Of what llama.cpp quantises: a 16-bit method that is asked for anyway, else the type that the model is in."""
    import torch

    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    stored = str(stored).removeprefix("torch.") if isinstance(stored, str | torch.dtype) else "bfloat16"
    own = {"float32": "f32", "float16": "f16"}.get(stored, "bf16")
    return next((method for method in ("f32", own) if method in methods), own)


def file_type(method: str) -> int:
    """`general.file_type`: llama.cpp's number of the mix."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if method == "f32" else f"MOSTLY_{method.upper()}"])
