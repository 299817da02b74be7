"""One base for trainer and vLLM: frozen parameters of the trained model become views of vLLM's tensors.

It is done where vLLM starts, after its weights were compared to those that are trained, for all parameters or none.
What the trainer had is freed. As both are one from then on, nobody may merge an adapter into it while it serves; who
loads weights into vLLM, as TRL does where it merges, ends it first.
"""

import functools
from typing import Any

import torch

from ..kernels.notices import say_once
from ..trainers.scope import Method
from . import swap
from .engine import itself
from .mapping import Pair, Unmapped, pairs


def shared(generation: type) -> dict[str, Method]:
    """How TRL's rollouts start, the base being shared then."""
    return {"_init_vllm": _init_vllm(generation._init_vllm)}  # type: ignore[attr-defined]  # checked by who calls


def refusal(generation: Any) -> str | None:
    """Why the base is not shared, or None."""
    return "a server is another process" if generation.mode != "colocate" else swap.refusal(generation)


shared.refuses = refusal  # type: ignore[attr-defined]  # where the runtime looks


def _init_vllm(original: Method) -> Method:
    @functools.wraps(original)
    def init_vllm(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        reason = share(self.model, self.llm)
        if reason is not None:
            say_once(f"rollouts: the base is held twice, by trainer and vLLM, since {reason}")

    return init_vllm


def share(model: Any, llm: Any) -> str | None:
    """Share the base of a model with an engine in this process; returns why that cannot be done, or None."""
    if not hasattr(llm, "take"):
        return "vllm_lora_swap does not run, without which TRL merges the adapter into it"
    try:
        found = pairs(model, llm.apply_model(itself)[0])
    except Unmapped as error:
        return str(error)
    freed = sum(storage.nbytes() for storage in {id(s): s for s in map(_storage, found)}.values())
    for pair in found:
        pair.param.data = pair.rows
    assert all(pair.param.data_ptr() == pair.rows.data_ptr() for pair in found), "checked before anything was freed"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    llm.before_loading = functools.partial(_separate, llm, found)
    say_once(f"rollouts: trainer and vLLM share {len(found)} tensors of the base; {_size(freed)} are freed")
    return None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _storage(pair: Pair) -> torch.UntypedStorage:
    return pair.param.untyped_storage()


def _separate(llm: Any, found: list[Pair]) -> None:
    """Give the trainer a base of its own again."""
    llm.before_loading = None
    for pair in found:
        if pair.param.data_ptr() == pair.rows.data_ptr():
            pair.param.data = pair.rows.clone()
    say_once("rollouts: trainer and vLLM no longer share the base, since weights are loaded into vLLM")
