"""Projections of one input with their low-rank terms, forward and backward, as few passes over memory as products need.

For a projection with base weight W [n, k], adapter A [r, k], B [n, r] and scale s:

    y  = x W^T + xa B^T       xa  = s x A^T     the adapters of a group make xa in one product, and it is kept
    dx = dy W + dyb A         dyb = s dy B
    dA = dyb^T x              dB  = dy^T xa

The scale is in xa and dyb, where it costs nothing. With dropout, x is the dropped input in xa and dA, and the mask of
each projection is made again from its seed.
"""

from collections.abc import Sequence

import torch

from ..kernels.four_bit_weight import FourBit
from ..kernels.ops.dropout import add_dropped, dropped
from ..kernels.ops.four_bit import dequantize_four_bit
from ..kernels.ops.lora_glu import MAX_RANK, LowRank
from .projection import Adapter, Projection
from .resident import held

Tensor = torch.Tensor


def is_made(projection: Projection, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` cannot take the weight as it is: it is packed in four bits, or of another dtype."""
    return isinstance(projection.weight, FourBit) or projection.weight.dtype is not dtype


def base_weight(projection: Projection, dtype: torch.dtype) -> Tensor:
    """W [n, k] in `dtype`: the parameter itself where it has that dtype, what stays of it, else made anew."""
    weight = projection.weight
    if not is_made(projection, dtype):
        assert isinstance(weight, Tensor), "four bits are no dtype of a product"
        return weight
    resident = held(projection, dtype)
    if resident is not None:
        return resident
    if not isinstance(weight, FourBit):
        return weight.to(dtype)
    out = torch.empty(projection.shape, dtype=dtype, device=weight.packed.device)
    dequantize_four_bit(weight, out)
    return out


class Group:
    """Projections that share an input, for computing in `dtype`."""

    __slots__ = ("a", "adapters", "b", "cols", "dtype", "has_dropout", "k", "projections", "r", "scale")

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        self.projections = tuple(projections)
        self.dtype = dtype
        self.k = projections[0].shape[1]
        self.adapters = [p.adapter for p in projections]
        self.cols: list[slice] = []
        self.r = 0
        for adapter in self.adapters:
            rank = 0 if adapter is None else adapter.a.shape[0]
            self.cols.append(slice(self.r, self.r + rank))
            self.r += rank
        present = self.present()
        self.has_dropout = any(adapter.dropout > 0.0 for adapter in present)
        scales = {adapter.scale for adapter in present}
        self.scale = scales.pop() if len(scales) == 1 else None
        self.a: Tensor | None = None
        self.b: list[Tensor | None] = [None] * len(self.projections)

    @property
    def is_narrow(self) -> bool:
        """Whether a kernel can add each of its low-rank terms from one tile."""
        return all(adapter.a.shape[0] <= MAX_RANK for adapter in self.present())

    def present(self) -> list[Adapter]:
        """The adapters of those projections that have one."""
        return [adapter for adapter in self.adapters if adapter is not None]

    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each projection that has an adapter, in order."""
        return [t for adapter in self.present() for t in (adapter.a, adapter.b)]

    def low_rank(self, x: Tensor, seeds: Sequence[int]) -> Tensor | None:
        """xa [T, r] of an input x [T, k]; None without adapters."""
        if self.a is None:
            return None
        if not self.has_dropout and self.scale is not None:
            return _scaled_product(x, self.a.t(), self.scale)
        xa = torch.empty((x.shape[0], self.r), dtype=x.dtype, device=x.device)
        for adapter, cols, seed in zip(self.adapters, self.cols, seeds, strict=True):
            if adapter is not None:
                source = dropped(x, adapter.dropout, seed) if adapter.dropout > 0.0 else x
                xa[:, cols] = _scaled_product(source, self.a[cols].t(), adapter.scale)
        return xa

    def forward(
        self, x: Tensor, xa: Tensor | None, residual: Tensor | None = None, *, with_adapters: bool = True
    ) -> list[Tensor]:
        """The outputs [T, n] of each projection for x [T, k], plus `residual` in the first.

        Without `with_adapters` the low-rank terms are left to whoever uses the outputs.
        """
        outputs = []
        for i, projection in enumerate(self.projections):
            weight = base_weight(projection, self.dtype)
            start = residual if i == 0 else None
            bias = projection.bias
            b = self.b[i] if with_adapters else None
            if bias is not None:
                y = torch.addmm(bias if bias.dtype is self.dtype else bias.to(self.dtype), x, weight.t())
                y = y if start is None else y.add_(start)
            else:
                y = torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())
            if b is not None and xa is not None:
                y.addmm_(xa[:, self.cols[i]], b.t())
            outputs.append(y)
        return outputs

    def terms(self, xa: Tensor | None) -> list[LowRank | None]:
        """xa B^T of each projection, for whoever adds it where the output is read."""
        pairs = zip(self.b, self.cols, strict=True)
        return [None if b is None or xa is None else LowRank(xa[:, cols], b) for b, cols in pairs]

    def low_rank_grad(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dyb [T, r] of the outputs' gradients; None without adapters."""
        if not self.r:
            return None
        if len(dys) == 1 and self.b[0] is not None and self.scale is not None:
            return _scaled_product(dys[0], self.b[0], self.scale)
        dyb = torch.empty((dys[0].shape[0], self.r), dtype=self.dtype, device=dys[0].device)
        for adapter, b, cols, dy in zip(self.adapters, self.b, self.cols, dys, strict=True):
            if adapter is not None and b is not None:
                torch.addmm(dyb[:, cols], dy, b, beta=0, alpha=adapter.scale, out=dyb[:, cols])
        return dyb

    def input_grad(
        self, dys: Sequence[Tensor], dyb: Tensor | None, seeds: Sequence[int], *, with_adapters: bool = True
    ) -> Tensor:
        """dx [T, k]; without `with_adapters` only the base's part of it."""
        dx = None
        for projection, dy in zip(self.projections, dys, strict=True):
            weight = base_weight(projection, self.dtype)
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        assert dx is not None, "a group has projections"
        if dyb is None or self.a is None or not with_adapters:
            return dx
        if not self.has_dropout:
            return dx.addmm_(dyb, self.a)
        for adapter, cols, seed in zip(self.adapters, self.cols, seeds, strict=True):
            if adapter is None:
                continue
            if adapter.dropout > 0.0:
                add_dropped(dx, torch.mm(dyb[:, cols], self.a[cols]), adapter.dropout, seed)
            else:
                dx.addmm_(dyb[:, cols], self.a[cols])
        return dx

    def adapter_grads(
        self,
        dys: Sequence[Tensor],
        dyb: Tensor | None,
        x: Tensor,
        xa: Tensor | None,
        seeds: Sequence[int],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of `parameters()`, None where `needs` says so."""
        grads: list[Tensor | None] = []
        if dyb is None or xa is None or not any(needs):
            return [None] * len(needs)
        wanted = iter(needs)
        together: dict[torch.dtype, Tensor] = {}
        for adapter, cols, dy, seed in zip(self.adapters, self.cols, dys, seeds, strict=True):
            if adapter is None:
                continue
            da = db = None
            dtype = adapter.a.dtype
            if next(wanted):
                if adapter.dropout > 0.0:
                    da = _product_over_rows(dyb[:, cols], dropped(x, adapter.dropout, seed), dtype)
                else:
                    if dtype not in together:
                        together[dtype] = _product_over_rows(dyb, x, dtype)
                    da = together[dtype][cols]
            if next(wanted):
                db = _product_over_rows(dy, xa[:, cols], adapter.b.dtype)
            grads += (da, db)
        return grads


def _scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y, rounded once."""
    if scale == 1.0:
        return torch.mm(x, y)
    out = torch.empty((x.shape[0], y.shape[1]), dtype=x.dtype, device=x.device)
    return torch.addmm(out, x, y, beta=0, alpha=scale, out=out)


def _product_over_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b for a [T, n] and b [T, m], in `dtype`; summed in fp32, and on a GPU not rounded to less on the way."""
    if a.dtype is dtype:
        return torch.mm(a.t(), b)
    return torch.mm(a.t(), b, out_dtype=dtype) if a.is_cuda else torch.mm(a.t(), b).to(dtype)
