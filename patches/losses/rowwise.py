"""Any function of each row of logits, a chunk of rows at a time, with the logits made again for the backward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..kernels.once import differentiable_once
from .recipe import Recipe

Function = Callable[..., torch.Tensor]

CHUNK_BYTES = 128 * 2**20
"""Of one chunk of logits, counted in fp32."""


def rowwise(function: Function, *recipes: Recipe, along: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """`function(logits [n, V], ...) -> [n, ...]` over all rows of one or several recipes with equally many rows [N, H].

    Of the tensors `along` [N, ...] it gets the same rows, after the logits; they are not differentiated. `function`
    must treat each row by itself and be pure: it runs again in the backward. The result [N, ...] is
    differentiable in the hidden states and in the heads; gradients of a head are summed in fp32.
    """
    for recipe in recipes:
        recipe.check()
    tensors = [tensor for recipe in recipes for tensor in recipe.tensors()]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        result: torch.Tensor = _Rowwise.apply(function, recipes, along, *tensors)  # type: ignore[no-untyped-call]  # torch's
        return result
    with torch.no_grad():
        return _run(function, recipes, along)


def _chunks(recipes: Sequence[Recipe]) -> Iterator[slice]:
    rows = recipes[0].rows.shape[0]
    size = max(1, CHUNK_BYTES // (4 * recipes[0].projection.vocabulary * len(recipes)))
    # No rows at all are one empty chunk, so that the result has its shape.
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def _run(function: Function, recipes: Sequence[Recipe], along: Sequence[torch.Tensor]) -> torch.Tensor:
    parts = [
        function(
            *(recipe.finish(recipe.projection(recipe.rows[chunk])) for recipe in recipes),
            *(tensor[chunk] for tensor in along),
        )
        for chunk in _chunks(recipes)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Function,
        recipes: Sequence[Recipe],
        along: Sequence[torch.Tensor],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        kind = recipes[0].rows.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.function, ctx.recipes, ctx.along = function, recipes, along
        ctx.save_for_backward(*tensors)
        result = _run(function, recipes, along)
        if not result.is_floating_point():
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        recipes: Sequence[Recipe] = ctx.recipes
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        totals: list[torch.Tensor | None] = [None] * len(saved)
        kind, dtype, enabled = ctx.autocast
        for chunk in _chunks(recipes):
            local: list[Any] = []
            for index, tensor in enumerate(saved):
                part = tensor[chunk] if index % 3 == 0 else tensor
                local.append(None if part is None else part.detach().requires_grad_(needed[index]))
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                logits = [recipe.logits_of(*local[3 * i : 3 * i + 3]) for i, recipe in enumerate(recipes)]
                result = ctx.function(*logits, *(tensor[chunk] for tensor in ctx.along))
            wanted = [index for index, flag in enumerate(needed) if flag]
            found = torch.autograd.grad(result, [local[index] for index in wanted], grad[chunk], allow_unused=True)
            for index, part in zip(wanted, found, strict=True):
                if part is not None:
                    totals[index] = _added(totals[index], part, saved[index], chunk if index % 3 == 0 else None)
        return (
            None,
            None,
            None,
            *(total if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, saved, strict=True)),
        )


def _added(total: torch.Tensor | None, part: torch.Tensor, like: torch.Tensor, chunk: slice | None) -> torch.Tensor:
    """A chunk's gradient put in its rows, or, for a head, added to those of the chunks before."""
    if chunk is not None:
        total = torch.zeros_like(like) if total is None else total
        total[chunk] = part
        return total
    wide = part if part.dtype is torch.float64 else part.float()
    return wide if total is None else total.add_(wide)
