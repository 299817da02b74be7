"""Log-probabilities of completions without the padding around them: a micro-batch as one row of documents.

TRL pads prompts on the left and completions on the right. Each padded token costs what a real one does, and a mask for
it keeps attention from its fastest kernels. TRL's own method runs, on a model that packs what it gets and unpacks what
it returns; so what it computes beside the model's call is its own in every version.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch

from ..blocks.decoder_layer import layout_of
from ..generation.decoder import BY_LENGTH
from ..kernels.notices import say_once
from .scope import Method, causal_lm

Tensor = torch.Tensor
# Transformers makes a mask of tokens by tokens for documents in a row, a byte for each.
MOST_TOKENS = 16384


def unpadded(trainer: type) -> dict[str, Method]:
    """GRPO and RLOO: what computes log-probabilities, for the loss, the rollout and the reference alike."""
    original: Method = trainer._get_per_token_logps_and_entropies  # type: ignore[attr-defined]  # the trainers' own

    @functools.wraps(original)
    def _get_per_token_logps_and_entropies(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        reason = _obstacle(causal_lm(model))
        if reason is not None:
            say_once(f"rollout_unpadded: log-probabilities are computed with padding, because {reason}")
            return original(self, model, *args, **kwargs)
        return original(self, functools.partial(_packed, model), *args, **kwargs)

    return {"_get_per_token_logps_and_entropies": _get_per_token_logps_and_entropies}


def _obstacle(model: Any) -> str | None:
    """Why rows of documents would be slower for a model, or another result; None if they are not."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "vision_config", None) is not None:
        return "it is not a language model alone"
    positions = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if any(kind in positions for kind in BY_LENGTH):
        return "its rotary embedding depends on the length of a row"
    implementation = str(getattr(config, "_attn_implementation", None))
    if implementation.startswith("flash_attention"):
        return None
    if implementation != "sdpa":
        return f"its attention is {implementation}"
    layouts = [layout for module in model.modules() if (layout := layout_of(module)) is not None]
    if not layouts:
        return "its layers are not patched"
    if any(layout.softcap is not None and getattr(config, layout.softcap, None) for layout in layouts):
        return "its attention has a softcap"
    return None


def _has_holes(mask: Tensor) -> bool:
    """Whether tokens of a row [B, S] have others between them that do not count, whose distance a document forgets."""
    begins = torch.diff(mask, dim=1, prepend=torch.zeros_like(mask[:, :1])) > 0
    return bool((begins.sum(1) > 1).any())


def _packed(
    model: Any, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool, **others: Any
) -> Any:
    """The model's `log_probs` and `entropy` [B, S - 1] of rows [B, S], computed as one row of all their real tokens."""
    row, column = attention_mask.nonzero(as_tuple=True)
    count = len(row)
    if others or count == attention_mask.numel() or not 1 < count <= MOST_TOKENS or _has_holes(attention_mask):
        return model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=fused_lm_head, **others
        )
    positions = (attention_mask.cumsum(1) - 1)[row, column]
    # Nothing before the first token of a document predicts it.
    wanted = labels[row, column].masked_fill(positions == 0, -100)
    found = model(
        input_ids=input_ids[row, column][None],
        position_ids=positions[None],
        labels=wanted[None],
        fused_lm_head=fused_lm_head,
    )
    at = (row[1:], column[1:])

    def unpacked(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        # Of the first token there is none; its place, and that of padding, is 0, as where a label is not asked for.
        return values.new_zeros(input_ids.shape).index_put(at, values[0])[:, 1:]

    return SimpleNamespace(log_probs=unpacked(found.log_probs), entropy=unpacked(found.entropy), aux_loss=None)
