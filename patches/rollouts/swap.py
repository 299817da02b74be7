"""The adapter that is trained goes to vLLM as an adapter; TRL merges it into the base, loads all of it and unmerges."""

import functools
from typing import Any

import torch

from ..kernels.notices import say_once
from ..trainers.scope import Method, replaced
from .adapter import collect, largest_rank, obstacle
from .engine import AdapterRefused, base_of, serve
from .installed import lora_ranks, module_of_trl, untested
from .server import serving


def swapped(generation: type) -> dict[str, Method]:
    """How TRL's rollouts start and get weights, for a model with a LoRA adapter."""
    return {
        "_init_vllm": _init_vllm(generation._init_vllm),  # type: ignore[attr-defined]  # checked by who calls
        "sync_weights": _sync_weights(generation.sync_weights),  # type: ignore[attr-defined]
    }


def refusal(generation: Any) -> str | None:
    """Why rollouts with these arguments get their weights as TRL has it, or None."""
    if generation.enable_sleep_mode:
        return "sleep mode drops vLLM's base, which only TRL's own sync brings back"
    if generation.mode == "colocate" and generation.tensor_parallel_size != 1:
        return f"it was not tested with tensor_parallel_size={generation.tensor_parallel_size}"
    kind = str(generation.accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return f"weights are sharded ({kind})"
    reason = obstacle(generation.model) or untested()
    if reason is None and largest_rank(generation.model) > lora_ranks()[-1]:
        return f"rank {largest_rank(generation.model)} is above vLLM's maximum, {lora_ranks()[-1]}"
    return reason


swapped.refuses = refusal  # type: ignore[attr-defined]  # where the runtime looks


def _init_vllm(original: Method) -> Method:
    @functools.wraps(original)
    def init_vllm(self: Any, *args: Any, **kwargs: Any) -> None:
        trl = module_of_trl()
        rank = min(size for size in lora_ranks() if size >= largest_rank(self.model))
        # Two, as the new one is there before the old one goes.
        options = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
        made = {"LLM": functools.partial(trl.LLM, **options), "VLLMClient": serving(trl.VLLMClient)}
        with replaced(trl, made):
            original(self, *args, **kwargs)
        if self.mode == "colocate":
            serve(self.llm)
            _load_base(self)

    return init_vllm


def _load_base(generation: Any) -> None:
    """Once, since what vLLM has read from disk need not be what the trainer has in memory."""
    model = generation.model
    is_plain = all(torch.is_floating_point(p) for p in model.parameters())
    reason = generation.llm.load_base(base_of(model)) if is_plain else "it is quantised"
    if reason is not None:
        say_once(f"rollouts: the base is taken from {model.name_or_path} as it is on disk, since {reason}")


def _give(generation: Any) -> None:
    """Hand the adapter to who generates with it."""
    if generation.mode == "colocate":
        if not generation.llm.holds_base:
            _load_base(generation)
        generation.llm.take(collect(generation.model))
    elif generation.accelerator.is_main_process:
        generation.vllm_client.take(collect(generation.model))


def _sync_weights(original: Method) -> Method:
    @functools.wraps(original)
    def sync_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        # The one that had been refused is not offered again.
        if getattr(self, "_sloth_refused", False) or obstacle(self.model) is not None:
            original(self, *args, **kwargs)
            return
        try:
            _give(self)
        except AdapterRefused as error:
            say_once(f"rollouts: weights are merged and loaded as TRL does it, since vLLM refuses the adapter: {error}")
            self._sloth_refused = True
            original(self, *args, **kwargs)

    return sync_weights
