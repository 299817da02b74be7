"""A colocated vLLM computes in the dtype in which the trainer does; TRL leaves it to choose, and it halves float32."""

import functools
from collections import Counter
from typing import Any

import torch

from ..trainers.scope import Method, replaced
from .installed import module_of_trl

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def alike(generation: type) -> dict[str, Method]:
    """How TRL's rollouts start, vLLM being told the dtype."""
    return {"_init_vllm": _init_vllm(generation._init_vllm)}  # type: ignore[attr-defined]  # checked by who calls


def refusal(generation: Any) -> str | None:
    """Why vLLM is not told, or None."""
    if generation.mode != "colocate":
        return "a server has chosen its own dtype"
    is_plain = all(torch.is_floating_point(p) for p in generation.model.parameters())
    return None if is_plain else "the base is quantised, and what is not may have another dtype"


alike.refuses = refusal  # type: ignore[attr-defined]  # where the runtime looks


def computing_dtype(model: Any, mixed_precision: str) -> torch.dtype:
    """That of most of a model's frozen weights, or what autocast makes of float32."""
    counts: Counter[torch.dtype] = Counter()
    for param in model.parameters():
        if torch.is_floating_point(param) and not (hasattr(model, "peft_config") and param.requires_grad):
            counts[param.dtype] += param.numel()
    most = counts.most_common(1)[0][0] if counts else torch.get_default_dtype()
    return _AUTOCAST.get(mixed_precision, most) if most == torch.float32 else most


def _init_vllm(original: Method) -> Method:
    @functools.wraps(original)
    def init_vllm(self: Any, *args: Any, **kwargs: Any) -> None:
        trl = module_of_trl()
        if not hasattr(trl, "LLM"):  # without vLLM, TRL says so
            original(self, *args, **kwargs)
            return
        dtype = str(computing_dtype(self.model, str(self.accelerator.mixed_precision))).removeprefix("torch.")
        with replaced(trl, {"LLM": functools.partial(trl.LLM, dtype=dtype)}):
            original(self, *args, **kwargs)

    return init_vllm
