"""Rotary embedding: replacements for upstream's `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)`.

transformers 4.57 has a `position_ids=None` before `unsqueeze_dim` that it does not use; 5.0 dropped it. Calls are
bound by upstream's own signature, so either form is understood.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from ..kernels import ops

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _rotary(original: Rotary, *, keep_dtype: bool) -> Rotary:
    positional = list(inspect.signature(original).parameters)
    dim_index = positional.index("unsqueeze_dim")

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = args[dim_index - 4] if len(args) > dim_index - 4 else kwargs.get("unsqueeze_dim", 1)
        unsqueeze_dim = given if isinstance(given, int) else 0
        full = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if not (full and ops.supports_rotary(q, k, cos, sin, unsqueeze_dim)):
            return original(q, k, cos, sin, *args, **kwargs)
        return ops.apply_rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, keep_dtype=keep_dtype)

    return apply_rotary_pos_emb


def promote(original: Rotary) -> Rotary:
    """Llama's: the result has the common dtype of q and cos."""
    return _rotary(original, keep_dtype=False)


def keep_dtype(original: Rotary) -> Rotary:
    """OLMo 2's: cos and sin may be wider than q, the result has q's dtype."""
    return _rotary(original, keep_dtype=True)
