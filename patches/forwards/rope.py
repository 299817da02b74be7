"""Rotary embedding: replacements for upstream's `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)`.

transformers 4.57 has a `position_ids=None` before `unsqueeze_dim` that it does not use; 5.0 dropped it. Calls are
bound by upstream's own signature, so either form is understood.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from ..kernels import ops
from .deferred_norm import deferring, epsilon, owed

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _unsqueeze_dim_of(original: Rotary) -> Callable[[tuple[object, ...], dict[str, object]], int]:
    """How to find `unsqueeze_dim` in a call's arguments after the tensors; the finder returns 0 for what is no int."""
    after_tensors = list(inspect.signature(original).parameters).index("unsqueeze_dim") - 4

    def find(args: tuple[object, ...], kwargs: dict[str, object]) -> int:
        given = args[after_tensors] if len(args) > after_tensors else kwargs.get("unsqueeze_dim", 1)
        return given if isinstance(given, int) else 0

    return find


def _rotary(original: Rotary, *, keep_dtype: bool, partial: bool = False) -> Rotary:
    unsqueeze_dim_of = _unsqueeze_dim_of(original)

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        unsqueeze_dim = unsqueeze_dim_of(args, kwargs)
        fits = partial or cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if not (fits and ops.supports_rotary(q, k, cos, sin, unsqueeze_dim)):
            return original(q, k, cos, sin, *args, **kwargs)
        return ops.apply_rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, keep_dtype=keep_dtype)

    return apply_rotary_pos_emb


def promote(original: Rotary) -> Rotary:
    """Llama's: the result has the common dtype of q and cos."""
    return _rotary(original, keep_dtype=False)


def promote_after_norm(original: Rotary) -> Rotary:
    """`promote`, in one kernel with the attention's own norms of q and k (Qwen 3, Gemma 3) where these can be deferred.

    Raises RuntimeError if q or k are not what the norms returned.
    """
    unsqueeze_dim_of, plain = _unsqueeze_dim_of(original), promote(original)

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        deferral = owed()
        if deferral is not None:
            q_norm, k_norm = deferral.settle(q, k)
            if q_norm is not None and k_norm is not None:
                tensors = q, k, q_norm.weight, k_norm.weight, cos, sin
                unsqueeze_dim = unsqueeze_dim_of(args, kwargs)
                if ops.supports_qk_norm_rope(*tensors, unsqueeze_dim):
                    return ops.qk_norm_rope(
                        *tensors,
                        q_eps=epsilon(q_norm),
                        k_eps=epsilon(k_norm),
                        offset=deferral.kind.offset,
                        cast_before_weight=deferral.kind.cast_before_weight,
                        unsqueeze_dim=unsqueeze_dim,
                    )
            q = q if q_norm is None else q_norm(q)
            k = k if k_norm is None else k_norm(k)
        return plain(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.around = deferring  # type: ignore[attr-defined]  # for `resolving.bind`
    return apply_rotary_pos_emb


def partial(original: Rotary) -> Rotary:
    """Phi-3's: only as many features as cos has are rotated, the others pass."""
    return _rotary(original, keep_dtype=False, partial=True)


def keep_dtype(original: Rotary) -> Rotary:
    """OLMo 2's: cos and sin may be wider than q, the result has q's dtype."""
    return _rotary(original, keep_dtype=True)
