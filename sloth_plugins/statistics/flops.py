"""What a training step must compute: the products of its model, from shapes, for the tokens of its batches.

A matrix [in, out] costs 2*in*out FLOPs a token forward, as much for the gradient of its input where something before it
is trained, and as much for its own gradient where it is. Attention costs 4*heads*head_dim a pair of tokens of which one
sees the other, and twice that backward. What is computed again is not needed, nor is padding, nor are logits that no
label asks for.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
"""The label that the loss leaves out."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Needed:
    """FLOPs of one forward and backward: for a token, a token with a label, and a pair of tokens within each window."""

    token: int
    label: int
    pairs: Mapping[int | None, int]

    def of(self, tokens: int, labels: int, pairs: Mapping[int | None, int]) -> int:
        """FLOPs for so many of each."""
        return self.token * tokens + self.label * labels + sum(cost * pairs[w] for w, cost in self.pairs.items())


def needed(model: Any) -> Needed | None:
    """What a decoder-only language model needs, with adapters or without.

    None where shapes do not tell: experts, convolutions, other attention than softmax over all or a window.
    """
    config = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    windows = _windows(config)
    head = model.get_output_embeddings()
    if windows is None or not isinstance(head, torch.nn.Module):
        return None
    token = label = 0
    of_head = {id(module) for module in head.modules()}
    is_trained = False  # something so far, in the order of the modules
    for name, module in model.named_modules():
        if "original_module" in name.split("."):
            continue  # PEFT keeps it beside the copy that is trained
        own = list(module.parameters(recurse=False))
        if any(parameter.dim() > 2 for parameter in own):
            return None
        size = _matrix(module)
        if size is not None:
            cost = 2 * size * (1 + is_trained + any(parameter.requires_grad for parameter in own))
            label, token = (label + cost, token) if id(module) in of_head else (label, token + cost)
        is_trained = is_trained or any(parameter.requires_grad for parameter in own)
    if not is_trained:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 12 * config.num_attention_heads * width
    return Needed(token, label, {window: pair * layers for window, layers in windows.items()})


def _matrix(module: torch.nn.Module) -> int | None:
    """in*out of a module that multiplies by a matrix of its own, quantised or not; None for another."""
    if isinstance(module, torch.nn.Embedding) or hasattr(module, "base_layer"):
        return None
    inward, outward = vars(module).get("in_features"), vars(module).get("out_features")
    if isinstance(inward, int) and isinstance(outward, int):
        return inward * outward
    weight = module._parameters.get("weight")
    return weight.numel() if weight is not None and weight.dim() == 2 else None


def _windows(config: Any) -> Counter[int | None] | None:
    """How many layers see so many tokens back, None for all; None where a layer does something else."""
    count = getattr(config, "num_hidden_layers", None)
    if count is None or not getattr(config, "num_attention_heads", None):
        return None
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * count
    if set(types) - {"sliding_attention", "full_attention"}:
        return None
    return Counter(window if kind == "sliding_attention" else None for kind in types)


@dataclass(slots=True)
class Batch:
    """Tokens, labels and pairs of a micro-batch; tensors [] on the device where they are not known from shapes."""

    tokens: torch.Tensor
    labels: torch.Tensor | None
    pairs: dict[int | None, torch.Tensor]


def count(inputs: Any, windows: tuple[int | None, ...]) -> Batch | None:
    """Count a micro-batch without waiting for the device; None where it has no `input_ids` [batch, sequence].

    A batch of rollouts has prompt_mask [batch, prompt] and completion_mask [batch, completion] in place of these.
    Tokens are those that attention_mask [batch, sequence] has, or all. Packed rows are told by position_ids [batch,
    sequence] that begin again. Labels are those that a loss looks at, which begins at the second token.
    """
    if is_rollouts(inputs):
        return Batch(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum(), None, {})
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    mask, positions, labels = (_like(inputs.get(name), ids) for name in ("attention_mask", "position_ids", "labels"))
    lengths = torch.full((ids.shape[0],), ids.shape[1]) if mask is None else mask.sum(1)
    pairs = {}
    for window in windows:
        if positions is not None:
            # A token at position p sees p others and itself.
            seen = _at_most(positions + 1, window)
            pairs[window] = (seen if mask is None else seen * mask).sum()
        else:
            full = _at_most(lengths, window)
            pairs[window] = (full * (full + 1) // 2 + (lengths - full) * full).sum()
    return Batch(lengths.sum(), None if labels is None else (labels[:, 1:] != IGNORED).sum(), pairs)


def is_rollouts(inputs: Any) -> bool:
    """Whether a micro-batch is prompts and the completions that were sampled for them."""
    return isinstance(inputs, Mapping) and all(
        isinstance(inputs.get(name), torch.Tensor) for name in ("prompt_mask", "completion_mask")
    )


def _at_most(value: torch.Tensor, most: int | None) -> torch.Tensor:
    return value if most is None else value.clamp(max=most)


def _like(value: Any, ids: torch.Tensor) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) and value.shape == ids.shape else None
