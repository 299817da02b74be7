"""Backwards that can run once only, and say so to whoever differentiates them again."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a hand-written backward: no graph inside, and under create_graph its results raise if differentiated.

    torch's own once_differentiable guards only incoming gradients that carry a graph. With a plain one, as from a sum,
    its results would pass for constants and a gradient penalty would silently lose a term.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        refuse = torch._C._functions.DelayedError(
            "a fused op was differentiated twice; its backward cannot be differentiated again", 1
        )
        return tuple(None if r is None else refuse(r.detach().requires_grad_()) for r in _as_tuple(results))

    return wrapper


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
