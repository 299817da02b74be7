"""`generate` for a model whose layers are patched: by the decoder where a call allows it, else transformers' own."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..blocks.projection import Refused
from ..kernels.notices import say_once
from .decoder import decode
from .settings import check_left_over, read_settings

Tensor = torch.Tensor
Generate = Callable[..., Any]


def faster(model: Any, original: Generate) -> Generate:
    """A stand-in for `original`, the `generate` of a causal language model or of a PeftModel around one.

    It takes what `original` takes and returns the same tokens: for the most probable ones up to rounding, and drawn
    ones from the same distribution. Where it cannot, `original` runs, and the reason is said once.
    """

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return _attempt(model, *args, **kwargs)
        except Refused as refused:
            say_once(f"generation: {type(model).__name__} generates as transformers does, because {refused}")
        return original(*args, **kwargs)

    return generate


def _attempt(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *others: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    if torch.is_inference_mode_enabled():
        raise Refused("it is in inference mode")
    if any(other is not None for other in others):
        raise Refused("arguments are given by position")
    ids = input_ids if inputs is None else inputs
    language_model = _language_model(model)
    if language_model is not model:
        # As peft's generate does.
        language_model.generation_config = model.generation_config
    config, left_over = language_model._prepare_generation_config(generation_config, **arguments)
    check_left_over(left_over)
    settings = read_settings(config)
    ids, mask = _prompts(ids, attention_mask, config.pad_token_id)
    return decode(language_model, ids, mask, settings)


def _language_model(model: Any) -> Any:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise Refused("it has learned prompts")
    found = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    if not callable(getattr(found, "_prepare_generation_config", None)):
        raise Refused("it is no language model of transformers'")
    if getattr(found.config, "vision_config", None) is not None or getattr(found.config, "is_encoder_decoder", False):
        raise Refused("it is not a language model alone")
    if len(set((getattr(found, "hf_device_map", None) or {}).values())) > 1:
        raise Refused("it is on several devices")
    if _is_sharded(found):
        # Processes whose rows end sooner would leave the others waiting for their part of the weights.
        raise Refused("its weights are sharded over processes")
    return found


def _is_sharded(model: torch.nn.Module) -> bool:
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _prompts(ids: Any, mask: Any, padding: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask [rows, width] in int64. Raises `Refused` for what is not padded on the left, or not at all."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype is not torch.int64 or not ids.numel():
        raise Refused("the prompts are no rows of token ids")
    if mask is None:
        if isinstance(padding, int) and bool((ids == padding).any()):
            raise Refused("there is padding and no attention_mask")
        return ids, torch.ones_like(ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        raise Refused("the attention_mask is not one of the prompts' tokens")
    mask = mask.to(ids)
    if bool((mask[:, -1:] != 1).any()) or bool((mask.diff(dim=1) < 0).any()) or bool(((mask != 0) & (mask != 1)).any()):
        raise Refused("the attention_mask is not one of padding on the left")
    return ids, mask
